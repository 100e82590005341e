"""Redis in memory, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from ..driver import Spec
from ..memory import MemoryDriver
from ..memory.bus import Delivery, Source
from ..message import Message
from ..testing import Bs, TestBroker
from .driver import LARGEST, literal
from .message import STREAM, Entry, RedisChannelMessage
from .options import SYNTAX, RedisPublish, RedisSubscription, plain_name, split


class MemoryEntry(Entry):
    """A message of Redis, as the bus delivers it."""

    delivery: Delivery | None = None


class RedisMemoryDriver(MemoryDriver):
    """Topics in memory with the rules of Redis: channels and patterns, lists, streams, groups."""

    name: ClassVar[str] = "redis"
    syntax: ClassVar = SYNTAX
    command: ClassVar = RedisPublish
    envelope: ClassVar[type[Message[Any]]] = RedisChannelMessage
    max_payload = LARGEST
    counts_listeners = True

    def source(self, spec: Any) -> Source:
        assert isinstance(spec, RedisSubscription)
        address, stream = spec.destination, spec.stream_sub
        if stream is not None:
            new = stream.last_id in ("$", ">") or (stream.group or stream.last_id) is None
            return Source(
                patterns=(address,),
                kept=address,
                durable=f"{address}/{stream.group}" if stream.group is not None else "",
                ack_wait=stream.ack_wait if spec.acknowledged else None,
                replay="none" if new else "all",
            )
        if (list_ := spec.list_sub) is not None:
            return Source(
                patterns=(address,), durable=address, ack_wait=list_.ack_wait, replay="all"
            )
        channel = spec.channel_sub
        if channel is not None and not channel.is_pattern:
            address = "".join(f"\\{c}" if c in "*?[]\\" else c for c in address)
        return Source(patterns=(address,))

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        record = delivery.record
        kind, name = split(record.destination)
        headers = dict(record.headers)
        if record.reply_to:
            headers["reply_to"] = record.reply_to
        return MemoryEntry(
            name,
            record.body,
            b"%d-%d" % (record.timestamp * 1000, record.sequence) if kind == "stream" else b"",
            headers or None,
            delivery.count,
            delivery.marked,
            delivery.unusual,
            delivery=delivery,
        )

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            if spec.destination.startswith(STREAM):
                self.bus.keep(spec.destination, [SYNTAX.compile(spec.destination)])
        await super().declare(specs)

    async def publish(
        self, command: RedisPublish, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        if command.pipeline is not None:
            self.only_real("pipeline=")
        taken = await self._send(command, command.destination, data, headers, command.reply_to)
        if command.destination.startswith(STREAM):
            return f"{int(self.clock.wall() * 1000)}-{self.bus.sequence}"
        return taken

    def letters_at(self, spec: Any, name: str | None) -> str:
        return STREAM + (plain_name(name) if name else f"{literal(spec.destination)}.dlq")

    @property
    def client(self) -> NoReturn:
        self.only_real("redis-py's client")


class TestRedisBroker(TestBroker[*Bs]):
    """Runs a Redis broker in memory, as :class:`~millstream.testing.TestBroker` tells.

    Channels and patterns, lists, streams, groups and their settlement follow Redis's rules.
    redis-py's client and its pipelines need ``with_real=True``.
    """

    __test__ = False
    memory: ClassVar[type[MemoryDriver]] = RedisMemoryDriver
