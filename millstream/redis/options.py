"""What can be said about a Redis subscription, a publication and one message."""

from __future__ import annotations

import functools
import re
from typing import Any, TypeVar

import msgspec

from ..address import Address, AddressSyntax, MatchedAddress
from ..driver import Batch, Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import AddressError, SetupError
from ..message import Message
from .formats import MessageFormat, check_format
from .message import (
    LIST,
    STREAM,
    RedisChannelMessage,
    RedisListMessage,
    RedisStreamMessage,
)

#: Seconds without a sign of life after which a process counts as dead.
ACK_WAIT = 15.0
#: Where reading a stream can begin.
_PLACE = re.compile(r"[$>]|\d+(-\d+)?")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class RedisSyntax(AddressSyntax, frozen=True):
    """Redis's patterns (redis.io, PSUBSCRIBE): ``*``, ``?``, ``[abc]``; names have no segments.

    A ``{placeholder}`` may stand anywhere in a channel and takes what lies between two of
    ``.``, ``:`` and ``/``.
    """

    def compile(self, template: str) -> Address:
        return _compile(template)


@functools.lru_cache(maxsize=4096)
def _compile(template: str) -> Address:
    if template.startswith((STREAM, LIST)):
        return MatchedAddress(template, template, {}, ".", re.compile(re.escape(template)))
    places: dict[str, int] = {}
    pattern, expression, at = "", "", 0
    for found in _PLACEHOLDER.finditer(template):
        name = found[1]
        if not name.isidentifier():
            raise AddressError(
                f"{template!r}: {found[0]!r} is not a placeholder",
                fix="name it as a parameter, such as orders.{region}",
            )
        if name in places:
            raise AddressError(
                f"{template!r}: {{{name}}} stands twice", fix="give each its own name"
            )
        places[name] = len(places)
        before = template[at : found.start()]
        pattern += before + "*"
        expression += _glob(before) + f"(?P<{name}>[^.:/]+)"
        at = found.end()
    pattern, expression = pattern + template[at:], expression + _glob(template[at:])
    return MatchedAddress(template, pattern, places, ".", re.compile(expression, re.DOTALL))


def _glob(text: str) -> str:
    """The regular expression of a piece of a pattern."""
    parts = re.findall(r"\\.|\[\^?[^\]]*\]|.", text, re.DOTALL)
    known = {"*": ".*", "?": "."}
    return "".join(
        known.get(p) or (p if len(p) > 1 and p[0] == "[" else re.escape(p[-1])) for p in parts
    )


SYNTAX = RedisSyntax()


class PubSub(msgspec.Struct, frozen=True):
    """A channel.

    Fields:
        channel: its name, or a pattern.
        pattern: whether it is one; a name with a ``*`` or a ``{placeholder}`` always is.
        polling_interval: accepted for callers of other frameworks; nothing is polled.
    """

    channel: str
    pattern: bool = False
    polling_interval: float = 1.0

    @property
    def is_pattern(self) -> bool:
        """Whether the server is asked for a pattern."""
        return self.pattern or "*" in self.channel or "{" in self.channel


class ListSub(msgspec.Struct, frozen=True):
    """A list that is consumed from its head.

    Fields:
        list_name: its key.
        batch: hand the handler lists.
        max_records: how many at most in a batch.
        polling_interval: seconds that a batch waits to fill after its first message.
        ack_wait: seconds without a sign of life after which a process counts as dead, and what
            it had taken goes to another one.
    """

    list_name: str
    batch: bool = False
    max_records: int = 10
    polling_interval: float = 0.1
    ack_wait: float = ACK_WAIT


class StreamSub(msgspec.Struct, frozen=True):
    """A stream.

    Fields:
        stream: its key.
        polling_interval: accepted for callers of other frameworks; reads block at the server.
        group: the consumer group; without one each process reads what is new, at most once.
        consumer: begins the name of this process in the group.
        batch: hand the handler lists.
        no_ack: a group without acknowledgements, at most once.
        last_id: where reading begins: by default a new group begins with the oldest entry, and
            a reader without a group with the next one. ``$`` is the next one, ``0`` the oldest.
        maxlen: entries that are kept about where this is what is published to.
        max_records: entries that are read at once; of a batch, its size.
        min_idle_time: only take over entries that another consumer left for so many
            milliseconds, and read none that is new.
        declare: create the group if it is not there.
        claim_min_idle_time: milliseconds after which an entry is taken over from a consumer
            that is not Millstream's, which gives no signs of life; a minute by default.
        ack_wait: seconds without a sign of life after which a process counts as dead, and its
            entries go to another one.
        max_age: seconds for which entries are kept about, instead of their number.
    """

    stream: str
    polling_interval: int | None = None
    group: str | None = None
    consumer: str | None = None
    batch: bool = False
    no_ack: bool = False
    last_id: str | None = None
    maxlen: int | None = None
    max_records: int | None = None
    min_idle_time: int | None = None
    declare: bool = True
    claim_min_idle_time: int | None = None
    ack_wait: float = ACK_WAIT
    max_age: float | None = None


class RedisOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a Redis subscription, besides its channel.

    Fields:
        list: read from a list instead.
        stream: read from a stream instead.
        message_format: how values are read where they carry headers too; envelopes are
            understood by default.
    """

    list: str | ListSub | None = None
    stream: str | StreamSub | None = None
    message_format: type[MessageFormat] | None = None


class RedisSubscription(RedisOptions, frozen=True):
    """A subscription on Redis: to a channel, a list or a stream.

    Fields:
        channel: its name, a pattern such as ``logs.{level}``, or an address such as
            ``stream://orders`` and ``list://jobs``.
    """

    channel: str | PubSub | None = None

    def __post_init__(self) -> None:
        unfold(self)
        sub = self.stream_sub or self.list_sub
        if sub is not None and sub.batch and self.batch is None:
            wait = sub.polling_interval if isinstance(sub, ListSub) else 0.1
            msgspec.structs.force_setattr(self, "batch", Batch(sub.max_records or 100, wait))

    @property
    def channel_sub(self) -> PubSub | None:
        """The channel."""
        return PubSub(self.channel) if isinstance(self.channel, str) else self.channel

    @property
    def list_sub(self) -> ListSub | None:
        """The list."""
        return ListSub(self.list) if isinstance(self.list, str) else self.list

    @property
    def stream_sub(self) -> StreamSub | None:
        """The stream."""
        return StreamSub(self.stream) if isinstance(self.stream, str) else self.stream

    @property
    def name(self) -> str:
        """The name of whichever it is, as the server knows it."""
        return plain_name(self.destination)

    # What the core asks

    def prefixed(self, prefix: str) -> RedisSubscription:
        return moved(self, prefix)

    @property
    def destination(self) -> str:
        return address_of(self.channel, self.list, self.stream)

    @property
    def envelope(self) -> type[Message[Any]]:
        if self.stream is not None:
            return RedisStreamMessage
        return RedisListMessage if self.list is not None else RedisChannelMessage

    @property
    def acknowledged(self) -> bool:
        """Whether Redis keeps a message until it is settled."""
        stream = self.stream_sub
        if stream is not None:
            return stream.group is not None and not stream.no_ack
        return self.list is not None

    @property
    def capabilities(self) -> Capability:
        can = Capability.HEADERS | Capability.REPLY
        stream = self.stream_sub
        if stream is not None:
            can |= Capability.PERSISTENT
            if stream.group is not None:
                can |= Capability.GROUPS
        if self.list is not None:
            can |= Capability.GROUPS
        if self.acknowledged:
            can |= Capability.ACK | Capability.NACK | Capability.NACK_DELAY | Capability.REJECT
            can |= Capability.DELIVERY_COUNT | Capability.TOUCH | Capability.PERSISTENT
        return can

    @property
    def ack_wait(self) -> float | None:
        sub = self.stream_sub or self.list_sub
        return sub.ack_wait if sub is not None and self.acknowledged else None

    @property
    def prefetch(self) -> int:
        stream = self.stream_sub
        if stream is not None and stream.max_records and self.batch is None:
            return max(stream.max_records, 1)
        return super().prefetch

    def check(self) -> None:
        check_place("a subscription to", self)
        SYNTAX.compile(self.destination)
        for sub in (self.stream_sub, self.list_sub):
            if sub is not None and sub.ack_wait <= 0:
                raise SetupError(f"ack_wait={sub.ack_wait}", fix="give seconds, more than 0")
        if list_ := self.list_sub:
            check_least(1, max_records=list_.max_records)
            check_least(0, polling_interval=list_.polling_interval)
        if stream := self.stream_sub:
            for option in ("consumer", "no_ack", "min_idle_time", "claim_min_idle_time"):
                if getattr(stream, option) and stream.group is None:
                    raise SetupError(f"{option} without a group", fix="name the group=")
            if stream.group is not None and not (isinstance(stream.group, str) and stream.group):
                raise SetupError(f"group={stream.group!r}", fix="give the group a name")
            check_trimming(stream.maxlen, stream.max_age)
            check_least(1, max_records=stream.max_records)
            check_least(
                0,
                min_idle_time=stream.min_idle_time,
                claim_min_idle_time=stream.claim_min_idle_time,
            )
            if stream.last_id is not None and not _PLACE.fullmatch(stream.last_id):
                raise SetupError(
                    f"last_id={stream.last_id!r}",
                    fix="give '$' (what comes), '0' (all that is there) or an entry's id",
                )
            if stream.min_idle_time is not None and stream.no_ack:
                raise SetupError("min_idle_time with no_ack", fix="leave out one of them")
            if stream.last_id == ">" and stream.group is None:
                raise SetupError("last_id='>' without a group", fix="use '$', or name the group=")


class RedisPublication(PublicationSpec, frozen=True):
    """A declared publication on Redis.

    Fields:
        channel: where the messages go, or an address such as ``stream://orders``.
        list: append to a list instead; with ``ListSub(batch=True)`` a handler returns a list, and
            each item of it is a message.
        stream: add to a stream instead.
        maxlen: entries that the stream keeps, about.
        max_age: seconds for which it keeps them, about.
        message_format: how a body and its headers become one value.
    """

    channel: str | PubSub | None = None
    list: str | ListSub | None = None
    stream: str | StreamSub | None = None
    maxlen: int | None = None
    max_age: float | None = None
    message_format: type[MessageFormat] | None = None

    def __post_init__(self) -> None:
        unfold(self)

    def prefixed(self, prefix: str) -> RedisPublication:
        return moved(self, prefix)

    @property
    def destination(self) -> str:
        return address_of(self.channel, self.list, self.stream)

    @property
    def many(self) -> bool:
        return isinstance(self.list, ListSub) and self.list.batch

    def check(self) -> None:
        check_place("a publication to", self)
        check_trimming(self.maxlen, self.max_age)
        trims = self.maxlen is not None or self.max_age is not None
        if trims and split(self.destination)[0] != "stream":
            raise SetupError(
                f"maxlen or max_age of {self.destination!r}, which is no stream",
                fix="only streams keep messages: leave it out",
            )
        channel = PubSub(self.channel) if isinstance(self.channel, str) else self.channel
        if channel is not None and channel.is_pattern:
            raise SetupError(
                f"nobody can publish to a pattern: {channel.channel!r}", fix="name a channel"
            )


class RedisPublishOptions(PublishCommand, kw_only=True):
    """Options of one published message, besides its body and channel.

    Fields:
        list: append to this list; ``publish`` returns its length.
        stream: add to this stream; ``publish`` returns the entry's id.
        maxlen: entries that the stream keeps, about.
        max_age: seconds for which it keeps them, about.
        pipeline: redis-py's pipeline to put the command into, which the caller executes.
        message_format: how a body and its headers become one value.
    """

    list: str | ListSub | None = None
    stream: str | StreamSub | None = None
    maxlen: int | None = None
    max_age: float | None = None
    pipeline: Any = None
    message_format: type[MessageFormat] | None = None


class RedisPublish(RedisPublishOptions):
    """One message to be published.

    Fields:
        message: the body before encoding.
        channel: where it goes, or an address such as ``stream://orders``.
    """

    message: Any = None
    channel: str | PubSub | None = None

    @property
    def destination(self) -> str:
        return address_of(self.channel, self.list, self.stream)

    @destination.setter
    def destination(self, value: str) -> None:
        self.channel, self.list, self.stream = value, None, None

    @property
    def trimming(self) -> tuple[int | None, float | None]:
        """How many entries the stream keeps, and for how many seconds."""
        sub = self.stream if isinstance(self.stream, StreamSub) else None
        if sub is None or self.maxlen is not None or self.max_age is not None:
            return self.maxlen, self.max_age
        return sub.maxlen, sub.max_age


class RedisRequest(RedisPublish, kw_only=True):
    """One request.

    Fields:
        message: the body before encoding.
        channel: where it goes.
        response_model: the type of the answer's body; without it the answer is a message.
    """

    response_model: Any = None


def address_of(
    channel: str | PubSub | None, list: str | ListSub | None, stream: str | StreamSub | None
) -> str:
    """The address of whichever is given; empty without any.

    Raises:
        SetupError: more than one is given, or something else than a name.
    """
    if list is None and stream is None:
        return channel if isinstance(channel, str) else _named("", channel, PubSub, "channel")
    if channel is not None or (list is not None and stream is not None):
        given = {"channel": channel, "list": list, "stream": stream}
        names = " and ".join(name for name, value in given.items() if value is not None)
        raise SetupError(f"{names} at once", fix="name exactly one of the three")
    if stream is not None:
        return (
            STREAM + stream
            if isinstance(stream, str)
            else _named(STREAM, stream, StreamSub, "stream")
        )
    return LIST + list if isinstance(list, str) else _named(LIST, list, ListSub, "list")


def _named(prefix: str, value: Any, kind: type[msgspec.Struct], option: str) -> str:
    """The address of a value that is no text."""
    if value is None:
        return prefix
    if not isinstance(value, kind):
        raise SetupError(f"{option}={value!r}", fix=f"give {option}= a name, or a {kind.__name__}")
    name = getattr(value, kind.__struct_fields__[0])
    if not isinstance(name, str):
        raise SetupError(f"{value!r} has no name", fix="a name is a text")
    return prefix + name


Declared = TypeVar("Declared", RedisSubscription, RedisPublication)


def unfold(spec: RedisSubscription | RedisPublication) -> None:
    """Let an address that says its kind be the list or stream that it names, also if both do.

    Raises:
        SetupError: another one is named as well.
    """
    channel, put = spec.channel, msgspec.structs.force_setattr
    if isinstance(channel, str) and channel.startswith((STREAM, LIST)):
        kind, name = split(channel)
        put(spec, "channel", None)
        if getattr(spec, kind) is None:
            put(spec, kind, name)
        if spec.destination != channel:
            put(spec, "channel", channel)
    address_of(spec.channel, spec.list, spec.stream)


def moved(spec: Declared, prefix: str) -> Declared:
    """The same declaration with a prefix before its name."""
    kind, name = split(spec.destination)
    place, new = getattr(spec, kind), msgspec.structs.replace
    if place is None:
        return spec
    if not isinstance(place, str):
        return new(spec, **{kind: new(place, **{place.__struct_fields__[0]: prefix + name})})
    return new(spec, **{kind: prefix + name})


def check_place(what: str, spec: RedisSubscription | RedisPublication) -> None:
    """Raise a :class:`SetupError` if a declaration names no place."""
    kind, name = split(spec.destination)
    if all(value is None for value in (spec.channel, spec.list, spec.stream)):
        raise SetupError(
            f"{what} neither channel nor list nor stream", fix="name exactly one of the three"
        )
    if not name:
        raise SetupError(f"the {kind} has no name", fix=f"name it: {kind}='orders'")
    if spec.message_format is not None:
        check_format(spec.message_format)


def check_trimming(maxlen: int | None, max_age: float | None) -> None:
    """Raise a :class:`SetupError` if a stream cannot be trimmed like that."""
    check_least(0, maxlen=maxlen, max_age=max_age)
    if maxlen is not None and max_age is not None:
        raise SetupError("maxlen and max_age at once", fix="Redis trims by one of them")


def check_least(least: float, **options: float | None) -> None:
    """Raise a :class:`SetupError` for numbers that are too small."""
    for name, value in options.items():
        if value is not None and value < least:
            raise SetupError(f"{name}={value}", fix=f"give {least} or more")


def split(address: str) -> tuple[str, str]:
    """What an address names (``channel``, ``list``, ``stream``), and by which name."""
    if address.startswith(STREAM):
        return "stream", address[len(STREAM) :]
    if address.startswith(LIST):
        return "list", address[len(LIST) :]
    return "channel", address


def plain_name(address: str) -> str:
    """The name in an address."""
    return split(address)[1]


def sibling(key: str, *suffix: str) -> str:
    """The name of a key that belongs to another one: on the same node of a cluster."""
    start = key.find("{")
    tagged = start >= 0 and key.find("}", start) > start + 1
    return ":".join((key if tagged else f"{{{key}}}", "ms", *suffix))
