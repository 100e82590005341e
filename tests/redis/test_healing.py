"""Connections that break, servers that restart, publications meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream.errors import ConnectError, NotConnected, PublishError, PublishTimeout
from millstream.redis import ListSub, RedisBroker, RedisStreamMessage, StreamSub
from tests.faults.proxy import Proxy
from tests.helpers import eventually, unique
from tests.servers import free_port
from tests.servers.redis import RedisServer


def declare(broker: RedisBroker, name: str, got: dict[str, list[int]]) -> None:
    """A subscription of each kind."""

    @broker.subscriber(f"{name}:{{what}}")
    async def channel(body: int) -> None:
        got["channel"].append(body)

    @broker.subscriber(stream=StreamSub(f"{name}-stream", group="g"))
    async def group(body: int) -> None:
        got["group"].append(body)

    @broker.subscriber(stream=f"{name}-stream")
    async def stream(body: int) -> None:
        got["stream"].append(body)

    @broker.subscriber(list=ListSub(f"{name}-list"))
    async def list_(body: int) -> None:
        got["list"].append(body)


async def send(client: Redis, name: str, n: int) -> None:
    """A message for each subscription."""

    async def heard() -> bool:
        return bool(await client.publish(f"{name}:x", n))

    await eventually(heard, 10)
    await client.xadd(f"{name}-stream", {"__data__": n})
    await client.rpush(f"{name}-list", n)


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_every_subscription_comes_back(
    redis_server: RedisServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    name, broker = unique(), RedisBroker(redis_server.url, reconnect_max=0.2)
    got: dict[str, list[int]] = {"channel": [], "group": [], "stream": [], "list": []}
    declare(broker, name, got)
    await broker.start()
    for n in range(1, 4):
        async with Redis.from_url(redis_server.url) as client:
            await send(client, name, n)
            await eventually(lambda n=n: all(g == list(range(1, n + 1)) for g in got.values()), 10)
        await asyncio.to_thread(redis_server.stop if how == "restart" else redis_server.kill)
        await asyncio.to_thread(redis_server.start)
        await eventually(lambda n=n: sum("connected again" in m for m in caplog.messages) == n, 10)
    assert sum("connection lost" in m for m in caplog.messages) == 3
    assert await broker.ping(2)
    await broker.stop()


async def test_what_was_published_while_away_waits_or_fails_in_time(
    redis_server: RedisServer,
) -> None:
    broker = RedisBroker(redis_server.url, publish_timeout=1.0, reconnect_max=0.1)
    await broker.connect()
    await broker.publish(1, stream="s")
    await asyncio.to_thread(redis_server.stop)
    begin = time.monotonic()
    with pytest.raises((NotConnected, PublishError)):
        await broker.publish(2, stream="s")
    if time.monotonic() - begin < 0.5:  # that one noticed the end; from now on it is known
        begin = time.monotonic()
        with pytest.raises(NotConnected, match="not connected"):
            await broker.publish(2, stream="s")
        assert 0.8 < time.monotonic() - begin < 3
    waiting = asyncio.create_task(broker.publish(3, stream="s", timeout=10))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(redis_server.start)
    assert await waiting
    assert await broker.client.xlen("s") == 2
    await broker.stop()


async def test_a_server_that_answers_no_more_is_noticed(redis_server: RedisServer) -> None:
    broker = RedisBroker(
        redis_server.url, socket_timeout=0.5, health_check_interval=0.5, publish_timeout=0.7
    )
    got: list[int] = []

    @broker.subscriber(stream=StreamSub("s", group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    @broker.subscriber("c")
    async def channel(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, stream="s")
    await eventually(lambda: got == [1])
    redis_server.suspend()
    with pytest.raises((PublishTimeout, NotConnected, PublishError)):
        await broker.publish(2, stream="s")
    await eventually(lambda: not broker.health()["connected"], 3)
    redis_server.resume()
    await eventually(lambda: broker.health()["connected"], 5)
    await broker.publish(3, stream="s")
    await eventually(lambda: 3 in got, 5)

    async def heard() -> bool:
        return bool(await broker.publish(4, "c"))

    await eventually(heard)
    await eventually(lambda: 4 in got)
    await broker.stop()


async def test_what_a_broken_connection_swallowed_is_delivered(redis_server: RedisServer) -> None:
    """The server believes that it delivered an entry, and nobody got it."""
    proxy = await Proxy(redis_server.port).start()
    broker = RedisBroker(
        f"redis://127.0.0.1:{proxy.port}", socket_timeout=1, health_check_interval=10
    )
    got: list[tuple[int, int]] = []

    @broker.subscriber(stream=StreamSub("s", group="g"))
    async def handler(body: int, message: RedisStreamMessage) -> None:
        got.append((body, message.delivery_count))

    @broker.subscriber(list="l")
    async def list_(body: int) -> None:
        got.append((body, 1))

    await broker.start()
    async with Redis.from_url(redis_server.url) as client:

        async def blocked() -> bool:
            return int((await client.info("clients"))["blocked_clients"]) == 2

        await eventually(blocked)
        proxy.hold(up=False, down=True)
        await client.xadd("s", {"__data__": 1})
        await client.rpush("l", 2)
        await asyncio.sleep(0.2)
        assert (await client.xpending("s", "g"))["pending"] == 1 and not await client.llen("l")
        proxy.reset()
        proxy.heal()
        await eventually(lambda: sorted(got) == [(1, 1), (2, 1)], 10)
    await broker.stop()
    await proxy.stop()


async def test_a_broker_that_starts_before_its_server(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    broker = RedisBroker(f"redis://user:s3cret@127.0.0.1:{port}", startup_timeout=0.5)
    with pytest.raises(ConnectError, match=rf"redis://127.0.0.1:{port}") as caught:
        await broker.connect()
    assert not caught.value.permanent and "s3cret" not in str(caught.value) + caplog.text
    patient = RedisBroker(f"redis://127.0.0.1:{port}", startup_timeout=20)
    connecting = asyncio.create_task(patient.connect())
    await eventually(lambda: "next try in" in caplog.text)
    with RedisServer(port=port):
        await connecting
        assert await patient.ping(2)
        await patient.stop()


async def test_a_full_server_refuses_and_goes_on(redis_server: RedisServer) -> None:
    broker = RedisBroker(redis_server.url)
    got: list[Any] = []

    @broker.subscriber(stream=StreamSub("s", group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.client.config_set("maxmemory", "1kb")
    with pytest.raises(PublishError, match=r"was not stored: .*maxmemory"):
        await broker.publish(1, stream="s")
    await broker.client.config_set("maxmemory", "0")
    await broker.publish(2, stream="s")
    await eventually(lambda: got == [2])
    await broker.stop()


async def test_a_thousand_publications_share_a_connection(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    await broker.connect()
    before = int((await client.info("stats"))["total_connections_received"])
    ids = await broker.publish_batch(*range(1000), stream=name)
    assert len(ids) == 1000 == await client.xlen(name) and ids == sorted(ids, key=_id)
    assert int((await client.info("stats"))["total_connections_received"]) == before


def _id(id: str) -> tuple[int, int]:
    first, _, second = id.partition("-")
    return int(first), int(second)


async def test_a_stopped_broker_can_start_again(broker: RedisBroker, name: str) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    for n in range(1, 3):
        await broker.start()
        await broker.publish(n, stream=name)
        await eventually(lambda n=n: len(got) == n)
        await broker.stop()
        with pytest.raises(NotConnected):
            await broker.publish(0, stream=name)


@pytest.mark.parametrize("kind", ["stream", "list"])
async def test_what_waited_in_a_lane_while_the_process_stood_still_is_not_begun(
    redis_server: RedisServer, kind: str
) -> None:
    name, begun, fetched = unique(), list[tuple[str, int]](), asyncio.Event()

    def make(process: str) -> RedisBroker:
        broker = RedisBroker(redis_server.url)
        source: Any = (
            {"stream": StreamSub(name, group="g", ack_wait=1.0, last_id="0")}
            if kind == "stream"
            else {"list": ListSub(name, ack_wait=1.0)}
        )

        @broker.subscriber(**source, ordered_by=lambda message: "one")
        async def handle(body: int) -> None:
            begun.append((process, body))
            if len(begun) == 1:
                await fetched.wait()
                other.start()
                time.sleep(3)

        return broker

    async def serve() -> None:
        broker = make("other")
        await broker.start()
        await eventually(lambda: len(begun) >= 4, 10)
        await asyncio.sleep(1)  # the first has woken up
        await broker.stop()

    other = threading.Thread(target=lambda: asyncio.run(serve()))
    broker = make("first")
    await broker.start()
    for n in range(3):
        await broker.publish(n, **{kind: name})
    [subscription] = broker.subscriptions
    lanes = subscription._lanes
    await eventually(lambda: lanes is not None and lanes.waiting == 2)
    fetched.set()
    await eventually(lambda: len(begun) >= 4, 10)
    await asyncio.to_thread(other.join)
    await broker.stop()
    assert begun == [("first", 0), *(("other", n) for n in range(3))]
