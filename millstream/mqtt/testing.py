"""MQTT in memory, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

from ..driver import Sink, SubscriptionSpec
from ..errors import NoLetters
from ..letters import Letter
from ..memory import (
    Delivery,
    Entry,
    MemoryBus,
    MemoryDriver,
    MemoryIntake,
    MemoryLetters,
    Record,
    Source,
)
from ..message import Message
from ..testing import Bs, TestBroker
from .driver import refuse_311
from .letters import dead_letters_of, letter_id
from .message import MqttMessage, properties_of
from .options import SYNTAX, MqttPublish, MqttSubscription
from .outbox import Receipt
from .wire import LARGEST, Incoming, read_variable, topic_bytes, write_properties

#: A session keeps a message until it is acknowledged: there is no deadline.
_FOREVER = 3e8


class MemoryIncoming(Incoming):
    """A message of MQTT, as the bus delivers it."""

    delivery: Delivery | None = None


class MqttSource(Source, frozen=True, kw_only=True):
    """A source with its quality of service."""

    qos: int = 0


class Kept(Record, frozen=True):
    """A retained message, as somebody gets it who subscribes later."""


class MqttMemoryDriver(MemoryDriver):
    """Topics in memory with the rules of MQTT: sessions, shared subscriptions, kept messages."""

    name: ClassVar[str] = "mqtt"
    syntax: ClassVar = SYNTAX
    command: ClassVar = MqttPublish
    max_payload = LARGEST
    v5 = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sessions: dict[int, str] = {}
        self._letters: set[str] = set()

    @property
    def _retained(self) -> dict[str, Record]:
        """Topic → the message that is kept, of all brokers on the bus."""
        kept: dict[str, Record] = self.bus.__dict__.setdefault("retained", {})
        return kept

    # Subscriptions

    def source(self, spec: Any) -> MqttSource:
        assert isinstance(spec, MqttSubscription)
        if not spec.qos:
            return MqttSource(patterns=(spec.topic,), group=spec.shared or "")
        return MqttSource(
            patterns=(spec.topic,),
            durable=self._sessions.get(id(spec), spec.filter),
            ack_wait=_FOREVER,
            replay="none",
            temporary=True,
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
            for record in [r for t, r in self._retained.items() if intake.addresses[0].matches(t)]:
                entry = Entry(record, intake.store)
                self.routed(entry)
                give = intake.take if intake.store is None else intake.store.put
                give(entry)
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

    def reply_envelope(self) -> type[Message[Any]]:
        return MqttMessage

    # Publishing

    async def publish(
        self, command: MqttPublish, data: bytes, headers: dict[str, str] | None
    ) -> Receipt | None:
        if not self.v5:
            refuse_311(command)
            headers = None
        topic, retain = command.topic, command.retain
        topic_bytes(topic)
        if topic in self._letters:
            topic, retain = f"{topic}/{letter_id()}", True
        taken = await self._send(command, topic, data, headers, command.reply_to)
        if retain and data:
            sequence, now = self.bus.sequence, self.clock.wall()
            self._retained[topic] = Kept(topic, data, dict(headers or {}), "", sequence, now)
        elif retain:
            self._retained.pop(topic, None)
        return Receipt(heard=bool(taken)) if command.qos else None

    # Dead letters

    async def dead_letter(self, spec: Any, name: str | None, *, declare: bool = True) -> str:
        address = name or dead_letters_of(spec)
        if declare:
            self._letters.add(address)
            self.bus.__dict__.setdefault("letters", set()).add(address)
        return address

    def letters(self, address: str) -> MqttMemoryLetters:
        return MqttMemoryLetters(self, address)


class MqttMemoryLetters(MemoryLetters):
    """The dead letters of one address: the retained messages below it."""

    driver: MqttMemoryDriver

    def _letters(self) -> dict[str, Record]:
        driver, start = self.driver, f"{self.address}/"
        if self.address not in driver.bus.__dict__.get("letters", ()):
            raise NoLetters(f"nothing keeps {self.address!r} in this process")
        found = {
            t.removeprefix(start): r for t, r in driver._retained.items() if t.startswith(start)
        }
        return dict(sorted(found.items()))

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        found = [pair for pair in self._letters().items() if after is None or pair[0] > after]
        for id, record in found[:limit]:
            message = MqttMessage(self.driver.raw(Delivery(Entry(record)), None), self._link)
            yield Letter(id, message, datetime.fromtimestamp(record.timestamp, UTC))

    async def count(self) -> int:
        return len(self._letters())

    async def remove(self, id: str) -> bool:
        return self.driver._retained.pop(f"{self.address}/{id}", None) is not None


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
