"""Redis: channels with every kind of handler, a group of a stream, a list."""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Annotated, Any

import msgspec

from benchmarks.common import (
    ORDER,
    Contender,
    Order,
    OrderModel,
    Rows,
    Section,
    handled,
    log,
    progress,
    tenant,
)
from millstream.embedded import EmbeddedRedis

PACKAGES = ["redis", "hiredis"]
#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "publisher": "a `dict`, publishes a `dict`",
    "request": "request and reply, both sides",
    "stream": "stream group: a `dict`, acknowledged",
    "list": "list: a `dict`, settled",
}
NAMES = {
    "raw": "raw redis-py",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
}
MANY, REQUESTS = 30_000, 2_000


class Wire:
    """A Redis client that only sends: prepared bytes on a socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._lines = self._socket.makefile("rb")

    def send(self, *args: bytes, times: int) -> None:
        """Send a command so often; returns when the server has carried out all of them."""
        one = b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in args)
        end = b"*2\r\n$4\r\nECHO\r\n$3\r\nend\r\n"
        sender = threading.Thread(target=self._socket.sendall, args=(one * times + end,))
        sender.start()
        while (line := self._lines.readline()) != b"end\r\n":
            assert line and not line.startswith(b"-"), line
        sender.join()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Redis(Section):
    """On a redis-server; messages are sent by a socket that writes prepared bytes."""

    def __init__(self, url: str, peer: str | None, rounds: int, scale: float) -> None:
        super().__init__("redis", url, peer, rounds, scale)
        self.wire = Wire(int(url.rpartition(":")[2]))

    def run(self, scenario: str) -> Rows:
        """All contenders of one scenario."""
        names = self.contenders("raw", "millstream", "fastapi", "faststream")
        if scenario == "request":
            return self.turns(scenario, names, REQUESTS, None)

        def feed(address: str, n: int) -> None:
            key = address.encode()
            if scenario == "stream":
                self.wire.send(b"XADD", key, b"*", b"__data__", ORDER, times=n)
            else:
                command = b"RPUSH" if scenario == "list" else b"PUBLISH"
                self.wire.send(command, key, ORDER, times=n)

        return self.turns(scenario, names, MANY, feed)


def table(results: dict[str, Rows], column: int) -> list[str]:
    """CPU µs (column 0) or messages a second (1)."""
    names = list(results["dict"])
    over = " over raw | FastStream ÷ ours |" if not column else " ours ÷ raw |"
    lines = ["| handler | " + " | ".join(NAMES[n] for n in names) + " |" + over]
    lines.append("|---|" + "--:|" * (len(names) + 2 - column))
    for scenario, rows in results.items():
        raw, ours = rows["raw"][column], rows["millstream"][column]
        if column:
            cells = [f"{rows[n][1]:,.0f}" for n in names] + [f"{ours / raw:.2f}"]
        else:
            cells = [f"{rows[n][0]:.1f}" for n in names]
            cells.append(f"× {ours / raw:.2f}" if scenario == "request" else f"{ours - raw:+.1f}")
            cells.append(f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–")
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + " |")
    return lines


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(0, store=Path(folder)) as server:
        bench = Redis(server.url, peer, rounds, scale)
        with closing(bench.wire):
            results = {}
            for scenario in CORE:
                progress(f"redis: {scenario}")
                results[scenario] = bench.run(scenario)
    return [
        "CPU µs per message (median of the rounds; lower is better):",
        "",
        *table(results, 0),
        "",
        "Messages per second (the sender and the server share the machine):",
        "",
        *table(results, 1),
    ]


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
    encode = msgspec.json.Encoder().encode
    as_dict = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct = msgspec.json.Decoder(Order).decode
    as_model = OrderModel.__pydantic_validator__.validate_json

    async def take(order: Any) -> None:
        handled()

    async def take_all(order: OrderModel, raw: Any, logger: logging.Logger, who: str) -> None:
        handled()

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

    pubsub = client.pubsub()
    if scenario == "stream":
        await client.xgroup_create(address, "g", mkstream=True)
        task = asyncio.create_task(stream())
    elif scenario == "list":
        task = asyncio.create_task(list_())
    else:
        await pubsub.subscribe(address)
        await pubsub.get_message(timeout=5)
        task = asyncio.create_task(channel())

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

    try:
        yield requests if scenario == "request" else None
    finally:
        task.cancel()
        await asyncio.wait([task])
        await pubsub.aclose()
        await client.aclose()


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, address: str) -> None:
    from millstream import Depends, Logger
    from millstream.redis import StreamSub
    from millstream.redis.annotations import RedisMessage

    sources: dict[str, dict[str, Any]] = {
        "stream": {"stream": StreamSub(address, group="g")},
        "list": {"list": address},
    }
    source = sources.get(scenario, {"channel": address})
    subscriber = surface.subscriber(**source)
    if scenario in ("dict", "stream", "list"):

        @subscriber
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @subscriber
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario == "pydantic":

        @subscriber
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @subscriber
        async def injected(
            order: OrderModel,
            message: RedisMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @subscriber
        @surface.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    else:

        @subscriber
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}


def requesting(broker: Any, address: str) -> Callable[[int], Awaitable[None]]:
    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, address, timeout=5)
            await answer.decode()

    return requests


@asynccontextmanager
async def millstream(url: str, scenario: str, address: str) -> Contender:
    from millstream.redis import RedisBroker

    broker = RedisBroker(url)
    declare(broker, scenario, address)
    await broker.start()
    try:
        yield requesting(broker, address) if scenario == "request" else None
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, address: str) -> Contender:
    from fastapi import FastAPI

    from millstream.redis.fastapi import RedisRouter

    router = RedisRouter(url)
    declare(router, scenario, address)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        yield requesting(router.broker, address) if scenario == "request" else None


@asynccontextmanager
async def faststream(url: str, scenario: str, address: str) -> Contender:
    from faststream import Depends, Logger  # pyright: ignore[reportMissingImports]
    from faststream.redis import (  # pyright: ignore[reportMissingImports]
        RedisBroker,
        RedisMessage,
        StreamSub,
    )

    # Its access log (two lines a message by default) is off, so that work is compared.
    broker = RedisBroker(url, logger=log)
    sources: dict[str, dict[str, Any]] = {
        "stream": {"stream": StreamSub(address, group="g", consumer="c", max_records=100)},
        "list": {"list": address},
    }
    source = sources.get(scenario, {"channel": address})
    subscriber = broker.subscriber(**source)
    if scenario in ("dict", "stream", "list"):

        @subscriber
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @subscriber
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario == "pydantic":

        @subscriber
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @subscriber
        async def injected(
            order: OrderModel,
            message: RedisMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @subscriber
        @broker.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    else:

        @subscriber
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    await broker.start()
    try:
        yield requesting(broker, address) if scenario == "request" else None
    finally:
        await broker.stop()


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
}
