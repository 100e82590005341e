"""Messages of RabbitMQ, as handlers see them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
from pika.spec import Basic, BasicProperties

from ..ack import Settlement
from ..errors import CapabilityError
from ..letters import REPLAY_TO
from ..message import BatchMessage, Message

#: How often a message was delivered before it was published anew, which begins a new count.
DELIVERIES = "x-ms-deliveries"
#: Where a message that was published anew was sent to in the first place.
EXCHANGE, ROUTING_KEY = "x-ms-exchange", "x-ms-routing-key"
#: Headers of the server and of this driver that say something of one way through the broker.
CONTROL = (
    *("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"),
    *("x-stream-offset", DELIVERIES, ROUTING_KEY),
)
#: Headers that are properties on the wire, and these properties' names.
PROPERTIES = {
    "content-type": "content_type",
    "content-encoding": "content_encoding",
    "correlation_id": "correlation_id",
    "message_id": "message_id",
    "message_type": "type",
}
#: Headers of messages that need a second look.
_UNUSUAL = frozenset({REPLAY_TO, DELIVERIES, "x-death"})
_EMPTY: dict[str, Any] = {}


class Delivery(msgspec.Struct, gc=False):
    """What pika hands over.

    Fields:
        channel: pika's channel; a message is settled on it, or not at all.
        method: how it came (``delivery_tag``, ``redelivered``, ``exchange``, ``routing_key``).
        properties: content type, headers and the like.
        body: the bytes.
        queue: the queue it was read from.
    """

    channel: Any
    method: Basic.Deliver
    properties: BasicProperties
    body: bytes
    queue: str = ""


def table(raw: Delivery) -> dict[str, Any]:
    """The headers as they are on the wire; empty if there are none."""
    found: Any = raw.properties.headers
    return found or _EMPTY


class RabbitMessage(Message[Delivery]):
    """A message of a queue or a stream; ``raw`` holds what pika delivered."""

    __slots__ = ("_headers",)
    # Quorum queues add a header to each message, so that it tells nothing that there are any.
    marked: ClassVar[Any] = property(
        lambda self: (h := self.raw.properties.headers) is not None and REPLAY_TO in h
    )

    @property
    def body(self) -> bytes:
        return self.raw.body

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers as text, and the content type, the ids and the kind with them.

        A header of another type is written out; tables and lists (such as ``x-death``) are in
        ``raw.properties.headers`` only.
        """
        try:
            return self._headers
        except AttributeError:
            self._headers: dict[str, str] = headers_of(self.raw.properties)
            exchange = self.exchange
            if exchange:
                self._headers[EXCHANGE] = exchange
            else:
                self._headers.pop(EXCHANGE, None)
            return self._headers

    @property
    def destination(self) -> str:
        """The routing key that it was sent with."""
        key = table(self.raw).get(ROUTING_KEY)
        return self.raw.method.routing_key if key is None else str(key)

    @property
    def exchange(self) -> str:
        """The exchange that it was sent to; an empty string is the default one."""
        headers = table(self.raw)
        if ROUTING_KEY in headers:
            return str(headers.get(EXCHANGE, ""))
        return self.raw.method.exchange or ""

    @property
    def queue(self) -> str:
        """The queue that it was read from."""
        return self.raw.queue

    @property
    def reply_to(self) -> str:
        return self.raw.properties.reply_to or ""

    @property
    def content_type(self) -> str | None:
        found: str | None = self.raw.properties.content_type
        return found

    @property
    def message_id(self) -> str:
        return self.raw.properties.message_id or super().message_id

    @property
    def correlation_id(self) -> str:
        if self._correlation_id is None:
            self._correlation_id = self.raw.properties.correlation_id
        return super().correlation_id

    @property
    def known_correlation_id(self) -> str | None:
        found: str | None = self._correlation_id or self.raw.properties.correlation_id
        return found

    @property
    def priority(self) -> int:
        """Its priority; 0 where the sender gave none."""
        return self.raw.properties.priority or 0

    @property
    def delivery_count(self) -> int:
        raw = self.raw
        return deliveries_before(raw.method.redelivered, raw.properties.headers, raw.queue) + 1

    @property
    def unusual(self) -> bool:
        raw = self.raw
        headers: Any = raw.properties.headers
        return bool(raw.method.redelivered or (headers and not headers.keys().isdisjoint(_UNUSUAL)))

    @property
    def timestamp(self) -> datetime | None:
        stamp = self.raw.properties.timestamp
        return None if stamp is None else datetime.fromtimestamp(stamp, UTC)


class RabbitStreamMessage(RabbitMessage):
    """A message of a stream, which keeps it whether it was handled or not."""

    __slots__ = ()

    @property
    def offset(self) -> int:
        """Its number in the stream."""
        return int(table(self.raw).get("x-stream-offset", 0))

    @property
    def delivery_count(self) -> int:
        return 1


#: A handler's list of messages; each of them is a :class:`RabbitMessage`.
RabbitBatchMessage = BatchMessage


def settlement(how: Settlement, options: Mapping[str, Any]) -> Settlement:
    """What ``requeue=`` makes of a settlement.

    Raises:
        CapabilityError: it is meant for other messages as well.
    """
    if options.get("multiple"):
        raise CapabilityError(
            "multiple=True settles messages that others may be working on",
            fix="settle each message; what follows each other goes out as one frame",
        )
    if how is Settlement.ACK or options.get("requeue") is None:
        return how
    return Settlement.NACK if options["requeue"] else Settlement.REJECT


def deliveries_before(redelivered: bool, headers: Any, queue: str) -> int:
    """How often a message was delivered before this time.

    Quorum queues count (``x-delivery-count``); other queues only tell whether it was delivered
    at all. What was published anew for a retry carries its count along. Where a queue sends
    rejected messages round in a circle of its own, ``x-death`` counts the rounds.
    """
    if not headers:
        return 1 if redelivered else 0
    before = int(headers.get(DELIVERIES, 0))
    counted = headers.get("x-delivery-count")
    if counted is not None:
        before += int(counted)
    elif redelivered:
        before += 1
    for death in headers.get("x-death") or ():
        if death.get("queue") == queue and death.get("reason") == "rejected":
            before += int(death.get("count", 0))
    return before


def headers_of(properties: BasicProperties) -> dict[str, str]:
    """Headers and text properties as one mapping."""
    found: dict[str, str] = {}
    for name, value in (properties.headers or _EMPTY).items():
        if type(value) is str:
            found[name] = value
        elif isinstance(value, bytes):
            found[name] = value.decode("utf-8", "replace")
        elif not isinstance(value, dict | list):
            found[name] = str(value)
    for name, field in PROPERTIES.items():
        value = getattr(properties, field)
        if value is not None:
            found[name] = value
    return found
