"""Messages of Kafka, as handlers see them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ..message import BatchMessage, Message

if TYPE_CHECKING:
    from .offsets import Partition
    from .options import KafkaPublish

_NO_HEADERS: Mapping[str, str] = {}


class Record(msgspec.Struct, gc=False, eq=False):
    """One message as it was read: the raw object, whichever client read it.

    Fields:
        part: what keeps account of its partition; None where nothing is settled.
        topic: where it was sent to.
        partition: the number of its partition.
        offset: its place there.
        value: the body; None is a tombstone.
        key: its key.
        pairs: the headers as they came.
        origin: the client library's object.
        count: the number of this delivery.
        tries: the attempt that is being made, where one delivery has several.
        marked: whether it was replayed for somebody.
        unusual: that, or delivered before.
        given: whether a handler has it, or had it and did not settle it.
        done: whether it is settled for good.
        due: clock time before which it is not handled.
        unit: what was published while it was handled, in a transaction.
    """

    part: Partition | None
    topic: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    pairs: Sequence[tuple[str, bytes | None]] | None
    origin: Any
    count: int = 1
    tries: int = 0
    marked: bool = False
    unusual: bool = False
    given: bool = False
    done: bool = False
    due: float = 0.0
    unit: Any = None

    @property
    def offsets(self) -> Sequence[int]:
        """The offsets of the messages in it."""
        return (self.offset,)

    @property
    def size(self) -> int:
        """How many messages it is."""
        return 1


class Bundle(Record, gc=False, eq=False):
    """Messages of a partition that follow each other: a :class:`millstream.message.Bundle`.

    ``offset`` is that of the last one, and ``origin`` all of the client library's objects.
    """

    singles: list[Record] | None = None

    @property
    def offsets(self) -> Sequence[int]:
        return [message.offset() for message in self.origin]

    @property
    def size(self) -> int:
        return len(self.origin)

    def __len__(self) -> int:
        return len(self.origin)

    def bodies(self) -> list[bytes]:
        return [message.value() or b"" for message in self.origin]

    def apart(self) -> list[Record]:
        if self.singles is None:
            part, topic, number = self.part, self.topic, self.partition
            self.singles = [
                Record(part, topic, number, m.offset(), m.value(), m.key(), m.headers(), m)
                for m in self.origin
            ]
            for single in self.singles:
                single.given, single.done = self.given, self.done
            if part is not None:
                part.replace(self, self.singles)
        return self.singles

    def split(self, count: int) -> Bundle:
        rest = Bundle(
            self.part, self.topic, self.partition, self.offset, None, None, None,
            self.origin[count:], given=self.given,
        )  # fmt: skip
        self.origin = self.origin[:count]
        self.offset = self.origin[-1].offset()
        if self.part is not None:
            self.part.replace(self, [self, rest])
        return rest


class Send(msgspec.Struct, gc=False):
    """A message to be published; ``partition`` is -1 for that of the key, ``timestamp_ms`` 0 for
    now.
    """

    topic: str
    value: bytes | None
    key: bytes | None
    pairs: list[tuple[str, bytes]]
    partition: int
    timestamp_ms: int


def decoded(pairs: Sequence[tuple[str, bytes | None]] | None) -> Mapping[str, str]:
    """Headers as texts; of several with one name, the last."""
    if not pairs:
        return _NO_HEADERS
    return {key: (value or b"").decode("utf-8", "replace") for key, value in pairs}


class KafkaMessage(Message[Record]):
    """A message of Kafka; ``raw`` is a :class:`Record`."""

    __slots__ = ("_headers",)
    marked: ClassVar[Any] = property(operator.attrgetter("raw.marked"))
    unusual: ClassVar[Any] = property(operator.attrgetter("raw.unusual"))

    @property
    def body(self) -> bytes:
        return self.raw.value or b""

    @property
    def headers(self) -> Mapping[str, str]:
        try:
            return self._headers
        except AttributeError:
            self._headers: Mapping[str, str] = decoded(self.raw.pairs)
            return self._headers

    @property
    def destination(self) -> str:
        return self.raw.topic

    @property
    def key(self) -> bytes | None:
        return self.raw.key

    @property
    def partition(self) -> int:
        """The number of its partition."""
        return self.raw.partition

    @property
    def offset(self) -> int:
        """Its place in the partition."""
        return self.raw.offset

    @property
    def is_tombstone(self) -> bool:
        """Whether it has no body at all, which deletes its key from a compacted topic."""
        return self.raw.value is None

    @property
    def raw_message(self) -> Any:
        return self.raw.origin

    @property
    def message_id(self) -> str:
        given = self.headers.get("message_id")
        return given or f"{self.raw.topic}-{self.raw.partition}-{self.raw.offset}"

    @property
    def delivery_count(self) -> int:
        return self.raw.count

    @property
    def tries(self) -> int:
        """Attempts of this delivery; kept with the record, for the notes of its partition."""
        return self.raw.tries

    @tries.setter
    def tries(self, value: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.raw.tries = value

    @property
    def timestamp(self) -> datetime | None:
        stamp: Any = getattr(self.raw.origin, "timestamp", None)
        if callable(stamp):
            stamp = stamp()[1]  # pyright: ignore[reportIndexIssue]
        return datetime.fromtimestamp(stamp / 1000, UTC) if stamp and stamp > 0 else None

    def carry(self, command: KafkaPublish) -> None:  # type: ignore[override]
        command.key = self.raw.key


#: A handler's list of messages.
KafkaBatchMessage = BatchMessage


class RecordMetadata(msgspec.Struct, frozen=True):
    """Where a message was stored: what ``publish`` returns.

    Fields:
        topic: the topic.
        partition: the number of its partition.
        offset: its place there.
        timestamp: its time, in milliseconds since the epoch.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int = -1
