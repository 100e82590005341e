"""RabbitMQ: classic queues with every kind of handler, publishing with confirms, requests."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
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
    progress,
    tenant,
)

#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "publisher": "a `dict`, publishes a `dict`",
    "publish": "publishing, 100 unconfirmed",
    "request": "request and reply, both sides",
}
NAMES = {
    "raw": "pika, each acknowledged",
    "bare": "pika, same acknowledgements",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
}
#: What is told of the conditions.
PACKAGES = ["pika"]
MANY, REQUESTS, PREFETCH = 30_000, 2_000, 256


class Wire:
    """An AMQP client that only sends: prepared frames on a socket."""

    def __init__(self, port: int) -> None:
        from pika import frame, spec

        self._frame, self._spec = frame, spec
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._buffer = b""
        self._socket.sendall(b"AMQP\0\0\x09\x01")
        self._until(spec.Connection.Start)
        start = spec.Connection.StartOk({}, "PLAIN", b"\0guest\0guest", "en_US")  # pyright: ignore[reportArgumentType]
        self._method(0, start)
        self._until(spec.Connection.Tune)
        self._method(0, spec.Connection.TuneOk(10, 131_072, 0))
        self._method(0, spec.Connection.Open("/", insist=False))
        self._until(spec.Connection.OpenOk)
        self._method(1, spec.Channel.Open())
        self._until(spec.Channel.OpenOk)

    def _method(self, channel: int, method: Any) -> None:
        self._socket.sendall(self._frame.Method(channel, method).marshal())

    def _until(self, kind: type) -> None:
        while True:
            used, found = self._frame.decode_frame(self._buffer)
            if not used:
                data = self._socket.recv(65_536)
                if not data:
                    raise Failed("the server closed the connection")
                self._buffer += data
                continue
            self._buffer = self._buffer[used:]
            if isinstance(getattr(found, "method", None), kind):
                return

    def declare(self, queue: str) -> None:
        """Have a classic queue, and nothing in it."""
        spec = self._spec
        arguments = {"x-queue-type": "classic"}
        self._method(1, spec.Queue.Declare(queue=queue, durable=True, arguments=arguments))
        self._until(spec.Queue.DeclareOk)
        self._method(1, spec.Queue.Purge(queue=queue))
        self._until(spec.Queue.PurgeOk)

    def send(self, queue: str, body: bytes, n: int) -> None:
        """Send n messages; returns when the server has all of them."""
        spec, frame = self._spec, self._frame
        one = frame.Method(1, spec.Basic.Publish(exchange="", routing_key=queue)).marshal()
        one += frame.Header(1, len(body), spec.BasicProperties()).marshal()
        one += frame.Body(1, body).marshal()
        last = frame.Method(1, spec.Queue.Declare(queue=queue, passive=True)).marshal()
        sender = threading.Thread(target=self._socket.sendall, args=(one * n + last,))
        sender.start()
        self._until(spec.Queue.DeclareOk)
        sender.join()

    def close(self) -> None:
        self._socket.close()


class Rabbit(Section):
    """On a RabbitMQ node; messages are sent by a socket that writes prepared bytes."""

    def __init__(self, url: str, peer: str | None, rounds: int, scale: float) -> None:
        super().__init__("rabbit", url, peer, rounds, scale)
        self.wire = Wire(int(url.rstrip("/").rpartition(":")[2]))

    def run(self, scenario: str) -> Rows:
        """All contenders of one scenario."""
        names = self.contenders("raw", "bare", "millstream", "fastapi", "faststream")
        for name in names:
            self.wire.declare(f"bench.{scenario}.{name}")
        self.wire.declare("bench.out")
        if scenario in ("publish", "request"):
            names.remove("bare")
            return self.turns(scenario, names, REQUESTS if scenario == "request" else MANY, None)
        return self.turns(scenario, names, MANY, lambda queue, n: self.wire.send(queue, ORDER, n))


def cost_table(results: dict[str, Rows]) -> list[str]:
    names = list(results["dict"])
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " | over pika | FastStream ÷ ours |",
        "|---|" + "--:|" * (len(names) + 2),
    ]
    for scenario, rows in results.items():
        raw, ours = rows.get("bare", rows["raw"])[0], rows["millstream"][0]
        over = f"× {ours / raw:.2f}" if scenario == "request" else f"{ours - raw:+.1f} µs"
        peer = f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–"
        cells = [f"{rows[n][0]:.1f}" if n in rows else "–" for n in names]
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + f" | {over} | {peer} |")
    return lines


def rate_table(results: dict[str, Rows]) -> list[str]:
    names = list(results["dict"])
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for scenario, rows in results.items():
        cells = [f"{rows[n][1]:,.0f}" if n in rows else "–" for n in names]
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + " |")
    return lines


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    from tests.servers.rabbit import RabbitServer

    with RabbitServer() as server:
        bench = Rabbit(server.url, peer, rounds, scale)
        with closing(bench.wire):
            results = {}
            for scenario in CORE:
                progress(f"rabbit: {scenario}")
                results[scenario] = bench.run(scenario)
    return [
        "Classic queues, 256 messages sent ahead. CPU µs per message (median of the rounds; lower "
        "is better); *over pika* is against the loop with the same acknowledgements:",
        "",
        *cost_table(results),
        "",
        "Messages per second (the sender and the server share the machine):",
        "",
        *rate_table(results),
    ]


# pika by itself


async def opened(url: str) -> Any:
    """A channel of pika's asyncio adapter."""
    import pika
    from pika.adapters.asyncio_connection import AsyncioConnection

    logging.getLogger("pika").setLevel(logging.CRITICAL)
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def up(connection: Any) -> None:
        connection.channel(on_open_callback=ready.set_result)

    AsyncioConnection(pika.URLParameters(url), on_open_callback=up)
    channel = await ready
    channel.basic_qos(prefetch_count=PREFETCH)
    return channel


def handler_of(scenario: str) -> tuple[Callable[[bytes], Any], Callable[..., Awaitable[None]]]:
    """The decoder and the handler of a scenario."""
    as_dict: Any = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct: Any = msgspec.json.Decoder(Order).decode
    as_model: Any = OrderModel.__pydantic_validator__.validate_json

    async def take(order: Any) -> None:
        handled()

    if scenario == "injected":

        async def take_all(order: Any) -> None:
            await inner(order, None, log, tenant())

        async def inner(order: OrderModel, msg: Any, logger: logging.Logger, who: str) -> None:
            handled()

        return as_model, take_all
    return {"msgspec": as_struct, "pydantic": as_model}.get(scenario, as_dict), take


class Confirms:
    """What pika leaves to its user: which message a confirmation is for."""

    def __init__(self, channel: Any) -> None:
        self.channel, self.tag = channel, 0
        self.waiting: dict[int, asyncio.Future[None]] = {}
        channel.confirm_delivery(self.confirmed, callback=lambda frame: None)

    def confirmed(self, frame: Any) -> None:
        method = frame.method
        tags = [method.delivery_tag]
        if method.multiple:
            tags = [tag for tag in self.waiting if tag <= method.delivery_tag]
        for tag in tags:
            self.waiting.pop(tag).set_result(None)

    def publish(self, queue: str, body: bytes) -> asyncio.Future[None]:
        self.channel.basic_publish("", queue, body)
        self.tag += 1
        future = asyncio.get_running_loop().create_future()
        self.waiting[self.tag] = future
        return future


async def windowed(n: int, publish: Callable[[], Awaitable[Any]]) -> None:
    """Publish n messages, 100 of them unconfirmed at a time."""
    left = n

    async def some() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await publish()

    await asyncio.gather(*(some() for _ in range(100)))


@asynccontextmanager
async def raw(url: str, scenario: str, queue: str) -> Contender:
    """A callback for each message, which acknowledges it; publishing is awaited by a task."""
    channel = await opened(url)
    encode = msgspec.json.Encoder().encode
    decode, _ = handler_of(scenario)
    confirms = Confirms(await opened(url))
    body = encode({"ok": True})

    async def publishing(n: int) -> None:
        await windowed(n, lambda: confirms.publish(queue, body))

    async def publish_and_ack(tag: int) -> None:
        await confirms.publish("bench.out", encode({"ok": True}))
        channel.basic_ack(tag)
        handled()

    def take(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        decode(body)
        if scenario == "publisher":
            task = asyncio.create_task(publish_and_ack(method.delivery_tag))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return
        channel.basic_ack(method.delivery_tag)
        handled()

    tasks: set[asyncio.Task[None]] = set()
    if scenario == "publish":
        yield publishing
    elif scenario == "request":
        yield await pika_requests(url, queue)
    else:
        channel.basic_consume(queue, take)
        yield None


async def pika_requests(url: str, queue: str) -> Callable[[int], Awaitable[None]]:
    import pika

    asking, answering = await opened(url), await opened(url)
    decode, encode = msgspec.json.Decoder(dict[str, Any]).decode, msgspec.json.Encoder().encode
    waiting: dict[str, asyncio.Future[bytes]] = {}

    def answer(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        reply = encode({"id": decode(body)["id"]})
        known = pika.BasicProperties(correlation_id=properties.correlation_id)
        channel.basic_publish("", properties.reply_to, reply, known)
        channel.basic_ack(method.delivery_tag)

    def answered(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        waiting.pop(properties.correlation_id).set_result(body)

    answering.basic_consume(queue, answer)
    asking.basic_consume("amq.rabbitmq.reply-to", answered, auto_ack=True)

    async def requests(n: int) -> None:
        for i in range(n):
            future = waiting[str(i)] = asyncio.get_running_loop().create_future()
            properties = pika.BasicProperties(
                correlation_id=str(i), reply_to="amq.rabbitmq.reply-to"
            )
            asking.basic_publish("", queue, encode({"id": 7}), properties)
            decode(await future)

    return requests


@asynccontextmanager
async def bare(url: str, scenario: str, queue: str) -> Contender:
    """A task that awaits a coroutine for each message; one acknowledgement for all of a turn."""
    channel, loop = await opened(url), asyncio.get_running_loop()
    confirms = Confirms(await opened(url))
    encode = msgspec.json.Encoder().encode
    decode, take = handler_of(scenario)
    waiting: deque[tuple[int, bytes]] = deque()
    idle: asyncio.Future[None] | None = None
    last = 0

    def arrived(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        nonlocal idle
        waiting.append((method.delivery_tag, body))
        if idle is not None:
            idle.set_result(None)
            idle = None

    def flush() -> None:
        nonlocal last
        channel.basic_ack(last, multiple=True)
        last = 0

    async def work() -> None:
        nonlocal idle, last
        count = 0
        while True:
            if not waiting:
                idle = loop.create_future()
                await idle
            tag, body = waiting.popleft()
            await take(decode(body))
            if scenario == "publisher":
                await confirms.publish("bench.out", encode({"ok": True}))
            if not last:
                loop.call_soon(flush)
            last, count = tag, count + 1
            if count % 128 == 0:
                await asyncio.sleep(0)

    channel.basic_consume(queue, arrived)
    task = asyncio.create_task(work())
    try:
        yield None
    finally:
        task.cancel()


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, queue: str) -> None:
    from millstream import Depends, Logger
    from millstream.rabbit import RabbitMessage

    if scenario == "dict":

        @surface.subscriber(queue)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @surface.subscriber(queue)
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario == "pydantic":

        @surface.subscriber(queue)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @surface.subscriber(queue)
        async def injected(
            order: OrderModel,
            message: RabbitMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @surface.subscriber(queue)
        @surface.publisher("bench.out", persist=False)
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @surface.subscriber(queue)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}


def driving(broker: Any, scenario: str, queue: str) -> Callable[[int], Awaitable[None]] | None:
    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, queue, timeout=5)
            await answer.decode()

    async def publishing(n: int) -> None:
        await windowed(n, lambda: broker.publish({"ok": True}, queue, persist=False))

    return {"request": requests, "publish": publishing}.get(scenario)


@asynccontextmanager
async def millstream(url: str, scenario: str, queue: str) -> Contender:
    from millstream.rabbit import RabbitBroker

    broker = RabbitBroker(url)
    declare(broker, scenario, queue)
    await broker.start()
    try:
        yield driving(broker, scenario, queue)
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, queue: str) -> Contender:
    from fastapi import FastAPI

    from millstream.rabbit.fastapi import RabbitRouter

    router = RabbitRouter(url)
    declare(router, scenario, queue)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        yield driving(router.broker, scenario, queue)


@asynccontextmanager
async def faststream(url: str, scenario: str, queue: str) -> Contender:
    from faststream import Depends, Logger  # pyright: ignore[reportMissingImports]
    from faststream.rabbit import (  # pyright: ignore[reportMissingImports]
        Channel,
        RabbitBroker,
        RabbitMessage,
    )

    # Its access log (two lines a message by default) is off, so that work is compared; as many
    # messages are sent ahead as the others get (its own default is all there are).
    broker = RabbitBroker(url, logger=log, default_channel=Channel(prefetch_count=PREFETCH))
    if scenario == "dict":

        @broker.subscriber(queue)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @broker.subscriber(queue)
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario == "pydantic":

        @broker.subscriber(queue)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @broker.subscriber(queue)
        async def injected(
            order: OrderModel,
            message: RabbitMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @broker.subscriber(queue)
        @broker.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @broker.subscriber(queue)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    await broker.start()
    try:
        yield driving(_Peer(broker), scenario, queue)
    finally:
        await broker.stop()


class _Peer:
    """FastStream's broker under the arguments that are used here."""

    def __init__(self, broker: Any) -> None:
        self.broker = broker

    def publish(self, body: Any, queue: str, *, persist: bool) -> Awaitable[Any]:
        return self.broker.publish(body, queue, persist=persist)  # type: ignore[no-any-return]

    async def request(self, body: Any, queue: str, *, timeout: float) -> Any:
        return await self.broker.request(body, queue, timeout=timeout)


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "bare": bare,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
}
