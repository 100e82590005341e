"""Lists: nothing that was taken is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream.errors import NackMessage
from millstream.redis import ListSub, RedisBroker, RedisListMessage
from millstream.retry import Retry
from tests.helpers import eventually
from tests.servers.redis import RedisServer


async def keys(client: Redis, name: str) -> dict[bytes, Any]:
    """What lies beside a list; nobody's sign of life."""
    found = {key: key async for key in client.scan_iter(f"{{{name}}}:ms:*")}
    return {key: key for key in found if not key.endswith(b":alive")}


async def test_elements_are_taken_from_the_head_and_settled(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[tuple[int, str]] = []

    @broker.subscriber(list=name)
    async def handler(body: int, message: RedisListMessage) -> None:
        assert await client.hlen(f"{{{name}}}:ms:taken:{member(broker)}") >= 1
        got.append((body, message.destination))

    await broker.start()
    await client.rpush(name, "1", "2", "2")
    assert await broker.publish(3, list=name) >= 1
    await eventually(lambda: [n for n, _ in got] == [1, 2, 2, 3])
    assert got[0][1] == f"list://{name}"

    async def clean() -> bool:
        return not await keys(client, name)

    await eventually(clean)


def member(broker: RedisBroker) -> str:
    return broker.subscriptions[0]._intake.me  # type: ignore[union-attr]


async def test_batches(broker: RedisBroker, client: Redis, name: str) -> None:
    got: list[list[int]] = []

    @broker.subscriber(list=ListSub(name, batch=True, max_records=3))
    async def handler(bodies: list[int]) -> None:
        got.append(bodies)

    await client.rpush(name, *"12345")
    await broker.start()
    await eventually(lambda: got == [[1, 2, 3], [4, 5]])


async def test_a_retry_waits_in_redis_with_its_count(redis: Any, client: Redis, name: str) -> None:
    first, second = RedisBroker(redis.url), RedisBroker(redis.url)
    attempts: list[tuple[int, float]] = []
    loop = asyncio.get_running_loop()

    @first.subscriber(list=name, retry=Retry(delay=1.5))
    async def fails(body: str, message: RedisListMessage) -> None:
        attempts.append((message.attempt, loop.time()))
        raise ValueError("no stock")

    @second.subscriber(list=name)
    async def works(body: str, message: RedisListMessage) -> None:
        attempts.append((message.attempt, loop.time()))
        assert body == "a" and message.headers["tenant"] == "acme"

    await first.start()
    await first.publish("a", list=name, headers={"tenant": "acme"})
    await eventually(lambda: attempts)
    await eventually(lambda: first.subscriptions[0].in_flight == 0)
    await first.stop()
    assert await client.zcard(f"{{{name}}}:ms:later") == 1
    await second.start()
    await eventually(lambda: len(attempts) == 2)
    assert [count for count, _ in attempts] == [1, 2]
    assert attempts[1][1] - attempts[0][1] >= 1.4
    await second.stop()
    assert not await keys(client, name)


async def test_what_a_dead_process_had_taken_is_taken_over(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[tuple[int, int]] = []
    await client.hset(f"{{{name}}}:ms:taken:dead-1", mapping={"dead-1-10": "2", "dead-1-9": "1"})
    await client.zadd(f"{{{name}}}:ms:alive", {"dead-1": 1000.0})

    @broker.subscriber(list=ListSub(name, ack_wait=1.0))
    async def handler(body: int, message: RedisListMessage) -> None:
        got.append((body, message.delivery_count))

    await broker.start()
    await eventually(lambda: got == [(1, 2), (2, 2)])

    async def clean() -> bool:
        return not await keys(client, name)

    await eventually(clean)


@pytest.mark.parametrize("lanes", [1, 3])
async def test_what_was_not_begun_goes_back_to_where_it_was(
    broker: RedisBroker, client: Redis, name: str, lanes: int
) -> None:
    gate, begun = asyncio.Event(), list[int]()

    @broker.subscriber(list=ListSub(name), concurrency=lanes)
    async def handler(body: int) -> None:
        begun.append(body)
        await gate.wait()

    await client.rpush(name, *map(str, range(20)))
    await broker.start()
    await eventually(lambda: len(begun) == lanes)
    stopping = asyncio.create_task(broker.stop())

    async def back() -> bool:
        there = [int(n) for n in await client.lrange(name, 0, -1)]
        if lanes > 1:  # the one that waited for room in a lane comes back last
            there.sort()
        return there == list(range(lanes, 20))

    await eventually(back)
    gate.set()
    await stopping
    assert await client.llen(name) == 20 - lanes and not await keys(client, name)


async def test_equal_elements_are_separate_messages(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []

    @broker.subscriber(list=name, concurrency=3, retry=Retry(delay=0.1))
    async def handler(body: str) -> None:
        got.append(1)
        if len(got) == 2:
            raise NackMessage(delay=0.1)
        await asyncio.sleep(0.01)

    await client.rpush(name, *["same"] * 6)
    await broker.start()
    await eventually(lambda: len(got) == 7)
    await asyncio.sleep(0.3)
    assert len(got) == 7

    async def clean() -> bool:
        return not await keys(client, name)

    await eventually(clean)


async def test_lag_counts_what_waits(broker: RedisBroker, client: Redis, name: str) -> None:
    gate = asyncio.Event()

    @broker.subscriber(list=name)
    async def handler(body: int) -> None:
        await gate.wait()

    await client.rpush(name, *map(str, range(10)))
    await broker.start()
    await eventually(lambda: broker.subscriptions[0].in_flight)
    await broker.subscriptions[0].ask_lag()
    assert broker.health()["subscriptions"][0]["lag"] == 9
    gate.set()


async def test_a_full_server_is_emptied(redis_server: RedisServer) -> None:
    """The server takes nothing more, and what it holds is still handed out, and settled."""
    broker = RedisBroker(redis_server.url)
    got: list[int] = []

    @broker.subscriber(list=ListSub("l", ack_wait=1.0), concurrency=2, retry=Retry(delay=0.1))
    async def handler(body: int, message: RedisListMessage) -> None:
        await asyncio.sleep(0.3)  # signs of life are needed meanwhile
        if body == 1 and message.attempt == 1:
            raise ValueError("no stock")
        got.append(body)

    async with Redis.from_url(redis_server.url) as client:
        await client.rpush("l", *map(str, range(10)))
        await client.config_set("maxmemory", "1kb")
        await broker.start()
        await eventually(lambda: sorted(got) == list(range(10)), 10)
        await eventually(lambda: broker.subscriptions[0].in_flight == 0)
        await client.config_set("maxmemory", "0")
        await broker.publish(10, list="l")
        await eventually(lambda: got[-1] == 10)
        await broker.stop()
        assert not await keys(client, "l")


@pytest.mark.parametrize("body", [b"\x00", b"\x00ms", b"\x00\x00\x00\x00\x09\x00odd", b""])
async def test_an_element_may_be_anything(
    broker: RedisBroker, client: Redis, name: str, body: bytes
) -> None:
    got: list[tuple[bytes, int]] = []

    @broker.subscriber(list=name, retry=Retry(delay=0.05))
    async def handler(message: RedisListMessage) -> None:
        got.append((message.body, message.attempt))
        if len(got) < 3:
            raise ValueError("no stock")

    await client.rpush(name, body)
    await broker.start()
    await eventually(lambda: len(got) == 3)
    assert got == [(body, 1), (body, 2), (body, 3)]


async def test_waiting_processes_take_turns(
    broker: RedisBroker, second: RedisBroker, client: Redis, name: str
) -> None:
    """One element wakes one of those that wait; what it was given is not lost with it."""
    got: list[int] = []
    for one in (broker, second):

        @one.subscriber(list=ListSub(name, ack_wait=1.0))
        async def handler(body: int) -> None:
            got.append(body)

        await one.start()
    for n in range(20):
        await client.rpush(name, str(n))
        await eventually(lambda n=n: len(got) == n + 1)
    assert sorted(got) == list(range(20))
    # As if a process had ended between the two steps.
    await client.rpush(f"{{{name}}}:ms:next", "20")
    await eventually(lambda: len(got) == 21)


async def test_a_handler_publishes_a_list_item_by_item(broker: RedisBroker, name: str) -> None:
    out, got = f"{name}-out", []

    @broker.subscriber(list=name)
    @broker.publisher(list=ListSub(out, batch=True))
    async def split(body: int) -> list[int]:
        return [body, body + 1]

    @broker.subscriber(list=out)
    async def collect(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, list=name)
    await eventually(lambda: got == [1, 2])
