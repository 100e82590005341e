"""RabbitMQ: classic queues with every kind of handler, publishing with confirms, requests."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any, ClassVar

from benchmarks.common import FRAMEWORKS, ORDER, PUBLISHING, READING, REQUEST, Failed, Section
from benchmarks.common import Wire as Socket
from benchmarks.contenders import (
    Contender,
    Running,
    Work,
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

PACKAGES = ["pika"]
PREFETCH = 256


class Wire(Socket):
    """AMQP 0-9-1, in frames that pika writes."""

    def __init__(self, url: str) -> None:
        from pika import frame, spec

        super().__init__(url)
        self._frame, self._spec = frame, spec
        self._buffer = b""
        self.socket.sendall(b"AMQP\0\0\x09\x01")
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
        self.socket.sendall(self._frame.Method(channel, method).marshal())

    def _until(self, kind: type) -> None:
        while True:
            used, found = self._frame.decode_frame(self._buffer)
            if not used:
                data = self.answers.read1(65_536)
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
        with self.sending(one * n + last):
            self._until(spec.Queue.DeclareOk)


class Rabbit(Section):
    """On a RabbitMQ node."""

    broker = "rabbit"
    scenarios: ClassVar = {
        **READING,
        **PUBLISHING,
        "publish": "publishing, 100 unconfirmed",
        **REQUEST,
    }
    names: ClassVar = {
        "raw": "pika, each acknowledged",
        "bare": "pika, same acknowledgements",
        **FRAMEWORKS,
    }
    title = (
        "Classic queues, 256 messages sent ahead. CPU µs per message (median of the rounds; lower "
        "is better); *over pika* is against the loop with the same acknowledgements:"
    )
    base, unit, ratio = ("bare", "pika"), " µs", False

    def present(self, scenario: str) -> list[str]:
        """Those who drive themselves acknowledge nothing in turns of the loop."""
        names = super().present(scenario)
        return [n for n in names if n != "bare" or scenario not in ("publish", "request")]

    def prepare(self, scenario: str, addresses: list[str]) -> None:
        for queue in [*addresses, "bench.out"]:
            self.sender.declare(queue)

    def send(self, scenario: str, address: str, n: int) -> None:
        self.sender.send(address, ORDER, n)


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    from tests.servers.rabbit import RabbitServer

    with RabbitServer() as server, closing(Wire(server.url)) as wire:
        return Rabbit(wire, server.url, peer, rounds, scale).report()


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


def handler_of(scenario: str) -> tuple[Callable[[bytes], Any], Callable[[Any], Awaitable[None]]]:
    """The decoder and the handler of a scenario."""

    async def injected(order: Any) -> None:
        await take_all(order, None, log, tenant())

    decoders: dict[str, Any] = {"msgspec": as_struct, "pydantic": as_model, "injected": as_model}
    return decoders.get(scenario, as_dict), injected if scenario == "injected" else take


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
    waiting: dict[str, asyncio.Future[bytes]] = {}

    def answer(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        reply = encode({"id": as_dict(body)["id"]})
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
            as_dict(await future)

    return requests


@asynccontextmanager
async def bare(url: str, scenario: str, queue: str) -> Contender:
    """A task that awaits a coroutine for each message; one acknowledgement for all of a turn."""
    channel, loop = await opened(url), asyncio.get_running_loop()
    confirms = Confirms(await opened(url))
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
    async with looping(work()):
        yield None


# Millstream and FastStream


def work_of(broker: Any, scenario: str, queue: str) -> Work | None:
    """Requests, or publications."""

    async def publishing(n: int) -> None:
        await windowed(n, lambda: broker.publish({"ok": True}, queue, persist=False))

    return publishing if scenario == "publish" else driving(broker, scenario, queue)


def ours(surface: Any, scenario: str, queue: str) -> Any:
    publisher = partial(surface.publisher, "bench.out", persist=False)
    return partial(surface.subscriber, queue), publisher


def faststream(url: str, scenario: str, queue: str) -> Running:
    from faststream.rabbit import (  # pyright: ignore[reportMissingImports]
        Channel,
        RabbitBroker,
        RabbitMessage,
    )

    # As many messages are sent ahead as the others get (its own default is all there are).
    broker = RabbitBroker(url, logger=log, default_channel=Channel(prefetch_count=PREFETCH))
    subscriber, publisher = (
        partial(broker.subscriber, queue),
        partial(broker.publisher, "bench.out"),
    )
    declare("faststream", RabbitMessage, scenario, subscriber, publisher)
    return alone(broker, work_of(broker, scenario, queue))


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "bare": bare,
    **on_millstream("Rabbit", ours, work_of),
    "faststream": faststream,
}
