"""Others on the same server: raw clients, redis-cli, Valkey, FastStream's envelope."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from millstream.redis import RedisBroker, RedisMessage, StreamSub
from tests.helpers import eventually
from tests.servers import missing


def envelope(body: bytes, headers: dict[str, str]) -> bytes:
    """FastStream's envelope, by its rules written down once more."""
    texts = b""
    for word in (w for item in headers.items() for w in item):
        texts += len(word).to_bytes(2, "big") + word.encode()
    at = 8 + 2 + 4 + 4
    head = b"\x89BIN\r\n\x1a\n\x00\x01" + at.to_bytes(4, "big")
    head += (at + 2 + len(texts)).to_bytes(4, "big") + len(headers).to_bytes(2, "big")
    return head + texts + body


@pytest.mark.parametrize("kind", ["channel", "list", "stream"])
async def test_what_others_send(broker: RedisBroker, client: Redis, name: str, kind: str) -> None:
    got: list[Any] = []

    @broker.subscriber(**{kind: name})
    async def handler(body: dict[str, Any], message: RedisMessage) -> None:
        got.append((body, message.headers.get("tenant")))

    await broker.start()
    await asyncio.sleep(0.1)
    peers = envelope(b'{"id":1}', {"content-type": "application/json", "tenant": "acme"})
    for value in (b'{"id": 0}', peers):
        if kind == "channel":
            await client.publish(name, value)
        elif kind == "list":
            await client.rpush(name, value)
        else:
            await client.xadd(name, {"__data__": value})
    if kind == "stream":
        await client.xadd(name, {"id": "7", "city": "Bonn"})
        await client.xadd(name, {"__data__": '{"id": 2}', "tenant": "field"})
    wanted: list[Any] = [({"id": 0}, None), ({"id": 1}, "acme")]
    if kind == "stream":
        wanted += [({"id": "7", "city": "Bonn"}, None), ({"id": 2}, "field")]
    await eventually(lambda: got == wanted)


async def test_what_others_read(broker: RedisBroker, client: Redis, name: str) -> None:
    await broker.connect()
    await broker.publish({"id": 1}, stream=name, headers={"tenant": "acme"})
    await broker.publish({"id": 2}, list=f"{name}-l")
    [(_, fields)] = await client.xrange(name)
    assert fields == {b"__data__": b'{"id":1}', b"tenant": b"acme"}
    assert msgspec.json.decode(await client.lpop(f"{name}-l")) == {"id": 2}


async def test_redis_cli_both_ways(broker: RedisBroker, redis: Any, name: str) -> None:
    if shutil.which("redis-cli") is None:
        missing("no redis-cli: Debian's package redis-tools brings it")
    got: list[Any] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: dict[str, int]) -> None:
        got.append(body)

    def cli(*args: str) -> str:
        command = ["redis-cli", "-u", redis.url, *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout

    await broker.start()
    await asyncio.to_thread(cli, "XADD", name, "*", "__data__", '{"id": 1}')
    await eventually(lambda: got == [{"id": 1}])
    await broker.publish("from us", list=f"{name}-l")
    assert (await asyncio.to_thread(cli, "LPOP", f"{name}-l")).strip() == "from us"


async def test_the_same_on_valkey(valkey: Any, name: str) -> None:
    broker = RedisBroker(valkey.url)
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    async with broker:
        await broker.start()
        await broker.publish(1, stream=name)
        await eventually(lambda: got == [1])
