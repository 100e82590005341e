"""What can be said about a RabbitMQ subscription, a publication and one message."""

from __future__ import annotations

import enum
import re
from datetime import datetime, timedelta
from typing import Any

import msgspec
from pika.data import encode_table

from ..address import AddressSyntax
from ..checks import caller
from ..driver import Bindings, Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import CapabilityError, SetupError
from ..message import Message
from .connection import UNWRITABLE
from .message import RabbitMessage, RabbitStreamMessage

#: `*` is one word, `#` any number of them, none included (rabbitmq.com, Topic exchanges).
SYNTAX = AddressSyntax(separator=".", one="*", rest="#", rest_empty=True, rest_anywhere=True)
#: Bytes of a name (AMQP 0-9-1, short strings).
_LONGEST = 255
#: What to write instead of ``immediate=True``.
NOT_IMMEDIATE = "RabbitMQ has no such publications; expiration=0 lets nothing wait in a queue"
#: Where a stream can be read from, besides a number and a time (rabbitmq.com, Streams).
_OFFSET = re.compile(r"first|last|next|\d+[YMDhms]")


def typed(owner: str, name: str, value: Any, kind: Any) -> Any:
    """A value as its option has it; text may stand for a number or a member of an enumeration.

    Raises:
        SetupError: it is of another type.
    """
    try:
        found = msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        wanted = re.sub(r"\w[\w.]*\.(?=\w)|<\w+ '|'>", "", str(kind))
        text = f"{owner}: {name}={value!r} is {type(value).__name__}, not {wanted}"
        if isinstance(value, str):  # no duration, or no member of an enumeration
            text = f"{owner}: {name}={value!r} is not {wanted}"
        raise SetupError(text, code="MS121", where=caller()) from error
    if isinstance(value, dict):
        _check_table(f"{owner}: {name}", value)
    return found


class _Typed(msgspec.Struct, frozen=True):
    """Settings whose types are looked at when they are written."""

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            value = typed(type(self).__name__, field.name, value, field.type)
            msgspec.structs.force_setattr(self, field.name, value)


class QueueType(enum.StrEnum):
    """How the server keeps a queue."""

    #: On one node.
    CLASSIC = "classic"
    #: Replicated and always durable; counts deliveries.
    QUORUM = "quorum"
    #: A log that is read from any place and keeps what was read.
    STREAM = "stream"


class ExchangeType(enum.StrEnum):
    """How an exchange chooses queues; the last three need a plugin of the server."""

    DIRECT = "direct"
    FANOUT = "fanout"
    TOPIC = "topic"
    HEADERS = "headers"
    X_DELAYED_MESSAGE = "x-delayed-message"
    X_CONSISTENT_HASH = "x-consistent-hash"
    X_MODULUS_HASH = "x-modulus-hash"


class RabbitExchange(_Typed, frozen=True):
    """An exchange.

    Fields:
        name: its name; empty, or ``default``, is the default exchange, which leads to the queue
            named by the routing key.
        type: how it chooses queues.
        durable: whether it outlives a restart of the server.
        auto_delete: whether it ends with its last binding.
        declare: create it; False if it must exist already.
        arguments: further settings, such as ``alternate-exchange``.
        timeout: accepted for callers of other frameworks; the server is given 10 s.
        robust: declare it again after each reconnect.
        bind_to: another exchange that it gets messages from.
        bind_arguments: arguments of that binding, for a headers exchange.
        routing_key: the key of that binding.
    """

    name: str = ""
    type: ExchangeType = ExchangeType.DIRECT
    durable: bool = True
    auto_delete: bool = False
    declare: bool = True
    arguments: dict[str, Any] | None = None
    timeout: float | None = None
    robust: bool = True
    bind_to: RabbitExchange | None = None
    bind_arguments: dict[str, Any] | None = None
    routing_key: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length("exchange", self.name)

    @property
    def wire_name(self) -> str:
        """The name, as the server knows it."""
        return "" if self.name == "default" else self.name


class RabbitQueue(_Typed, frozen=True):
    """A queue.

    Fields:
        name: its name. Each subscription reads a queue; those that name the same one share its
            messages.
        queue_type: how the server keeps it. None takes a queue that is there as it is, and
            otherwise makes a quorum queue, or a classic one where the other options need that.
        durable: whether it outlives a restart of the server.
        exclusive: only for this connection, and gone with it.
        declare: create it; False if it must exist already.
        auto_delete: gone with its last consumer.
        arguments: further settings, such as ``x-max-length`` or ``x-dead-letter-exchange``.
        timeout: accepted for callers of other frameworks; the server is given 10 s.
        robust: declare it again after each reconnect.
        bind_arguments: arguments of its binding, for a headers exchange.
        routing_key: the key of its binding, such as ``orders.{region}``; the name by default.
    """

    name: str
    queue_type: QueueType | None = None
    durable: bool = True
    exclusive: bool = False
    declare: bool = True
    auto_delete: bool = False
    arguments: dict[str, Any] | None = None
    timeout: float | None = None
    robust: bool = True
    bind_arguments: dict[str, Any] | None = None
    routing_key: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length("queue", self.name)
        said = (self.arguments or {}).get("x-queue-type", self.kind.value)
        if said != self.kind.value:
            raise SetupError(
                f"{self.name!r} is a {self.kind.value} queue by queue_type, and {said!r} by "
                "x-queue-type",
                fix="leave out one of them",
            )
        if self.kind is not QueueType.CLASSIC and (
            self.exclusive or self.auto_delete or not self.durable
        ):
            raise SetupError(
                f"{self.name!r}: a {self.kind.value} queue is durable and shared",
                fix="leave out durable, exclusive and auto_delete, or use QueueType.CLASSIC",
            )

    def routing(self) -> str:
        """The routing key as the server is told it."""
        return SYNTAX.compile(self.routing_key).pattern if self.routing_key else self.name

    def add_prefix(self, prefix: str) -> RabbitQueue:
        """The same queue under a router's prefix."""
        key = prefix + self.routing_key if self.routing_key else ""
        return msgspec.structs.replace(self, name=prefix + self.name, routing_key=key)

    @property
    def kind(self) -> QueueType:
        """The type that is made where there is none yet."""
        if self.queue_type is not None:
            return self.queue_type
        said = (self.arguments or {}).get("x-queue-type")
        if said is not None:
            return QueueType(typed("RabbitQueue", "x-queue-type", said, QueueType))
        classic = self.exclusive or self.auto_delete or not self.durable
        if classic or "x-max-priority" in (self.arguments or {}):
            return QueueType.CLASSIC
        return QueueType.QUORUM

    @property
    def as_it_is(self) -> bool:
        """Whether a queue of this name is taken as it is."""
        return self.queue_type is None and not (
            self.arguments or self.exclusive or self.auto_delete or not self.durable
        )

    def settings(self) -> dict[str, Any]:
        """The arguments of its declaration."""
        return {"x-queue-type": self.kind.value, **(self.arguments or {})}


class Channel(_Typed, frozen=True):
    """How a subscription's channel behaves; each subscription has a channel of its own.

    Fields:
        prefetch_count: how many messages the server may send ahead; by default few for slow
            handlers and up to 256 for fast ones.
        global_qos: accepted for callers of other frameworks; a channel has one consumer.
        channel_number: the same; numbers are given by the client.
        publisher_confirms: the same; every publication is confirmed.
        on_return_raises: the same; a ``mandatory`` message that no queue gets is an error.
    """

    prefetch_count: int | None = None
    global_qos: bool = False
    channel_number: int | None = None
    publisher_confirms: bool = True
    on_return_raises: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ahead = self.prefetch_count
        if ahead is not None and not 1 <= ahead <= 65_535:
            raise SetupError(f"prefetch_count={ahead}", fix="1 to 65535, or leave it out")


class RabbitOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a RabbitMQ subscription, besides its queue and exchange.

    Fields:
        channel: how its channel behaves; the broker's ``default_channel`` otherwise.
        consume_args: arguments of the consumer, such as ``{"x-stream-offset": "first"}`` or
            ``{"x-priority": 10}``.
    """

    channel: Channel | None = None
    consume_args: dict[str, Any] | None = None


class RabbitSubscription(RabbitOptions, frozen=True):
    """A subscription to a queue or a stream.

    Fields:
        queue: the queue to read; it is declared where it is not there.
        exchange: the exchange that the queue gets its messages from, bound to it by the queue's
            routing key. Without one, messages are sent to the queue by its name.
    """

    queue: str | RabbitQueue
    exchange: str | RabbitExchange | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        typed(owner, "queue", self.queue, str | RabbitQueue)
        typed(owner, "exchange", self.exchange, str | RabbitExchange | None)
        typed(owner, "channel", self.channel, Channel | None)
        typed(owner, "consume_args", self.consume_args, dict[str, Any] | None)

    @property
    def source(self) -> RabbitQueue:
        """The queue, with all of its settings."""
        return self.queue if isinstance(self.queue, RabbitQueue) else RabbitQueue(self.queue)

    @property
    def binding(self) -> str:
        """The routing key that binds the queue to its exchange."""
        return SYNTAX.compile(self.destination).pattern

    def prefixed(self, prefix: str) -> RabbitSubscription:
        if isinstance(self.queue, RabbitQueue):
            return msgspec.structs.replace(self, queue=self.queue.add_prefix(prefix))
        return msgspec.structs.replace(self, queue=prefix + self.queue)

    @property
    def destination(self) -> str:
        queue = self.source
        return queue.routing_key or queue.name

    @property
    def bindings(self) -> Bindings:
        return {
            "channel": {"amqp": _of_queue(self.source)},
            "operation": {"amqp": {"ack": Capability.ACK in self.capabilities, **_AMQP}},
        }

    @property
    def streaming(self) -> bool:
        """Whether a stream is read."""
        return self.source.kind is QueueType.STREAM

    @property
    def envelope(self) -> type[Message[Any]]:
        return RabbitStreamMessage if self.streaming else RabbitMessage

    @property
    def capabilities(self) -> Capability:
        kept = Capability.PERSISTENT if self.source.durable else Capability.NOTHING
        plain = Capability.HEADERS | Capability.REPLY | kept
        if self.streaming:
            return plain
        return (
            plain
            | Capability.ACK
            | Capability.NACK
            | Capability.NACK_DELAY
            | Capability.REJECT
            | Capability.DELIVERY_COUNT
            | Capability.GROUPS
        )

    def check(self) -> None:
        queue = self.source
        if not queue.name:
            raise SetupError("a subscription without a queue", fix="name the queue to read")
        if queue.name.startswith("amq."):
            raise SetupError(f"{queue.name!r}: names that begin with amq. belong to the server")
        if queue.routing_key:
            SYNTAX.compile(queue.routing_key)
        _check_length("exchange", exchange_name(self.exchange))
        offset = (self.consume_args or {}).get("x-stream-offset")
        if offset is not None and not self.streaming:
            raise CapabilityError(
                f"{queue.name!r} is no stream, so it has no offset",
                fix="use RabbitQueue(..., queue_type=QueueType.STREAM)",
            )
        known = isinstance(offset, int | datetime | None)
        if not known and not (isinstance(offset, str) and _OFFSET.fullmatch(offset)):
            raise SetupError(
                f"x-stream-offset={offset!r}",
                fix="first, last, next, a number, a datetime, or an age such as 1h",
            )


_AMQP = {"bindingVersion": "0.3.0"}


def _of_queue(queue: RabbitQueue) -> dict[str, Any]:
    """The AsyncAPI binding of a channel that is a queue."""
    said = {
        "name": queue.name,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "autoDelete": queue.auto_delete,
    }
    return {"is": "queue", "queue": said, **_AMQP}


class RabbitMessageOptions(PublishCommand, kw_only=True):
    """Options of one published message, besides its body and where it goes.

    Fields:
        routing_key: by which the exchange chooses queues; the queue's name otherwise.
        mandatory: raise :class:`~millstream.errors.NoResponders` if no queue gets it. None, the
            default, is True on the default exchange, where a queue is named, and False elsewhere.
        immediate: accepted for callers of other frameworks; True is an error, as RabbitMQ has it.
        persist: write it to disk. None, the default, is True; but False for a request, whose
            answer nobody gets after a restart of the server.
        priority: from 0 to 255, for queues with ``x-max-priority``.
        expiration: seconds (or until when) after which a queue gives it up.
        message_id: made where there is none; the same message sent twice keeps it.
        timestamp: when it was made; seconds, or a datetime.
        message_type: what kind of message it is.
        content_encoding: such as ``gzip``.
        user_id: checked by the server to be the login's.
        app_id: the broker's ``app_id`` otherwise.
    """

    routing_key: str = ""
    mandatory: bool | None = None
    immediate: bool = False
    persist: bool | None = None
    priority: int | None = None
    expiration: float | timedelta | datetime | None = None
    message_id: str | None = None
    timestamp: float | datetime | None = None
    message_type: str | None = None
    content_encoding: str | None = None
    user_id: str | None = None
    app_id: str | None = None


class RabbitPublish(RabbitMessageOptions):
    """One message to be published.

    Fields:
        message: the body before encoding.
        queue: the queue that it goes to, or the routing key where an exchange is given.
        exchange: the exchange; the broker's ``default_exchange`` otherwise.
    """

    message: Any = None
    queue: str | RabbitQueue = ""
    exchange: str | RabbitExchange | None = None

    @property
    def destination(self) -> str:
        if self.routing_key:
            return self.routing_key
        return self.queue.routing() if isinstance(self.queue, RabbitQueue) else self.queue

    @destination.setter
    def destination(self, value: str) -> None:
        # What the core sends by itself (answers, dead letters) goes to a queue.
        self.routing_key, self.queue, self.exchange = value, "", ""

    def answer(self, message: Message[Any]) -> None:
        super().answer(message)
        self.mandatory = False  # who asked may have given up


class RabbitRequest(RabbitPublish, kw_only=True):
    """One request.

    Fields:
        message: the body before encoding.
        queue: the queue that it goes to, or the routing key where an exchange is given.
        exchange: the exchange; the broker's ``default_exchange`` otherwise.
        response_model: the type of the answer's body; without it the answer is a message.
    """

    response_model: Any = None


class RabbitPublicationOptions(PublicationSpec, frozen=True, kw_only=True):
    """Options of a declared publication; as of one message (:class:`RabbitPublish`).

    Fields:
        timeout: seconds to wait for a lost connection and for the confirmation.
    """

    routing_key: str = ""
    mandatory: bool | None = None
    immediate: bool = False
    persist: bool | None = None
    priority: int | None = None
    expiration: float | timedelta | None = None
    message_type: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    user_id: str | None = None
    app_id: str | None = None
    timeout: float | None = None


class RabbitPublication(RabbitPublicationOptions, frozen=True):
    """A declared publication.

    Fields:
        queue: the queue that messages go to, declared where it is not there; or the routing key
            where an exchange is given.
        exchange: the exchange; it is declared where it is not there.
    """

    queue: str | RabbitQueue = ""
    exchange: str | RabbitExchange | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        typed(owner, "queue", self.queue, str | RabbitQueue)
        typed(owner, "exchange", self.exchange, str | RabbitExchange | None)
        typed(owner, "expiration", self.expiration, float | timedelta | None)

    @property
    def target(self) -> RabbitQueue | None:
        """The queue that gets the messages, where no exchange stands between."""
        if self.routing_key or not self.queue:
            return None
        return self.queue if isinstance(self.queue, RabbitQueue) else RabbitQueue(self.queue)

    def prefixed(self, prefix: str) -> RabbitPublication:
        queue: str | RabbitQueue = self.queue
        if isinstance(queue, RabbitQueue):
            queue = queue.add_prefix(prefix)
        elif queue:
            queue = prefix + queue
        key = prefix + self.routing_key if self.routing_key else ""
        return msgspec.structs.replace(self, queue=queue, routing_key=key)

    @property
    def destination(self) -> str:
        if self.routing_key:
            return self.routing_key
        return self.queue.routing() if isinstance(self.queue, RabbitQueue) else self.queue

    @property
    def bindings(self) -> Bindings:
        said: dict[str, Any] = {"deliveryMode": 1 if self.persist is False else 2}
        said |= {"mandatory": self.mandatory, "priority": self.priority, "userId": self.user_id}
        operation = {key: value for key, value in said.items() if value is not None} | _AMQP
        target, exchange = self.target, self.exchange
        if exchange is None and target is not None:
            return {"channel": {"amqp": _of_queue(target)}, "operation": {"amqp": operation}}
        if not isinstance(exchange, RabbitExchange):
            exchange = RabbitExchange(exchange_name(exchange))
        channel = {
            "is": "routingKey",
            "exchange": {
                "name": exchange.wire_name,
                "type": exchange.type.value,
                "durable": exchange.durable,
                "autoDelete": exchange.auto_delete,
            },
            **_AMQP,
        }
        return {"channel": {"amqp": channel}, "operation": {"amqp": operation}}

    def check(self) -> None:
        if not self.destination and self.exchange is None:
            raise SetupError("a publisher without a queue or an exchange", fix="name one of them")
        if self.priority is not None and not 0 <= self.priority <= 255:
            raise SetupError(f"priority={self.priority}", fix="0 to 255")
        if self.immediate:
            raise SetupError("immediate=True", fix=NOT_IMMEDIATE)
        _check_length("queue", self.destination)
        _check_length("exchange", exchange_name(self.exchange))


def exchange_name(exchange: str | RabbitExchange | None) -> str:
    """The name of an exchange given either way; empty for the default one."""
    if isinstance(exchange, RabbitExchange):
        return exchange.wire_name
    return "" if exchange is None or exchange == "default" else exchange


def milliseconds(expiration: float | timedelta | datetime, now: float) -> str:
    """An expiration as it stands on the wire."""
    if isinstance(expiration, timedelta):
        seconds = expiration.total_seconds()
    elif isinstance(expiration, datetime):
        seconds = expiration.timestamp() - now
    else:
        seconds = expiration
    return str(max(round(seconds * 1000), 0))


def _check_length(kind: str, name: str) -> None:
    if len(name.encode()) > _LONGEST:
        raise SetupError(f"{name[:40]!r}...: the name of a {kind} has {_LONGEST} bytes at most")


def _check_table(what: str, table: dict[str, Any]) -> None:
    """Raise a SetupError for arguments that cannot be written."""
    try:
        encode_table([], table)
    except UNWRITABLE as error:
        raise SetupError(
            f"{what}={table!r} cannot be written",
            code="MS121",
            where=caller(),
            fix="names are texts of up to 255 bytes; values are texts, whole numbers, bools, "
            "datetimes, and lists and dicts of them",
        ) from error
