"""What can be said of a subscription to the memory broker, of a publication, and its messages."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from ..driver import Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import SetupError
from ..message import Message
from .bus import Delivery

_PLAIN = Capability.HEADERS | Capability.REPLY | Capability.GROUPS
_DURABLE = (
    Capability.ACK
    | Capability.NACK
    | Capability.NACK_DELAY
    | Capability.REJECT
    | Capability.TOUCH
    | Capability.DELIVERY_COUNT
)


class MemoryMessage(Message[Delivery]):
    """A message of the memory broker."""

    __slots__ = ()
    marked: ClassVar[Any] = property(operator.attrgetter("raw.marked"))
    unusual: ClassVar[Any] = property(operator.attrgetter("raw.unusual"))

    @property
    def body(self) -> bytes:
        return self.raw.record.body

    @property
    def headers(self) -> Mapping[str, str]:
        return self.raw.record.headers

    @property
    def destination(self) -> str:
        return self.raw.record.destination

    @property
    def reply_to(self) -> str:
        return self.raw.record.reply_to

    @property
    def delivery_count(self) -> int:
        return self.raw.count

    @property
    def timestamp(self) -> datetime | None:
        return datetime.fromtimestamp(self.raw.record.timestamp, UTC)


class MemorySubscriptionOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a subscription to the memory broker, besides its subject.

    Fields:
        durable: store messages under this name until they are acknowledged. The store is
            made when the subscription is declared, and shared by all subscriptions that
            give the same name.
        ack_deadline: seconds until an unsettled message of a durable is delivered again.
    """

    durable: str | None = None
    ack_deadline: float = 30.0


class MemorySubscription(MemorySubscriptionOptions, frozen=True):
    """A subscription to the memory broker.

    Fields:
        subject: an address such as ``orders.{region}``; ``*`` is one segment, ``>`` the rest.
        queue: subscriptions with the same queue share the messages.
    """

    address_field: ClassVar[str] = "subject"
    subject: str
    queue: str = ""

    @property
    def envelope(self) -> type[MemoryMessage]:
        return MemoryMessage

    @property
    def capabilities(self) -> Capability:
        return _PLAIN if self.durable is None else _PLAIN | _DURABLE

    @property
    def ack_wait(self) -> float | None:
        return None if self.durable is None else self.ack_deadline

    def check(self) -> None:
        if self.durable == "":
            raise SetupError("the durable has no name", fix='give one, such as durable="invoices"')
        if self.durable is not None and self.queue:
            raise SetupError(
                f"durable={self.durable!r} and queue={self.queue!r} exclude each other",
                fix="leave out queue: subscriptions with the same durable share the messages",
            )
        if self.ack_deadline <= 0:
            raise SetupError(
                f"ack_deadline={self.ack_deadline}", fix="give it in seconds, more than 0"
            )


class MemoryPublication(PublicationSpec, frozen=True):
    """A declared publication to the memory broker.

    Fields:
        subject: where the messages go.
    """

    address_field: ClassVar[str] = "subject"
    subject: str


class MemoryPublish(PublishCommand):
    """One message to the memory broker.

    Fields:
        message: the body.
        subject: where it goes.
    """

    address_field: ClassVar[str] = "subject"
    message: Any = None
    subject: str = ""


class MemoryRequest(MemoryPublish, kw_only=True):
    """One request.

    Fields:
        response_model: the type of the answer's body; the whole message without one.
    """

    response_model: Any = None
