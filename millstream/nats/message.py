"""Messages of NATS, as handlers see them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from nats.aio.msg import Msg
from nats.js.api import ObjectInfo
from nats.js.kv import KeyValue

from ..ack import Settlement
from ..message import BatchMessage, Message

if TYPE_CHECKING:
    from nats.js.object_store import ObjectStore

#: A handler's list of messages; each of them is a :class:`NatsMessage`.
NatsBatchMessage = BatchMessage

_NO_HEADERS: Mapping[str, str] = {}


class NatsMessage(Message[Msg]):
    """A message of core NATS; ``raw`` is nats-py's ``Msg``."""

    __slots__ = ()
    marked: ClassVar[Any] = property(operator.attrgetter("raw.headers"))

    @property
    def body(self) -> bytes:
        return self.raw.data

    @property
    def headers(self) -> Mapping[str, str]:
        return self.raw.headers or _NO_HEADERS

    @property
    def destination(self) -> str:
        return self.raw.subject

    @property
    def reply_to(self) -> str:
        return self.raw.reply or self.headers.get("reply_to", "")

    async def ack_sync(self, timeout: float | None = None) -> bool:
        """Acknowledge, and wait until the server has written it down.

        Args:
            timeout: seconds to wait; None means the broker's ``publish_timeout``.

        Raises:
            RequestTimeout: the server did not answer; it may have taken it nevertheless.
        """
        return await self.settle(Settlement.ACK, sync=True, timeout=timeout)


class NatsStreamMessage(NatsMessage):
    """A message of a JetStream stream."""

    __slots__ = ()

    @property
    def reply_to(self) -> str:
        # The reply subject of the raw message is where the acknowledgement goes.
        return self.headers.get("reply_to", "")

    @property
    def message_id(self) -> str:
        sent = self.headers.get("Nats-Msg-Id")
        return sent if sent is not None and "message_id" not in self.headers else super().message_id

    @property
    def delivery_count(self) -> int:
        return int(ack_tokens(self.raw.reply)[2])

    #: Set by the flow that took the message, which looks at the delivery count anyway.
    unusual: ClassVar[Any] = property(operator.attrgetter("raw.unusual"))

    @property
    def sequence(self) -> int:
        """The message's number in its stream."""
        return int(ack_tokens(self.raw.reply)[3])

    @property
    def timestamp(self) -> datetime | None:
        return datetime.fromtimestamp(int(ack_tokens(self.raw.reply)[5]) / 1e9, UTC)


def ack_tokens(reply: str) -> list[str]:
    """Stream, consumer, delivery count, stream and consumer sequence, time in ns, pending.

    The reply subject of a JetStream message is ``$JS.ACK.`` and these seven, with a domain
    and an account hash before them in its newer form (ADR-15).
    """
    tokens = reply.split(".")
    return tokens[2:9] if len(tokens) == 9 else tokens[4:11]


class NatsKvMessage(Message[KeyValue.Entry]):
    """A change of a watched key; ``raw`` is nats-py's ``KeyValue.Entry``."""

    __slots__ = ()
    marked: ClassVar[Any] = None

    @property
    def body(self) -> bytes:
        return self.raw.value or b""

    @property
    def headers(self) -> Mapping[str, str]:
        return _NO_HEADERS

    @property
    def destination(self) -> str:
        return self.raw.key

    @property
    def key(self) -> bytes | None:
        return self.raw.key.encode()

    @property
    def operation(self) -> str | None:
        """``DEL`` or ``PURGE``; None for a value that was put."""
        return self.raw.operation

    @property
    def revision(self) -> int:
        """The number of this change in its bucket."""
        return self.raw.revision or 0

    @property
    def timestamp(self) -> datetime | None:
        created: Any = self.raw.created  # a datetime, whatever nats-py's annotation says
        return created if isinstance(created, datetime) else None


class NatsObjMessage(Message[ObjectInfo]):
    """A change in a watched object store; the body is the object's name."""

    __slots__ = ()
    marked: ClassVar[Any] = None

    @property
    def body(self) -> bytes:
        return self.raw.name.encode()

    @property
    def headers(self) -> Mapping[str, str]:
        return _NO_HEADERS

    @property
    def destination(self) -> str:
        return self.raw.bucket

    @property
    def content_type(self) -> str | None:
        return "text/plain"

    @property
    def storage(self) -> ObjectStore:
        """The store that changed, to read the object from."""
        driver: Any = self.link.driver
        store: ObjectStore = driver.stores.opened[f"OBJ_{self.raw.bucket}"]
        return store
