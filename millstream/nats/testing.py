"""NATS in memory, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn

import msgspec
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy, PubAck, RetentionPolicy
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from ..driver import Spec
from ..errors import PublishError, SetupError
from ..memory import MemoryDriver
from ..memory.bus import Delivery, Record, Source
from ..message import Message
from ..testing import Bs, TestBroker
from .consumer import durable_name
from .message import NatsMessage
from .options import ACK_WAIT, SYNTAX, JStream, KvWatch, NatsPublish, NatsSubscription, stream_name
from .streams import letter_addresses, nowhere_else, overlap, stream_of_letters

_REPLAY = {
    DeliverPolicy.NEW: "none",
    DeliverPolicy.LAST: "last",
    DeliverPolicy.LAST_PER_SUBJECT: "latest",
}


class NatsSource(Source, frozen=True, kw_only=True):
    """A source with what its raw messages tell of it."""

    stream: str = ""
    consumer: str = ""
    watch: KvWatch | None = None
    headers_only: bool = False


class MemoryMsg(Msg):
    """nats-py's message, as the bus delivers it."""

    delivery: Delivery
    unusual: bool


class MemoryEntry(KeyValue.Entry):
    """nats-py's change of a key, as the bus delivers it."""

    delivery: Delivery


class NatsMemoryDriver(MemoryDriver):
    """Topics in memory with the rules of NATS: subjects, streams, consumers, buckets."""

    name: ClassVar[str] = "nats"
    syntax: ClassVar = SYNTAX
    command: ClassVar = NatsPublish
    envelope: ClassVar[type[Message[Any]]] = NatsMessage
    control_headers: ClassVar[str | tuple[str, ...]] = "Nats-"
    #: The server's default (docs.nats.io, Server Configuration, max_payload).
    max_payload = 1024 * 1024

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stores = MemoryStores(self)
        self._retention: dict[str, str] = {}
        self._ids: dict[tuple[str, str], int] = {}

    # What a subscription reads

    def source(self, spec: Any) -> NatsSource:
        assert isinstance(spec, NatsSubscription)
        if spec.obj is not None:
            self.only_real("obj_watch")
        stream = spec.stream_name
        if stream is None:
            return NatsSource(patterns=(spec.subject,), group=spec.queue)
        config = spec.config or ConsumerConfig()
        name = durable_name(spec, self._retention.get(stream, ""))
        policy = spec.deliver_policy or config.deliver_policy or DeliverPolicy.ALL
        watch = spec.kv
        return NatsSource(
            patterns=tuple(spec.filters) or (">",),
            durable=f"{stream}/{name}" if name is not None else "",
            ack_wait=(spec.ack_wait or ACK_WAIT) if spec.acknowledged else None,
            max_deliver=max(config.max_deliver or 0, 0),
            replay=_REPLAY.get(policy, "all") if watch is None else _watched(watch),
            kept=stream,
            stream=stream,
            consumer=name or f"ms-{id(spec):x}",
            watch=watch,
            headers_only=bool(
                spec.headers_only or (watch and (watch.headers_only or watch.meta_only))
            ),
        )

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        record = delivery.record
        reply, data = record.reply_to, record.body
        if isinstance(source, NatsSource) and source.stream:
            waiting = delivery.entry.store.ready if delivery.entry.store is not None else ()
            reply = (
                f"$JS.ACK.{source.stream}.{source.consumer}.{delivery.count}.{record.sequence}."
                f"{record.sequence}.{int(record.timestamp * 1e9)}.{len(waiting)}"
            )
            data = b"" if source.headers_only else data
            if source.watch is not None:
                entry = MemoryEntry(**_entry(record, source.watch.name))
                entry.delivery = delivery
                return entry
        msg = MemoryMsg(None, record.destination, reply, data, dict(record.headers) or None)  # type: ignore[arg-type]
        msg.delivery, msg.unusual = delivery, delivery.unusual
        return msg

    # Streams

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            stream: str | JStream | None = getattr(spec, "stream", None)
            if stream is None:
                continue
            filters = spec.filters if isinstance(spec, NatsSubscription) else [spec.destination]
            subjects = [SYNTAX.compile(subject).pattern for subject in filters]
            name = stream_name(stream)
            if isinstance(stream, JStream):
                subjects += stream.subjects or []
                if stream.retention is RetentionPolicy.WORK_QUEUE:
                    self._retention[name] = "workqueue"
            for subject in subjects:
                owner = self.owner(subject)
                if owner not in (None, name):
                    raise SetupError(
                        f"the server would refuse to create stream {name!r}: {subject!r} belongs "
                        f"to stream {owner!r}",
                        fix=f"use stream={owner!r}",
                    )
            self.bus.keep(name, [SYNTAX.compile(subject) for subject in subjects])
        await super().declare(specs)

    def owner(self, subject: str) -> str | None:
        """The stream that stores messages of a subject."""
        for name, log in self.bus.logs.items():
            if any(overlap(address.pattern, subject) for address in log):
                return name
        return None

    def letters_at(self, spec: Any, name: str | None) -> str:
        return letter_addresses(spec, name)[0]

    async def dead_letter(self, spec: Any, name: str | None, *, declare: bool = True) -> str:
        for address in letter_addresses(spec, name):
            owner = self.owner(address)
            if owner is None and declare:
                self.bus.keep(stream_of_letters(address), [SYNTAX.compile(address)])
            elif owner is not None and owner == spec.stream_name and name is None:
                continue
            return address
        raise nowhere_else(spec.stream_name)

    # Publishing

    async def publish(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None
    ) -> PubAck | None:
        headers = command.wire_headers(headers)
        owner = self.owner(command.subject)
        if not command.stored:
            await self._send(command, command.subject, data, headers, command.reply_to)
            return None
        if owner is None:
            raise PublishError(f"no stream stores {command.subject!r}: declare it with stream=")
        if command.stream and owner != stream_name(command.stream):
            raise PublishError(f"{command.subject!r} was not stored: stream= names another stream")
        if command.schedule is not None:
            self.only_real("schedule=")
        known = self._ids.get((owner, command.message_id or ""))
        if known is not None:
            return PubAck(stream=owner, seq=known, duplicate=True)
        await self._send(command, command.subject, data, headers, "")
        if command.message_id:
            self._ids[owner, command.message_id] = self.bus.sequence
        return PubAck(stream=owner, seq=self.bus.sequence, duplicate=False)

    async def _send(
        self,
        command: Any,
        destination: str,
        data: bytes,
        headers: dict[str, str] | None,
        reply_to: str,
    ) -> int:
        takers = await super()._send(command, destination, data, headers, reply_to)
        owner = self.owner(destination) if reply_to else None
        if owner is not None:  # the stream answers with its confirmation, as the server's does
            ack = msgspec.json.encode({"stream": owner, "seq": self.bus.sequence})
            await super()._send(command, reply_to, ack, None, "")
            takers += 1
        return takers

    @property
    def client(self) -> NoReturn:
        self.only_real("the client's connection")

    @property
    def js(self) -> NoReturn:
        self.only_real("the client's JetStream context")


def _watched(watch: KvWatch) -> str:
    return "all" if watch.include_history else "latest"


def _entry(record: Record, bucket: str) -> dict[str, Any]:
    return {
        "bucket": bucket,
        "key": record.destination.split(".", 2)[2],
        "value": record.body,
        "revision": record.sequence,
        "delta": 0,
        "created": datetime.fromtimestamp(record.timestamp, UTC),
        "operation": record.headers.get("KV-Operation"),
    }


class MemoryStores:
    """The key-value buckets of a driver in memory."""

    def __init__(self, driver: NatsMemoryDriver) -> None:
        self.driver = driver

    async def key_value(self, bucket: str, **settings: Any) -> MemoryKeyValue:
        address = SYNTAX.compile(f"$KV.{bucket}.>")
        self.driver.bus.keep(f"KV_{bucket}", [address])
        return MemoryKeyValue(self.driver, bucket)

    async def object_storage(self, bucket: str, **settings: Any) -> NoReturn:
        self.driver.only_real("an object store")


class MemoryKeyValue:
    """The everyday part of nats-py's ``KeyValue``."""

    def __init__(self, driver: NatsMemoryDriver, bucket: str) -> None:
        self.driver, self.bucket = driver, bucket

    def __getattr__(self, name: str) -> NoReturn:
        self.driver.only_real(f"KeyValue.{name}")

    def _records(self, key: str) -> list[Record]:
        return self.driver.bus.records(f"$KV.{self.bucket}.{key}")

    async def _write(self, key: str, value: bytes, operation: str | None = None) -> int:
        command = NatsPublish(None, f"$KV.{self.bucket}.{key}")
        headers = {"KV-Operation": operation} if operation else None
        await self.driver.publish(command, value, headers)
        return self._records(key)[-1].sequence

    async def put(self, key: str, value: bytes) -> int:
        return await self._write(key, value)

    async def get(self, key: str, revision: int | None = None) -> KeyValue.Entry:
        found = [r for r in self._records(key) if revision in (None, r.sequence)]
        if not found or found[-1].headers.get("KV-Operation"):
            raise KeyNotFoundError
        return KeyValue.Entry(**_entry(found[-1], self.bucket))

    async def create(self, key: str, value: bytes) -> int:
        try:
            await self.get(key)
        except KeyNotFoundError:
            return await self._write(key, value)
        raise KeyWrongLastSequenceError

    async def update(self, key: str, value: bytes, last: int | None = None) -> int:
        records = self._records(key)
        if last != (records[-1].sequence if records else None):
            raise KeyWrongLastSequenceError
        return await self._write(key, value)

    async def delete(self, key: str) -> bool:
        await self._write(key, b"", "DEL")
        return True

    async def purge(self, key: str) -> bool:
        await self._write(key, b"", "PURGE")
        return True

    async def keys(self) -> list[str]:
        start = f"$KV.{self.bucket}."
        last = {d: r[-1] for d, r in self.driver.bus.held.items() if d.startswith(start)}
        return [d.removeprefix(start) for d, r in last.items() if "KV-Operation" not in r.headers]


class TestNatsBroker(TestBroker[*Bs]):
    """Runs a ``NatsBroker`` in memory, as :class:`~millstream.testing.TestBroker` tells.

    Subjects, queue groups, streams, consumers and their settlement follow NATS's rules.
    Key-value buckets work by ``key_value()`` and ``kv_watch``; object stores, schedules and
    the client itself need ``with_real=True``.
    """

    __test__ = False
    memory: ClassVar[type[MemoryDriver]] = NatsMemoryDriver
