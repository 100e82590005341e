"""Messages of Redis, as handlers see them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec

from ..letters import REPLAY_TO
from ..message import BatchMessage, Message
from .formats import MAGIC, MessageFormat

#: The field of a stream's entry that holds the body; the others are headers. It is FastStream's.
DATA = b"__data__"
#: What stands before the name in the address of a stream, of a list.
STREAM, LIST = "stream://", "list://"
_NO_HEADERS: Mapping[str, str] = {}


class Entry(msgspec.Struct, gc=False):
    """What Redis delivered: the raw object of all messages.

    Fields:
        source: the name of the channel, list or stream.
        data: the body.
        id: of the entry in its stream; of an element of a list, what lies in its in-flight list.
        headers: None where there are none.
        count: the number of this delivery.
        marked: whether it was replayed for somebody.
        unusual: that, or delivered before.
    """

    source: str
    data: bytes
    id: bytes = b""
    headers: dict[str, str] | None = None
    count: int = 1
    marked: bool = False
    unusual: bool = False


def open_value(
    source: str, value: bytes, format: type[MessageFormat], id: bytes = b"", count: int = 1
) -> Entry:
    """An entry from a channel's or a list's value."""
    body, headers = format.parse(value)
    return _entry(source, body, headers, id, count)


def open_fields(
    source: str, id: bytes, fields: Sequence[bytes], format: type[MessageFormat], count: int = 1
) -> Entry:
    """An entry from a stream's fields.

    Without a field of ours it is somebody else's, and its body is a JSON object of its fields.
    """
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    found = values.pop(DATA, None)
    if found is None:
        texts = {_text(key): _text(value) for key, value in values.items()}
        return _entry(source, msgspec.json.encode(texts), {}, id, count)
    body, headers = format.parse(found)
    headers |= {_text(key): _text(value) for key, value in values.items()}
    return _entry(source, body, headers, id, count)


def is_plain(fields: Sequence[bytes]) -> bool:
    """Whether an entry is a body and nothing else, so that there is nothing to open."""
    return len(fields) == 2 and fields[0] == DATA and not fields[1].startswith(MAGIC)


def _entry(source: str, body: bytes, headers: dict[str, str], id: bytes, count: int) -> Entry:
    marked = REPLAY_TO in headers
    return Entry(source, body, id, headers or None, count, marked, marked or count > 1)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class RedisMessage(Message[Entry]):
    """A message of Redis; ``raw`` is an :class:`Entry`."""

    __slots__ = ()
    marked: ClassVar[Any] = property(operator.attrgetter("raw.marked"))
    unusual: ClassVar[Any] = property(operator.attrgetter("raw.unusual"))

    @property
    def body(self) -> bytes:
        return self.raw.data

    @property
    def headers(self) -> Mapping[str, str]:
        return self.raw.headers or _NO_HEADERS

    @property
    def destination(self) -> str:
        return self.raw.source

    @property
    def delivery_count(self) -> int:
        return self.raw.count


class RedisChannelMessage(RedisMessage):
    """A message of a channel."""

    __slots__ = ()


class RedisListMessage(RedisMessage):
    """An element of a list."""

    __slots__ = ()

    @property
    def destination(self) -> str:
        return LIST + self.raw.source


class RedisStreamMessage(RedisMessage):
    """An entry of a stream."""

    __slots__ = ()

    @property
    def destination(self) -> str:
        return STREAM + self.raw.source

    @property
    def message_id(self) -> str:
        return self.headers.get("message_id") or self.raw.id.decode()

    @property
    def timestamp(self) -> datetime | None:
        try:
            return datetime.fromtimestamp(int(self.raw.id.partition(b"-")[0]) / 1000, UTC)
        except ValueError:  # an id that its sender made up
            return None

    async def delete(self) -> bool:
        """Delete the entry from its stream; a group's acknowledgement leaves it there."""
        driver: Any = self.link.driver
        return bool(await driver.call(self.raw.source, "XDEL", self.raw.source, self.raw.id))

    def get_delivery_count(self) -> int:
        """How many times it was delivered, this time included."""
        return self.raw.count


#: The raw object under the name of other frameworks.
PubSubMessage = Entry
#: A handler's list of messages.
RedisBatchStreamMessage = RedisBatchListMessage = BatchMessage
