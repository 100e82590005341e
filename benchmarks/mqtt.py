"""MQTT: topics of QoS 0 with every kind of handler, a session of QoS 1."""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any, ClassVar

from benchmarks.common import FRAMEWORKS, ORDER, READING, REQUEST, Section
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
from millstream.embedded import EmbeddedMosquitto

PACKAGES = ["mqttium"]
#: Scenarios of QoS 1.
SESSIONS = ("session", "model")
#: Unacknowledged messages that the server sends.
HELD = 500


class Wire(Socket):
    """MQTT 3.1.1."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.socket.sendall(b"\x10\x10\0\4MQTT\4\2\0\0\0\4wire")
        assert self.answers.read(4) == b"\x20\2\0\0"

    def send(self, topic: str, qos: int, times: int) -> None:
        """Send ORDER so often; returns when the server has taken all of them."""
        name = topic.encode()
        body = len(name).to_bytes(2) + name + (b"\0\1" if qos else b"") + ORDER
        length = bytes((len(body) & 127 | 128, len(body) >> 7))
        with self.sending((bytes((0x30 | qos << 1,)) + length + body) * times + b"\xc0\0"):
            for _ in range(times if qos else 0):
                assert self.answers.read(4) == b"\x40\2\0\1"
            assert self.answers.read(2) == b"\xd0\0"


class Mqtt(Section):
    """On a mosquitto."""

    broker = "mqtt"
    scenarios: ClassVar = {
        **READING,
        "publisher": "a `dict`, publishes a `dict`, QoS 0",
        **REQUEST,
        "session": "session, QoS 1: a `dict`, acknowledged",
        "model": "session, QoS 1: a pydantic model, acknowledged",
    }
    names: ClassVar = {"raw": "our client alone", "mqttium": "mqttium alone", **FRAMEWORKS}

    def present(self, scenario: str) -> list[str]:
        there = importlib.util.find_spec("mqttium") is not None
        return [name for name in super().present(scenario) if name != "mqttium" or there]

    def send(self, scenario: str, address: str, n: int) -> None:
        self.sender.send(address, int(scenario in SESSIONS), n)


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedMosquitto(0, store=folder) as server,
        closing(Wire(server.url)) as wire,
    ):
        return Mqtt(wire, server.url, peer, rounds, scale).report()


# Raw clients: the same decoder, the same discipline, and nothing around them


def handler(
    scenario: str, publish: Callable[[str, bytes], Any]
) -> Callable[[Any, Any], Awaitable[None]]:
    """What is done with a message and its body."""

    async def handle(message: Any, data: bytes) -> None:
        if scenario in ("dict", "session"):
            await take(as_dict(data))
        elif scenario == "msgspec":
            await take(as_struct(data))
        elif scenario in ("pydantic", "model"):
            await take(as_model(data))
        elif scenario == "injected":
            await take_all(as_model(data), message, log, tenant())
        elif scenario == "publisher":
            await take(as_dict(data))
            await publish("bench.out", encode({"ok": True}))
        else:
            order = as_dict(data)
            await publish(order["reply"], encode({"id": order["id"]}))

    return handle


@asynccontextmanager
async def raw(url: str, scenario: str, address: str) -> Contender:
    from millstream.mqtt.broker import settings_of
    from millstream.mqtt.line import Line
    from millstream.mqtt.outbox import Outbox
    from millstream.mqtt.wire import Incoming, write_subscribe

    qos, sent = int(scenario in SESSIONS), int(scenario == "request")
    arrived: asyncio.Queue[Incoming] = asyncio.Queue()
    replies: asyncio.Queue[Incoming] = asyncio.Queue()
    replies_to = f"{address}.replies"
    settings = settings_of(url, {})

    class Reader(Line):
        receive_maximum = HELD

        def received(self, message: Incoming) -> None:
            arrived.put_nowait(message)

    outbox = Outbox(settings, f"out-{address}", lambda *_: None, print)
    outbox.take = replies.put_nowait
    reader = Reader(settings, f"in-{address}", lambda *_: None, print)
    await outbox.open()
    await reader.open()
    await reader.ask(lambda mid: write_subscribe(5, mid, [(address, qos)]))

    async def publish(topic: str, body: bytes) -> None:
        await outbox.publish(topic, body, sent, False, b"\0", 5.0)

    handle = handler(scenario, publish)

    async def loop() -> None:
        while True:
            message = await arrived.get()
            await handle(message, message.payload)
            if message.mid and reader.connection is not None:
                reader.connection.write(b"\x40\2" + message.mid.to_bytes(2))

    async def requests(n: int) -> None:
        await outbox.ask(lambda mid: write_subscribe(5, mid, [(replies_to, sent)]))
        for _ in range(n):
            await publish(address, encode({"id": 7, "reply": replies_to}))
            as_dict((await replies.get()).payload)

    try:
        async with looping(loop()):
            yield requests if scenario == "request" else None
    finally:
        await reader.close()
        await outbox.close()


@asynccontextmanager
async def mqttium(url: str, scenario: str, address: str) -> Contender:
    from mqttium import MQTTProtocolVersion  # pyright: ignore[reportMissingImports]
    from mqttium.api import AsyncClient  # pyright: ignore[reportMissingImports]

    qos, replies_to = int(scenario in SESSIONS), f"{address}.replies"
    sent = int(scenario == "request")

    def client(name: str, **options: Any) -> Any:
        return AsyncClient(name, protocol=MQTTProtocolVersion.MQTTv5, **options)

    # As with us, whoever publishes has a connection of its own.
    reader = client(f"in-{address}", manual_ack=bool(qos), max_inbound_inflight=HELD)
    sender = client(f"out-{address}")
    port = int(url.rpartition(":")[2])
    await reader.connect("127.0.0.1", port)
    await sender.connect("127.0.0.1", port)
    await reader.subscribe(address, qos=qos)
    publish = partial(sender.publish, qos=sent)
    handle = handler(scenario, publish)

    async def loop() -> None:
        async for message in reader.messages():
            await handle(message, message.payload)
            if qos:
                await reader.ack(message)

    async def requests(n: int) -> None:
        await sender.subscribe(replies_to, qos=sent)
        replies = sender.messages()
        for _ in range(n):
            await publish(address, encode({"id": 7, "reply": replies_to}))
            as_dict((await anext(replies)).payload)

    try:
        async with looping(loop()):
            yield requests if scenario == "request" else None
    finally:
        await reader.disconnect()
        await sender.disconnect()


# Millstream and FastStream


def ours(surface: Any, scenario: str, address: str) -> Any:
    options: dict[str, Any] = {"qos": 0}
    if scenario in SESSIONS:
        options = {"qos": 1, "session": address, "receive_maximum": HELD}
    subscriber = partial(surface.subscriber, address, **options)
    return subscriber, partial(surface.publisher, "bench.out", qos=0)


def faststream(url: str, scenario: str, address: str) -> Running:
    from faststream import AckPolicy  # pyright: ignore[reportMissingImports]
    from faststream.mqtt import (  # pyright: ignore[reportMissingImports]
        MQTTBroker,
        MQTTMessage,
        QoS,
    )

    # Without receive_maximum: its client ends the connection of a session under load with one.
    broker = MQTTBroker(url, logger=log)
    options: dict[str, Any] = {"qos": QoS.AT_MOST_ONCE}
    if scenario in SESSIONS:
        options = {"qos": QoS.AT_LEAST_ONCE, "ack_policy": AckPolicy.REJECT_ON_ERROR}
    subscriber = partial(broker.subscriber, address, **options)
    publisher = partial(broker.publisher, "bench.out")
    declare("faststream", MQTTMessage, scenario, subscriber, publisher)
    return alone(broker, driving(broker, scenario, address))


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "mqttium": mqttium,
    **on_millstream("Mqtt", ours, partial(driving, qos=0)),
    "faststream": faststream,
}
