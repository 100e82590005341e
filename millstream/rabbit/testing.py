"""RabbitMQ in memory, for tests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import msgspec
from pika.spec import Basic, BasicProperties

from ..ack import Settlement
from ..address import Address
from ..driver import Driver, Spec
from ..errors import SetupError
from ..memory import MemoryDriver
from ..memory.bus import Delivery as Handed
from ..memory.bus import MemoryBus, Source
from ..message import Message
from ..testing import Bs, TestBroker
from .connection import UNWRITABLE
from .driver import properties_of
from .message import CONTROL, EXCHANGE, Delivery, RabbitMessage, settlement
from .options import (
    SYNTAX,
    ExchangeType,
    QueueType,
    RabbitExchange,
    RabbitPublication,
    RabbitPublish,
    RabbitQueue,
    RabbitSubscription,
    exchange_name,
)
from .outbox import Unroutable, unwritable

#: Where a stream is read from → which of its messages that is.
_REPLAY = {"next": "none", "first": "all", "last": "last"}


class MemoryDelivery(Delivery):
    """What pika hands over, as the bus delivers it."""

    delivery: Any = None


class Sent(msgspec.Struct, frozen=True):
    """How a message was sent: what the bus itself does not keep."""

    exchange: str
    key: str
    properties: BasicProperties


class Binding(msgspec.Struct, frozen=True):
    """What leads from an exchange to a queue, or to another exchange."""

    exchange: str
    queue: str
    target: str
    key: str
    arguments: dict[str, Any]

    def takes(self, kind: ExchangeType, key: str, headers: Mapping[str, Any]) -> bool:
        if kind is ExchangeType.FANOUT:
            return True
        if kind is ExchangeType.TOPIC:
            return SYNTAX.compile(self.key).matches(key)
        if kind is ExchangeType.HEADERS:
            match = str(self.arguments.get("x-match", "all"))
            with_x = match.endswith("-with-x")
            met = [
                name in headers and wanted in (None, headers[name])
                for name, wanted in self.arguments.items()
                if name != "x-match" and (with_x or not name.startswith("x-"))
            ]
            return any(met) if match.startswith("any") else all(met)
        return self.key == key


class RabbitBus(MemoryBus):
    """Queues with exchanges before them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, ExchangeType] = {}
        self.queues: dict[str, RabbitQueue] = {}
        self.bindings: dict[Binding, None] = {}
        #: Sequence of the bus → how the message was sent.
        self.sent: dict[int, Sent] = {}

    async def exchange(self, exchange: str | RabbitExchange | None) -> None:
        name = exchange_name(exchange)
        if not name:
            return
        if isinstance(exchange, str):
            self.kinds.setdefault(name, ExchangeType.DIRECT)
            return
        assert isinstance(exchange, RabbitExchange)
        if exchange.type.value.startswith("x-"):
            RabbitMemoryDriver.only_real(f"an exchange of the type {exchange.type.value}")
        known = self.kinds.setdefault(name, exchange.type)
        if known is not exchange.type and exchange.declare:
            raise SetupError(
                f"the exchange {name!r} is a {known.value} exchange, not {exchange.type.value}",
                fix="declare it with the settings that it has there",
            )
        if exchange.bind_to is not None:
            await self.exchange(exchange.bind_to)
            source, arguments = exchange.bind_to.wire_name, exchange.bind_arguments or {}
            self._bind(Binding(source, "", name, exchange.routing_key, _Fixed(arguments)))

    async def queue(self, queue: RabbitQueue) -> None:
        known = self.queues.setdefault(queue.name, queue)
        same = (known.kind, known.durable, known.exclusive, known.auto_delete)
        wanted = (queue.kind, queue.durable, queue.exclusive, queue.auto_delete)
        if not queue.as_it_is and queue.declare and same != wanted:
            raise SetupError(
                f"the queue {queue.name!r} is there with other settings",
                fix="declare it with the settings that it has there",
            )

    async def bind(self, spec: RabbitSubscription, exchange: str) -> None:
        arguments = _Fixed(spec.source.bind_arguments or {})
        self._bind(Binding(exchange, spec.source.name, "", spec.binding, arguments))

    def _bind(self, binding: Binding) -> None:
        self.bindings[binding] = None

    def route(self, exchange: str, key: str, headers: Mapping[str, Any]) -> list[str]:
        """The queues that get a message."""
        if not exchange:
            return [key] if key in self.queues else []
        return list(dict.fromkeys(self._through(exchange, key, headers, set())))

    def _through(
        self, exchange: str, key: str, headers: Mapping[str, Any], seen: set[str]
    ) -> Iterator[str]:
        if exchange in seen:
            return
        seen.add(exchange)
        kind = self.kinds.get(exchange, ExchangeType.DIRECT)
        for binding in self.bindings:
            if binding.exchange == exchange and binding.takes(kind, key, headers):
                if binding.queue:
                    yield binding.queue
                else:
                    yield from self._through(binding.target, key, headers, seen)


class _Fixed(dict[str, Any]):
    """Arguments as part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


class RabbitMemoryDriver(MemoryDriver):
    """Queues in memory with the rules of RabbitMQ: exchanges, bindings, streams."""

    name: ClassVar[str] = "rabbit"
    syntax: ClassVar = SYNTAX
    command: ClassVar = RabbitPublish
    envelope: ClassVar[type[Message[Any]]] = RabbitMessage
    bus_class: ClassVar[type[MemoryBus]] = RabbitBus
    bus: RabbitBus
    control_headers: ClassVar[str | tuple[str, ...]] = CONTROL
    #: The default of the newest servers (rabbitmq.com, max_message_size).
    max_payload = 16 * 1024 * 1024

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: As the real driver has it.
        self.topology = self.bus
        #: Set by :class:`TestRabbitBroker`, as the real driver has it.
        self.default_exchange: str | RabbitExchange | None = None

    # What a subscription reads

    def source(self, spec: Any) -> Source:
        assert isinstance(spec, RabbitSubscription)
        queue = spec.source
        if not spec.streaming:
            return Source(
                patterns=(queue.name,), durable=queue.name, ack_wait=math.inf, replay="all"
            )
        offset = (spec.consume_args or {}).get("x-stream-offset", "next")
        if offset not in _REPLAY:
            self.only_real(f"the stream offset {offset!r}")
        return Source(patterns=(queue.name,), kept=queue.name, replay=_REPLAY[offset])

    def compile(self, source: Source) -> list[Address]:
        # The name of a queue is no pattern.
        return [
            Address(name, name, {}, SYNTAX.separator, re.compile(re.escape(name)))
            for name in source.patterns
        ]

    def raw(self, delivery: Handed, source: Source | None) -> MemoryDelivery:
        record = delivery.record
        sent = self.topology.sent.get(record.sequence)
        if sent is None:
            sent = Sent("", record.destination, BasicProperties())
        properties = BasicProperties(**sent.properties.__dict__)
        count = delivery.count
        if count > 1:
            properties.headers = {**(properties.headers or {}), "x-delivery-count": count - 1}
        if source is not None and source.kept:
            offset = {"x-stream-offset": record.sequence}
            properties.headers = {**(properties.headers or {}), **offset}
        properties.reply_to = record.reply_to or None
        method = Basic.Deliver("memory", record.sequence, count > 1, sent.exchange, sent.key)
        queue = source.patterns[0] if source is not None else ""
        return MemoryDelivery(None, method, properties, record.body, queue, delivery=delivery)

    def settlement(self, how: Settlement, options: Mapping[str, Any]) -> Settlement:
        return settlement(how, options)

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            if isinstance(spec, RabbitSubscription | RabbitPublication):
                exchange = self.default_exchange if spec.exchange is None else spec.exchange
                await self.topology.exchange(exchange)
                name = exchange_name(exchange)
                if isinstance(spec, RabbitSubscription):
                    await self.topology.queue(spec.source)
                    if name:
                        await self.topology.bind(spec, name)
                elif spec.target is not None and not name:
                    await self.topology.queue(spec.target)
        await super().declare(specs)

    def letters_at(self, spec: Any, name: str | None) -> str:
        return name or f"{spec.source.name}.dlq"

    async def keep_letters(self, address: str) -> None:
        await self.topology.queue(RabbitQueue(address, QueueType.QUORUM))
        await super().keep_letters(address)

    # Publishing

    def route(self, command: RabbitPublish) -> str:
        """The exchange of a message."""
        given = command.exchange
        return exchange_name(self.default_exchange if given is None else given)

    async def publish(
        self, command: RabbitPublish, data: bytes, headers: dict[str, str] | None
    ) -> None:
        exchange, key = self.route(command), command.destination
        taken = await self._send(command, key, data, headers, command.reply_to)
        mandatory = not exchange if command.mandatory is None else command.mandatory
        if mandatory and not taken:
            raise Unroutable(f"nobody gets the message: there is no queue {key!r}")

    async def _send(
        self,
        command: Any,
        destination: str,
        data: bytes,
        headers: dict[str, str] | None,
        reply_to: str,
    ) -> int:
        self._check_connected()
        exchange, kept = self.route(command), dict(headers or {})
        if not command.destination and EXCHANGE in kept:  # a letter goes back where it came from
            exchange = kept.pop(EXCHANGE)
        properties = properties_of(command, kept, None, self.clock.wall)
        try:
            Basic.Publish(exchange=exchange, routing_key=destination).encode()
            properties.encode()
        except UNWRITABLE as error:
            raise unwritable(destination, error) from error
        texts = {name: str(value) for name, value in kept.items()}
        queues = self.topology.route(exchange, destination, properties.headers or {})
        if not exchange and destination in self.bus.inboxes:
            queues = [destination]
        for queue in queues or ([] if exchange else [destination]):
            await super()._send(command, queue, data, texts, reply_to)
            self.topology.sent[self.bus.sequence] = Sent(exchange, destination, properties)
        return len(queues)

    def _check_address(self, destination: str) -> None:
        """Every text is the name of a queue."""

    @property
    def publishing(self) -> NoReturn:
        self.only_real("the client's connection")


class TestRabbitBroker(TestBroker[*Bs]):
    """Runs a ``RabbitBroker`` in memory, as :class:`~millstream.testing.TestBroker` tells.

    Queues, streams, exchanges (direct, fanout, topic, headers, bound to each other) and their
    settlement follow RabbitMQ's rules. Exchange types of plugins, numeric stream offsets and the
    client itself need ``with_real=True``.
    """

    __test__ = False
    memory: ClassVar[type[MemoryDriver]] = RabbitMemoryDriver

    def _memory_driver(self, real: Driver, bus: MemoryBus) -> MemoryDriver:
        made = super()._memory_driver(real, bus)
        assert isinstance(made, RabbitMemoryDriver)
        made.default_exchange = getattr(real, "default_exchange", None)
        return made
