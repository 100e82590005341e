"""MQTT in memory, for tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..driver import Sink, Spec, SubscriptionSpec
from ..memory import MemoryDriver, MemoryLetters
from ..memory.bus import Delivery, MemoryBus, MemoryIntake, Record, Source
from ..message import Message
from ..testing import Bs, TestBroker
from .driver import refuse_311
from .letters import dead_letters_of, letter_id
from .message import MqttMessage, packed, properties_of
from .options import SYNTAX, MqttPublish, MqttSubscription, check_qos
from .outbox import Receipt
from .wire import LARGEST, Incoming, read_variable, topic_bytes, write_properties


class MemoryIncoming(Incoming):
    """A message of MQTT, as the bus delivers it."""

    delivery: Delivery | None = None


class MqttSource(Source, frozen=True, kw_only=True):
    """A source with its quality of service."""

    qos: int = 0


class Kept(Record, frozen=True):
    """A retained message, as somebody gets it who subscribes later."""


class MqttBus(MemoryBus):
    """Topics of which some have a message that is kept."""

    def __init__(self) -> None:
        super().__init__()
        #: Topic → its retained message.
        self.retained: dict[str, Kept] = {}
        #: The addresses of dead letters; each letter is a retained message below one of them.
        self.letters: set[str] = set()


class MqttMemoryLetters(MemoryLetters):
    """The dead letters of one address: the retained messages below it."""

    driver: MqttMemoryDriver
    order = str

    def records(self) -> dict[str, Record]:
        super().records()
        start, retained = f"{self.address}/", self.driver.bus.retained
        found = {t.removeprefix(start): r for t, r in retained.items() if t.startswith(start)}
        return dict(sorted(found.items()))

    async def remove(self, id: str) -> bool:
        return self.driver.bus.retained.pop(f"{self.address}/{id}", None) is not None


class MqttMemoryDriver(MemoryDriver):
    """Topics in memory with the rules of MQTT: sessions, shared subscriptions, kept messages."""

    name: ClassVar[str] = "mqtt"
    syntax: ClassVar = SYNTAX
    command: ClassVar = MqttPublish
    envelope: ClassVar[type[Message[Any]]] = MqttMessage
    bus_class: ClassVar[type[MemoryBus]] = MqttBus
    letters_class: ClassVar[type[MemoryLetters]] = MqttMemoryLetters
    bus: MqttBus
    max_payload = LARGEST
    v5 = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sessions: dict[int, str] = {}
        self._letters: set[str] = set()

    async def declare(self, specs: Sequence[Spec]) -> None:
        """Check them only: a session begins with its subscription."""
        if not self.v5:
            for spec in specs:
                refuse_311(spec)

    # Subscriptions

    def source(self, spec: Any) -> MqttSource:
        assert isinstance(spec, MqttSubscription)
        if not spec.qos:
            return MqttSource(patterns=(spec.topic,), group=spec.shared or "")
        return MqttSource(
            patterns=(spec.topic,),
            durable=self._sessions.get(id(spec), spec.filter),
            ack_wait=math.inf,
            qos=spec.qos,
        )

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> MemoryIntake:
        assert isinstance(spec, MqttSubscription)
        name, number = spec.session or spec.filter, 1
        while not spec.shared and (store := self.bus.stores.get(f"{name} {number}")):
            if not store.members:
                break
            number += 1
        name = f"{name} {number}"
        new = name not in self.bus.stores
        self._sessions[id(spec)] = name
        intake = await super().subscribe(spec, sink, lost)
        handling = spec.retained or ("new" if spec.kept else "send")
        if not spec.shared and (handling == "send" or (handling == "new" and new)):
            store = intake.store
            for record in [r for t, r in self.bus.retained.items() if store.wants(t)]:
                self.hand(record, store)
        return intake

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        record = delivery.record
        props = b""
        if record.headers or record.reply_to:
            packed = write_properties(properties_of(record.headers, record.reply_to))
            props = packed[read_variable(packed, 0)[1] :]
        qos = source.qos if isinstance(source, MqttSource) else 0
        return MemoryIncoming(
            record.destination,
            record.body,
            qos << 1 | isinstance(record, Kept),
            record.sequence % 65_535 + 1 if qos else 0,
            props,
            delivery.marked,
            delivery.count,
            delivery=delivery,
        )

    # Publishing

    async def publish(
        self, command: MqttPublish, data: bytes, headers: dict[str, str] | None
    ) -> Receipt | None:
        if not self.v5:
            refuse_311(command)
            headers = None
        topic, retain = command.topic, command.retain
        topic_bytes(topic)
        check_qos(command.qos, f"a message to {topic!r}")
        packed(command, headers)
        if topic in self._letters:
            topic, retain = f"{topic}/{letter_id()}", True
        taken = await self._send(command, topic, data, headers, command.reply_to)
        if retain and data:
            sequence, now = self.bus.sequence, self.clock.wall()
            self.bus.retained[topic] = Kept(topic, data, dict(headers or {}), "", sequence, now)
        elif retain:
            self.bus.retained.pop(topic, None)
        return Receipt(heard=bool(taken)) if command.qos else None

    # Dead letters

    def letters_at(self, spec: Any, name: str | None) -> str:
        return name or dead_letters_of(spec)

    async def keep_letters(self, address: str) -> None:
        self._letters.add(address)
        self.bus.letters.add(address)

    def keeps_letters(self, address: str) -> bool:
        return address in self.bus.letters


class TestMqttBroker(TestBroker[*Bs]):
    """Runs an MQTT broker in memory, as :class:`~millstream.testing.TestBroker` tells.

    Topic filters, sessions, shared subscriptions, retained messages and dead letters follow
    MQTT's rules; wills, expiry and the loss of a connection need ``with_real=True``.
    """

    __test__ = False
    memory: ClassVar[type[MemoryDriver]] = MqttMemoryDriver

    def _memory_driver(self, real: Any, bus: MemoryBus) -> MemoryDriver:
        driver = super()._memory_driver(real, bus)
        assert isinstance(driver, MqttMemoryDriver)
        driver.v5 = getattr(real, "v5", True)
        return driver


TestMQTTBroker = TestMqttBroker
