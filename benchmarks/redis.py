"""Redis: channels with every kind of handler, a group of a stream, a list."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import FRAMEWORKS, ORDER, PUBLISHING, READING, REQUEST, Section
from benchmarks.common import Wire as Socket
from benchmarks.contenders import (
    Contender,
    Running,
    alone,
    as_dict,
    as_model,
    as_struct,
    declare,
    driving,
    encode,
    log,
    looping,
    on_millstream,
    take,
    take_all,
    tenant,
)
from millstream.embedded import EmbeddedRedis

PACKAGES = ["redis", "hiredis"]


class Wire(Socket):
    """Redis' protocol."""

    def send(self, *args: bytes, times: int) -> None:
        """Send a command so often; returns when the server has carried out all of them."""
        one = b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in args)
        with self.sending(one * times + b"*2\r\n$4\r\nECHO\r\n$3\r\nend\r\n"):
            while (line := self.answers.readline()) != b"end\r\n":
                assert line and not line.startswith(b"-"), line


class Redis(Section):
    """On a redis-server."""

    broker = "redis"
    scenarios: ClassVar = {
        **READING,
        **PUBLISHING,
        **REQUEST,
        "stream": "stream group: a `dict`, acknowledged",
        "list": "list: a `dict`, settled",
    }
    names: ClassVar = {"raw": "raw redis-py", **FRAMEWORKS}

    def send(self, scenario: str, address: str, n: int) -> None:
        key = address.encode()
        if scenario == "stream":
            self.sender.send(b"XADD", key, b"*", b"__data__", ORDER, times=n)
        else:
            self.sender.send(b"RPUSH" if scenario == "list" else b"PUBLISH", key, ORDER, times=n)


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(0, store=Path(folder)) as server,
        closing(Wire(server.url)) as wire,
    ):
        return Redis(wire, server.url, peer, rounds, scale).report()


# raw redis-py: the same decoder, the same discipline, and nothing around it

#: Moves elements to a list of their own, so that a crash loses none; and removes them there.
TAKE = """
local out = {}
for i = 1, 100 do
  local element = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
  if not element then break end
  out[i] = element
end
return out
"""


@asynccontextmanager
async def raw(url: str, scenario: str, address: str) -> Contender:
    from redis.asyncio import Redis as Client

    client: Any = Client.from_url(url)
    pubsub = client.pubsub()

    async def channel() -> None:
        async for message in pubsub.listen():
            if message["type"] != "message":
                continue
            data = message["data"]
            if scenario == "dict":
                await take(as_dict(data))
            elif scenario == "msgspec":
                await take(as_struct(data))
            elif scenario == "pydantic":
                await take(as_model(data))
            elif scenario == "injected":
                await take_all(as_model(data), message, log, tenant())
            elif scenario == "publisher":
                await take(as_dict(data))
                await client.publish("bench.out", encode({"ok": True}))
            else:
                order = as_dict(data)
                await client.publish(order["reply"], encode({"id": order["id"]}))

    async def stream() -> None:
        while True:
            found = await client.xreadgroup("g", "c", {address: ">"}, count=100, block=5000)
            for _, entries in found:
                for _, fields in entries:
                    await take(as_dict(fields[b"__data__"]))
                await client.xack(address, "g", *[id for id, _ in entries])

    async def list_() -> None:
        move = client.register_script(TAKE)
        taken = f"{address}:taken"
        while True:
            elements = await move(keys=[address, taken])
            if not elements:
                found = await client.blmove(address, taken, 5, "LEFT", "RIGHT")
                elements = [] if found is None else [found]
            for element in elements:
                await take(as_dict(element))
            await client.ltrim(taken, len(elements), -1)

    async def requests(n: int) -> None:
        async with client.pubsub() as replies:
            await replies.subscribe("bench.replies")
            await replies.get_message(timeout=5)
            for _ in range(n):
                await client.publish(address, encode({"id": 7, "reply": "bench.replies"}))
                answer = None
                while answer is None:
                    answer = await replies.get_message(timeout=5)
                as_dict(answer["data"])

    if scenario == "stream":
        await client.xgroup_create(address, "g", mkstream=True)
    elif scenario != "list":
        await pubsub.subscribe(address)
        await pubsub.get_message(timeout=5)
    try:
        async with looping({"stream": stream, "list": list_}.get(scenario, channel)()):
            yield requests if scenario == "request" else None
    finally:
        await pubsub.aclose()
        await client.aclose()


# Millstream and FastStream


def ours(surface: Any, scenario: str, address: str) -> Any:
    from millstream.redis import StreamSub

    sources: dict[str, Any] = {
        "stream": {"stream": StreamSub(address, group="g")},
        "list": {"list": address},
    }
    source = sources.get(scenario, {"channel": address})
    return partial(surface.subscriber, **source), partial(surface.publisher, "bench.out")


def faststream(url: str, scenario: str, address: str) -> Running:
    from faststream.redis import (  # pyright: ignore[reportMissingImports]
        RedisBroker,
        RedisMessage,
        StreamSub,
    )

    broker = RedisBroker(url, logger=log)
    stream = StreamSub(address, group="g", consumer="c", max_records=100)
    sources = {"stream": {"stream": stream}, "list": {"list": address}}
    subscriber = partial(broker.subscriber, **sources.get(scenario, {"channel": address}))
    publisher = partial(broker.publisher, "bench.out")
    declare("faststream", RedisMessage, scenario, subscriber, publisher)
    return alone(broker, driving(broker, scenario, address))


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    **on_millstream("Redis", ours),
    "faststream": faststream,
}
