"""Kafka in memory, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from ..address import AddressSyntax
from ..driver import PublishCommand, Spec
from ..memory import MemoryDriver
from ..memory.bus import Delivery, Source
from ..message import Message
from ..testing import Bs, TestBroker
from .letters import left_out, letters_of
from .message import KafkaMessage, Record, RecordMetadata
from .options import SYNTAX, KafkaPublish, KafkaSubscription, Topic
from .units import unit_of

#: Bytes of the largest message, as of a server with default settings.
LARGEST = 1_048_576
#: A header of the bus that is none of Kafka's: a message's key.
_KEY = "\0key"
_NONE = "\0none"


class MemoryRecord(Record):
    """A message of Kafka, as the bus delivers it."""

    delivery: Delivery | None = None


class _Stamp:
    """What is asked of a client library's object."""

    def __init__(self, milliseconds: int) -> None:
        self.timestamp = milliseconds


class KafkaMemoryDriver(MemoryDriver):
    """Topics in memory with the rules of Kafka: each has one partition and keeps everything."""

    name: ClassVar[str] = "kafka"
    syntax: ClassVar[AddressSyntax] = SYNTAX
    command: ClassVar[type[PublishCommand]] = KafkaPublish
    envelope: ClassVar[type[Message[Any]]] = KafkaMessage
    max_payload = LARGEST

    def source(self, spec: Any) -> Source:
        assert isinstance(spec, KafkaSubscription)
        patterns = tuple(spec.destination.split(",")) if not spec.wild else (spec.destination,)
        begin = spec.auto_offset_reset or ("latest" if spec.group_id is None else "earliest")
        replay, without = "all" if begin == "earliest" else "none", tuple(left_out(spec))
        if spec.group_id is None:
            kept = spec.destination if replay == "all" else ""
            return Source(patterns=patterns, kept=kept, replay=replay, without=without)
        return Source(
            patterns=patterns,
            without=without,
            kept=spec.destination,
            durable=f"{spec.destination}/{spec.group_id}",
            ack_wait=math.inf,
            replay=replay,
        )

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        record = delivery.record
        headers = dict(record.headers)
        key, none = headers.pop(_KEY, None), headers.pop(_NONE, None)
        if record.reply_to:
            headers["reply_to"] = record.reply_to
        return MemoryRecord(
            None,
            record.destination,
            0,
            record.sequence,
            None if none else record.body,
            bytes.fromhex(key) if key is not None else None,
            [(name, value.encode()) for name, value in headers.items()] or None,
            _Stamp(int(record.timestamp * 1000)),
            delivery.count,
            0,
            delivery.marked,
            delivery.unusual,
            delivery=delivery,
        )

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            self.bus.keep(spec.destination, [SYNTAX.compile(spec.destination)])
        await super().declare(specs)

    async def publish(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> RecordMetadata:
        unit = unit_of(self)
        if unit is not None:
            unit.sends.append((command, data, headers))
            return RecordMetadata(command.destination, 0, -1)
        return await self._publish(command, data, headers)

    async def transact(self, sends: Sequence[Any]) -> None:
        """The end of a transaction outside of handlers."""
        for send in sends:
            await self._publish(*send)

    async def _publish(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> RecordMetadata:
        await self._send(
            command, command.destination, data, _with_key(command, data, headers), command.reply_to
        )
        return RecordMetadata(
            command.destination, 0, self.bus.sequence, int(self.clock.wall() * 1000)
        )

    async def request(
        self, command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        return await super().request(command, data, _with_key(command, data, headers), timeout)

    def letters_at(self, spec: Any, name: str | None) -> str:
        return name or letters_of(spec)


def _with_key(
    command: KafkaPublish, data: bytes, headers: dict[str, str] | None
) -> dict[str, str] | None:
    key = command.key
    if key is not None:
        headers = {**(headers or {}), _KEY: (key.encode() if isinstance(key, str) else key).hex()}
    if not data and command.message is None:
        headers = {**(headers or {}), _NONE: "1"}
    return headers


class TestKafkaBroker(TestBroker[*Bs]):
    """Runs a Kafka broker in memory, as :class:`~millstream.testing.TestBroker` tells.

    Topics, groups, patterns, keys, tombstones and settlement follow Kafka's rules; each topic
    has one partition. ``broker.transaction()`` publishes at its end, or nothing after an error.
    What a handler publishes is there at once, also where the broker has a ``transactional_id``.
    """

    __test__ = False
    memory: ClassVar[type[MemoryDriver]] = KafkaMemoryDriver


__all__ = ["KafkaMemoryDriver", "TestKafkaBroker", "Topic"]
