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
        assert await client.llen(f"{{{name}}}:ms:taken:{member(broker)}") >= 1
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
    await client.rpush(f"{{{name}}}:ms:taken:dead-1", "1", "2")
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
