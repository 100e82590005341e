"""MQTT: topics of QoS 0 with every kind of handler, a session of QoS 1."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, closing
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
from millstream.embedded import EmbeddedMosquitto

PACKAGES = ["mqttium"]
#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "publisher": "a `dict`, publishes a `dict`, QoS 0",
    "request": "request and reply, both sides",
    "session": "session, QoS 1: a `dict`, acknowledged",
    "model": "session, QoS 1: a pydantic model, acknowledged",
}
#: Those of QoS 1.
SESSIONS = ("session", "model")
NAMES = {
    "raw": "our client alone",
    "mqttium": "mqttium alone",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
}
MANY, REQUESTS = 30_000, 2_000
#: Unacknowledged messages that the server sends.
HELD = 500


class Wire:
    """A client of MQTT 3.1.1 that only sends: prepared bytes on a socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._answers = self._socket.makefile("rb")
        self._socket.sendall(b"\x10\x10\0\4MQTT\4\2\0\0\0\4wire")
        assert self._answers.read(4) == b"\x20\2\0\0"

    def send(self, topic: str, qos: int, times: int) -> None:
        """Send ORDER so often; returns when the server has taken all of them."""
        name = topic.encode()
        body = len(name).to_bytes(2) + name + (b"\0\1" if qos else b"") + ORDER
        length = bytes((len(body) & 127 | 128, len(body) >> 7))
        stream = (bytes((0x30 | qos << 1,)) + length + body) * times + b"\xc0\0"
        sender = threading.Thread(target=self._socket.sendall, args=(stream,))
        sender.start()
        for _ in range(times if qos else 0):
            assert self._answers.read(4) == b"\x40\2\0\1"
        assert self._answers.read(2) == b"\xd0\0"
        sender.join()

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class Mqtt(Section):
    """On a mosquitto; messages are sent by a socket that writes prepared bytes."""

    def __init__(self, url: str, peer: str | None, rounds: int, scale: float) -> None:
        super().__init__("mqtt", url, peer, rounds, scale)
        self.wire = Wire(int(url.rpartition(":")[2]))

    def run(self, scenario: str) -> Rows:
        """All contenders of one scenario."""
        names = self.contenders("raw", "mqttium", "millstream", "fastapi", "faststream")
        if importlib.util.find_spec("mqttium") is None:
            names.remove("mqttium")
        if scenario == "request":
            return self.turns(scenario, names, REQUESTS, None)

        def feed(address: str, n: int) -> None:
            self.wire.send(address, int(scenario in SESSIONS), n)

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
    with tempfile.TemporaryDirectory() as folder, EmbeddedMosquitto(0, store=folder) as server:
        bench = Mqtt(server.url, peer, rounds, scale)
        with closing(bench.wire):
            results = {}
            for scenario in CORE:
                progress(f"mqtt: {scenario}")
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


# Raw clients: the same decoder, the same discipline, and nothing around them


async def take(order: Any) -> None:
    handled()


async def take_all(order: OrderModel, raw: Any, logger: Any, who: str) -> None:
    handled()


def handler(
    scenario: str, publish: Callable[[str, bytes], Any]
) -> Callable[[Any, Any], Awaitable[None]]:
    """What is done with a message and its body."""
    encode = msgspec.json.Encoder().encode
    as_dict = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct = msgspec.json.Decoder(Order).decode
    as_model = OrderModel.__pydantic_validator__.validate_json

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

    qos = int(scenario in SESSIONS)
    arrived: asyncio.Queue[Incoming] = asyncio.Queue()
    replies: asyncio.Queue[Incoming] = asyncio.Queue()
    replies_to = f"{address}.replies"
    encode = msgspec.json.Encoder().encode
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

    async def publish(topic: str, body: bytes, qos: int = 0) -> None:
        await outbox.publish(topic, body, qos, False, b"\0", 5.0)

    handle = handler(scenario, publish)

    async def loop() -> None:
        while True:
            message = await arrived.get()
            await handle(message, message.payload)
            if message.mid and reader.connection is not None:
                reader.connection.write(b"\x40\2" + message.mid.to_bytes(2))

    async def requests(n: int) -> None:
        await outbox.ask(lambda mid: write_subscribe(5, mid, [(replies_to, 0)]))
        for _ in range(n):
            await publish(address, encode({"id": 7, "reply": replies_to}))
            msgspec.json.decode((await replies.get()).payload)

    task = asyncio.create_task(loop())
    try:
        yield requests if scenario == "request" else None
    finally:
        task.cancel()
        await asyncio.wait([task])
        await reader.close()
        await outbox.close()


@asynccontextmanager
async def mqttium(url: str, scenario: str, address: str) -> Contender:
    from mqttium import MQTTProtocolVersion  # pyright: ignore[reportMissingImports]
    from mqttium.api import AsyncClient  # pyright: ignore[reportMissingImports]

    qos, replies_to = int(scenario in SESSIONS), f"{address}.replies"
    encode = msgspec.json.Encoder().encode

    def client(name: str, **options: Any) -> Any:
        return AsyncClient(name, protocol=MQTTProtocolVersion.MQTTv5, **options)

    # As with us, whoever publishes has a connection of its own.
    reader = client(f"in-{address}", manual_ack=bool(qos), max_inbound_inflight=HELD)
    sender = client(f"out-{address}")
    port = int(url.rpartition(":")[2])
    await reader.connect("127.0.0.1", port)
    await sender.connect("127.0.0.1", port)
    await reader.subscribe(address, qos=qos)
    handle = handler(scenario, sender.publish)

    async def loop() -> None:
        async for message in reader.messages():
            await handle(message, message.payload)
            if qos:
                await reader.ack(message)

    async def requests(n: int) -> None:
        await sender.subscribe(replies_to, qos=0)
        replies = sender.messages()
        for _ in range(n):
            await sender.publish(address, encode({"id": 7, "reply": replies_to}))
            msgspec.json.decode((await anext(replies)).payload)

    task = asyncio.create_task(loop())
    try:
        yield requests if scenario == "request" else None
    finally:
        task.cancel()
        await asyncio.wait([task])
        await reader.disconnect()
        await sender.disconnect()


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, address: str) -> None:
    from millstream import Depends, Logger
    from millstream.mqtt.annotations import MqttMessage

    source: dict[str, Any] = {"qos": 0}
    if scenario in SESSIONS:
        source = {"qos": 1, "session": address, "receive_maximum": HELD}
    subscriber = surface.subscriber(address, **source)
    if scenario in ("dict", "session"):

        @subscriber
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @subscriber
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario in ("pydantic", "model"):

        @subscriber
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @subscriber
        async def injected(
            order: OrderModel,
            message: MqttMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @subscriber
        @surface.publisher("bench.out", qos=0)
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
            answer = await broker.request({"id": 7}, address, timeout=5, qos=0)
            await answer.decode()

    return requests


@asynccontextmanager
async def millstream(url: str, scenario: str, address: str) -> Contender:
    from millstream.mqtt import MqttBroker

    broker = MqttBroker(url)
    declare(broker, scenario, address)
    await broker.start()
    try:
        yield requesting(broker, address) if scenario == "request" else None
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, address: str) -> Contender:
    from fastapi import FastAPI

    from millstream.mqtt.fastapi import MqttRouter

    router = MqttRouter(url)
    declare(router, scenario, address)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        yield requesting(router.broker, address) if scenario == "request" else None


@asynccontextmanager
async def faststream(url: str, scenario: str, address: str) -> Contender:
    from faststream import AckPolicy, Depends, Logger  # pyright: ignore[reportMissingImports]
    from faststream.mqtt import (  # pyright: ignore[reportMissingImports]
        MQTTBroker,
        MQTTMessage,
        QoS,
    )

    # Its access log (two lines a message by default) is off, so that work is compared.
    # Without receive_maximum: its client ends the connection of a session under load with one.
    broker = MQTTBroker(url, logger=log)
    source: dict[str, Any] = {"qos": QoS.AT_MOST_ONCE}
    if scenario in SESSIONS:
        source = {"qos": QoS.AT_LEAST_ONCE, "ack_policy": AckPolicy.REJECT_ON_ERROR}
    subscriber = broker.subscriber(address, **source)
    if scenario in ("dict", "session"):

        @subscriber
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @subscriber
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario in ("pydantic", "model"):

        @subscriber
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @subscriber
        async def injected(
            order: OrderModel,
            message: MQTTMessage,
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

    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, address, timeout=5)
            await answer.decode()

    await broker.start()
    try:
        yield requests if scenario == "request" else None
    finally:
        await broker.stop()


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "mqttium": mqttium,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
}
