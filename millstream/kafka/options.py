"""What can be said about a Kafka subscription, a publication and one message."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..address import Address, AddressSyntax, MatchedAddress
from ..driver import Batch, Bindings, Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import AddressError, SetupError
from ..message import Message
from .message import KafkaMessage
from .settings import further

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")
#: What separates the topics of one subscription in its address.
_JOINT = ","


class Topic(msgspec.Struct, frozen=True):
    """A topic.

    Fields:
        name: its name.
        num_partitions: how many it gets when it is made; the broker's default without.
        replication_factor: how many copies of each; the broker's default without.
        config: its settings when it is made, such as ``{"cleanup.policy": "compact"}``.
        declare: make it if it is not there.
    """

    name: str
    num_partitions: int | None = None
    replication_factor: int | None = None
    config: Mapping[str, str] | None = None
    declare: bool = True


class TopicPartition(msgspec.Struct, frozen=True):
    """One partition of a topic.

    Fields:
        topic: the topic's name.
        partition: its number.
        offset: where reading begins: an offset, ``-2`` for the beginning, ``-1`` for the end;
            where the group stopped, by default.
        metadata: the note of a commit.
        leader_epoch: accepted for callers of other frameworks.
        declare: make the topic if it is not there.
    """

    topic: str
    partition: int = -1
    offset: int = -1001
    metadata: str | None = None
    leader_epoch: int | None = None
    declare: bool = True


class KafkaSyntax(AddressSyntax, frozen=True):
    """Topics, and regular expressions of them.

    A ``{placeholder}`` or a ``*`` takes one part of a name between dots. An address that begins
    with ``^`` is a regular expression, in which there may be placeholders too.
    """

    def compile(self, template: str) -> Address:
        return _compile(template)


@functools.lru_cache(maxsize=4096)
def _compile(template: str) -> Address:
    raw = template.startswith("^")
    places: dict[str, int] = {}
    pattern, expression, at = "", "", 0
    for found in _PLACEHOLDER.finditer(template):
        name = found[1]
        if name in places:
            raise AddressError(
                f"{template!r}: {{{name}}} stands twice", fix="give each its own name"
            )
        before = _piece(template[at : found.start()], raw)
        if not raw and not (before.endswith(r"\.") or (at == found.start() and not at)):
            raise _not_whole(template, found[0])
        places[name] = len(places)
        pattern += before + "[^.]+"
        expression += before + f"(?P<{name}>[^.]+)"
        at = found.end()
        if not raw and template[at : at + 1] not in ("", "."):
            raise _not_whole(template, found[0])
    rest = _piece(template[at:], raw)
    pattern, expression = pattern + rest, expression + rest
    if not raw and re.search(r"[{}]", template[at:]):
        raise _not_whole(template, template[at:])
    wild = raw or bool(places) or "*" in template
    if not wild:
        names = [re.escape(name) for name in template.split(_JOINT)]
        return MatchedAddress(template, template, {}, ".", re.compile("|".join(names)))
    try:
        matcher = re.compile(expression.removesuffix("$"))
    except re.error as error:
        raise AddressError(f"{template!r} is no regular expression: {error}") from error
    # Of the whole name, with every client and protocol.
    inside = _portable(template, pattern).removeprefix("^").removesuffix("$") if raw else pattern
    pattern = f"^({inside})$" if "|" in inside else f"^{inside}$"
    return MatchedAddress(template, pattern, places, ".", matcher)


#: What is not the same in every library's regular expressions: classes and groups.
_UNLIKE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?::|P<\w+>)?")
_LETTERS = {r"\d": "0-9", r"\w": "a-zA-Z0-9_"}


def _portable(template: str, pattern: str) -> str:
    """The same for librdkafka, that knows no classes by a letter and no marks of groups."""

    def replaced(found: re.Match[str]) -> str:
        text = found[0]
        if text.startswith("["):
            inside = text[1:-1]
            if r"\-" in inside:  # a backslash is itself in there, and so is a dash at the end
                inside = inside.replace(r"\-", "") + "-"
            inside = re.sub(r"\\.", lambda m: _LETTERS.get(m[0], m[0][1:]), inside)
            return f"[{inside}]"
        if text == "(?":
            raise AddressError(
                f"{template!r}: Kafka's clients know neither flags nor looking ahead",
                fix="a group is (...) or (?:...)",
            )
        return "(" if text.startswith("(") else f"[{_LETTERS[text]}]" if text in _LETTERS else text

    return _UNLIKE.sub(replaced, pattern)


def _piece(text: str, raw: bool) -> str:
    return text if raw else re.escape(text).replace(r"\*", "[^.]+").replace(r"\-", "-")


def _not_whole(template: str, piece: str) -> AddressError:
    return AddressError(
        f"{template!r}: {piece!r} is not a placeholder",
        fix="a placeholder is a whole part between dots, such as orders.{region}",
    )


SYNTAX = KafkaSyntax()


def by_key(message: Message[Any]) -> Any:
    """For ``ordered_by=``: messages with the same key in order; without a key, in none."""
    raw = message.raw
    return raw.offset if raw.key is None else (raw.partition, raw.key)


def by_partition(message: Message[Any]) -> Any:
    """For ``ordered_by=``: the messages of each partition in order."""
    raw = message.raw
    return raw.topic, raw.partition


class KafkaOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a Kafka subscription, besides its topics.

    Fields:
        group_id: the consumer group, whose members share the partitions and whose committed
            offsets say what is done. Without one every process reads everything from now on, and
            nothing is settled.
        pattern: instead of topics: a regular expression of their whole names, with
            ``{placeholders}``. The topic of its own dead letters is never among them; with
            ``group_protocol="consumer"`` a pattern that takes it is an error.
        partitions: instead of topics: these partitions, whoever else reads them.
        ordered_by: as everywhere, and ``by_key`` (the default of a concurrent subscription) or
            ``by_partition``.
        batch: hand the handler lists; True is a :class:`Batch` of ``max_records`` and
            ``batch_timeout_ms``.
        max_records: of a batch, its size.
        batch_timeout_ms: how long a batch waits to fill after its first message.
        auto_offset_reset: where a group without committed offsets begins, ``earliest`` by default;
            or a reader without a group, ``latest`` by default.
        auto_commit_interval_ms: between two commits of what is finished. Only ever what is
            finished without a gap is committed.
        revoke_timeout_ms: how long messages that run may take to finish when their partition goes
            to another member; what takes longer runs there again.
        transaction_size: with a ``transactional_id``: a transaction is committed when so many
            messages are handled.
        transaction_interval_ms: the same: or so long after the last one.
        window: how many messages of a partition may be read ahead of the oldest that is not done.
        group_protocol: ``classic``, or ``consumer`` for the one of KIP-848.
        partition_assignment_strategy: of the classic protocol; names, or aiokafka's classes.
        group_instance_id: makes this a static member of its group, under this name.
        client_rack: reads from replicas in this rack.
        session_timeout_ms: without a sign of life for this long a member is out of the group.
        heartbeat_interval_ms: between two signs of life.
        max_poll_interval_ms: how long the reader may be stuck before it counts as dead; handlers
            may take any time.
        max_poll_records: how many messages are taken from the client at once.
        isolation_level: ``read_committed`` leaves out what aborted transactions wrote.
        fetch_min_bytes, fetch_max_bytes, fetch_max_wait_ms, max_partition_fetch_bytes, check_crcs:
            as Kafka's consumers take them.
        on_assign, on_revoke, on_lost: called with the partitions, after they came, before they go,
            and when they are gone already.
        listener: the same as an object of aiokafka's ``ConsumerRebalanceListener``.
        exclude_internal_topics: a pattern takes none of the cluster's own topics, whose names
            begin with ``__``.
        polling_interval, consumer_timeout_ms, rebalance_timeout_ms: accepted for callers of
            other frameworks.
        config: further settings of the client library.
    """

    group_id: str | None = None
    pattern: str | None = None
    partitions: Sequence[TopicPartition] = ()
    batch: Batch | bool | None = None  # type: ignore[assignment]
    max_records: int | None = None
    batch_timeout_ms: int = 200
    auto_offset_reset: str | None = None
    auto_commit_interval_ms: int = 1000
    revoke_timeout_ms: int = 10_000
    transaction_size: int = 500
    transaction_interval_ms: int = 100
    window: int = 10_000
    group_protocol: Literal["classic", "consumer"] = "classic"
    partition_assignment_strategy: Any = None
    group_instance_id: str | None = None
    client_rack: str | None = None
    session_timeout_ms: int | None = None
    heartbeat_interval_ms: int | None = None
    max_poll_interval_ms: int | None = None
    max_poll_records: int | None = None
    isolation_level: str = "read_committed"
    fetch_min_bytes: int | None = None
    fetch_max_bytes: int | None = None
    fetch_max_wait_ms: int | None = None
    max_partition_fetch_bytes: int | None = None
    check_crcs: bool | None = None
    on_assign: Callable[..., Any] | None = None
    on_revoke: Callable[..., Any] | None = None
    on_lost: Callable[..., Any] | None = None
    listener: Any = None
    polling_interval: float = 0.1
    consumer_timeout_ms: int = 200
    exclude_internal_topics: bool = True
    rebalance_timeout_ms: int | None = None
    config: Mapping[str, Any] | None = None


class KafkaSubscription(KafkaOptions, frozen=True):
    """A subscription on Kafka.

    Fields:
        topics: a topic, or several; ``orders.{region}`` is a pattern.
    """

    topics: str | Topic | Sequence[str | Topic] = ()

    def __post_init__(self) -> None:
        given = (self.topics,) if isinstance(self.topics, str | Topic) else self.topics
        _of_kind(given, "topics", str, Topic)
        _of_kind(self.partitions, "partitions", TopicPartition)
        _of_kind((self.batch,), "batch", Batch, bool, type(None))
        _of_kind((self.concurrency,), "concurrency", int)
        _of_kind((self.max_workers,), "max_workers", int, type(None))
        for name in ("on_assign", "on_revoke", "on_lost"):
            if not callable(getattr(self, name) or callable):
                raise TypeError(f"{name}={getattr(self, name)!r} is no function")
        force = msgspec.structs.force_setattr
        if isinstance(self.batch, bool):
            batch = Batch(self.max_records or 100, self.batch_timeout_ms / 1000)
            force(self, "batch", batch if self.batch else None)
        if self.lanes > 1 and self.batch is None and self.ordered_by is None and self.group_id:
            force(self, "ordered_by", by_key)

    @property
    def topic_list(self) -> list[Topic]:
        """The topics, each as a :class:`Topic`."""
        if self.partitions:
            names = dict.fromkeys((p.topic, p.declare) for p in self.partitions)
            return [Topic(name, declare=declare) for name, declare in names]
        given = self.topics
        some: Sequence[str | Topic] = (given,) if isinstance(given, str | Topic) else given
        return [Topic(t) if isinstance(t, str) else t for t in some if t]

    @property
    def strategies(self) -> list[Any]:
        """The assignment strategies that are asked for: names, or classes."""
        given = self.partition_assignment_strategy or ()
        return list(given) if isinstance(given, list | tuple) else [given]

    def covers(self, topic: str) -> bool:
        """Whether a pattern takes a topic."""
        return self.wild and re.match(SYNTAX.compile(self.destination).pattern, topic) is not None

    @property
    def wild(self) -> bool:
        """Whether it is a pattern."""
        return self.destination.startswith("^") or SYNTAX.compile(
            self.destination
        ).pattern.startswith("^")

    def prefixed(self, prefix: str) -> KafkaSubscription:
        new = msgspec.structs.replace
        if self.pattern is not None:
            pattern = self.pattern.removeprefix("^")
            return new(self, pattern=re.escape(prefix).replace(r"\-", "-") + pattern)
        if self.partitions:
            return new(self, partitions=[new(p, topic=prefix + p.topic) for p in self.partitions])
        topics = [new(t, name=prefix + t.name) for t in self.topic_list]
        return new(self, topics=topics)

    @property
    def destination(self) -> str:
        if self.pattern is not None:
            return "^" + self.pattern.removeprefix("^")
        return _JOINT.join(t.name for t in self.topic_list)

    @property
    def bindings(self) -> Bindings:
        topics = self.topic_list
        found = _of_topic(topics[0]) if len(topics) == 1 and not self.wild else {}
        if self.group_id is None:
            return found
        group = {"groupId": {"type": "string", "enum": [self.group_id]}, **_VERSION}
        return {**found, "operation": {"kafka": group}}

    @property
    def envelope(self) -> type[KafkaMessage]:
        return KafkaMessage

    @property
    def capabilities(self) -> Capability:
        can = Capability.HEADERS | Capability.REPLY | Capability.PERSISTENT
        if self.group_id is not None:
            can |= Capability.ACK | Capability.NACK | Capability.REJECT | Capability.GROUPS
            can |= Capability.DELIVERY_COUNT | Capability.RETRY_TOPIC
        return can

    def check(self) -> None:
        given = [n for n in ("topics", "pattern", "partitions") if getattr(self, n)]
        if len(given) != 1:
            what = " and ".join(given) or "neither topics nor a pattern nor partitions"
            raise SetupError(f"a subscription to {what}", fix="give exactly one of the three")
        SYNTAX.compile(self.destination)
        wild = self.wild
        for topic in self.topic_list:
            if wild and len(self.topic_list) > 1:
                raise SetupError(
                    f"{self.destination!r}: a pattern beside other topics",
                    fix="declare a subscriber for each",
                )
            if not wild:
                _check(topic)
        if self.group_protocol == "consumer" and self.covers("__consumer_offsets"):
            raise SetupError(
                f"{self.destination!r} takes the cluster's own topics with group_protocol="
                "'consumer', where it cannot be said which topics a pattern does not take",
                fix="a pattern that takes no name with __ before it, such as '[^_].*'",
            )
        if self.group_id == "":
            raise SetupError("the group has no name", fix="give one, such as group_id='invoices'")
        if self.group_id is None and self.group_instance_id:
            raise SetupError("group_instance_id without a group", fix="name the group_id=")
        if self.partitions and self.group_protocol == "consumer":
            raise SetupError("partitions= with group_protocol='consumer'", fix="leave out one")
        if any(p.partition < 0 for p in self.partitions):
            raise SetupError("a TopicPartition without a partition", fix="give its number, from 0")
        for p in self.partitions:
            if p.offset < 0 and p.offset not in (-1, -2, -1001):
                raise SetupError(
                    f"offset={p.offset} of {p.topic}",
                    fix="0 or more, -2 for the beginning, or -1 for the end",
                )
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, str) and value not in known:
                    raise SetupError(f"{name}={value!r}", fix=f"one of {', '.join(known)}")
        for name in _CLASSIC if self.group_protocol == "consumer" else ():
            if getattr(self, name):
                raise SetupError(
                    f"{name}= with group_protocol='consumer', where the cluster says that",
                    fix="leave out one",
                )
        further(self.config)
        if self.auto_offset_reset not in (None, "earliest", "latest"):
            raise SetupError(
                f"auto_offset_reset={self.auto_offset_reset!r}", fix="'earliest' or 'latest'"
            )
        for name in ("auto_commit_interval_ms", "window", "max_records", "max_poll_records"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SetupError(f"{name}={value}", fix="above 0")
        for name in ("batch_timeout_ms", "revoke_timeout_ms"):
            if (value := getattr(self, name)) < 0:
                raise SetupError(f"{name}={value}", fix="0 or more")


_CHOICES = {
    "group_protocol": ("classic", "consumer"),
    "isolation_level": ("read_committed", "read_uncommitted"),
    "partition_assignment_strategy": ("cooperative-sticky", "sticky", "range", "roundrobin"),
}
#: What only members by the classic protocol say.
_CLASSIC = ("partition_assignment_strategy", "session_timeout_ms", "heartbeat_interval_ms")


def _of_kind(values: Any, name: str, *kinds: type) -> None:
    for value in values if isinstance(values, list | tuple) else (values,):
        if not isinstance(value, kinds):
            wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(f"{name}: {value!r} is {type(value).__name__}, not {wanted}")


def _check(topic: Topic) -> None:
    if not _NAME.fullmatch(topic.name) or topic.name in (".", ".."):
        raise AddressError(
            f"{topic.name!r} cannot be a topic's name",
            fix="letters, digits, '.', '_' and '-', at most 249",
        )
    for name in ("num_partitions", "replication_factor"):
        if (value := getattr(topic, name)) is not None and value < 1:
            raise SetupError(f"{name}={value} of {topic.name}", fix="1 or more, or leave it out")


_VERSION = {"bindingVersion": "0.5.0"}


def _of_topic(topic: Topic) -> Bindings:
    """The AsyncAPI binding of a channel."""
    said: dict[str, Any] = {"topic": topic.name}
    if topic.num_partitions is not None:
        said["partitions"] = topic.num_partitions
    if topic.replication_factor is not None:
        said["replicas"] = topic.replication_factor
    return {"channel": {"kafka": {**said, **_VERSION}}}


class KafkaPublication(PublicationSpec, frozen=True):
    """A declared publication on Kafka.

    Fields:
        topic: where the messages go.
        key: of each message: those with the same key keep their order.
        partition: the partition, instead of one by the key.
        batch: the handler returns a list, each item of which is a message.
        autoflush: accepted for callers of other frameworks: a publication returns when it is
            confirmed.
    """

    topic: str | Topic
    key: bytes | str | None = None
    partition: int | None = None
    batch: bool = False
    autoflush: bool = False

    def __post_init__(self) -> None:
        _of_kind((self.topic,), "topic", str, Topic)

    def prefixed(self, prefix: str) -> KafkaPublication:
        new = msgspec.structs.replace
        topic = self.topic
        if isinstance(topic, Topic):
            return new(self, topic=new(topic, name=prefix + topic.name))
        return new(self, topic=prefix + topic)

    @property
    def destination(self) -> str:
        return self.topic if isinstance(self.topic, str) else self.topic.name

    @property
    def many(self) -> bool:
        return self.batch

    @property
    def bindings(self) -> Bindings:
        return _of_topic(Topic(self.topic) if isinstance(self.topic, str) else self.topic)

    def check(self) -> None:
        _check(Topic(self.topic) if isinstance(self.topic, str) else self.topic)
        if self.partition is not None and self.partition < 0:
            raise SetupError(f"partition={self.partition}", fix="its number, from 0")


class KafkaPublishMessage(msgspec.Struct):
    """One message of a batch, with metadata of its own.

    Fields:
        body: before encoding.
        headers: added to the batch's.
        key: instead of the batch's.
        timestamp_ms: the same.
        correlation_id: the same.
    """

    body: Any
    headers: Mapping[str, str] | None = None
    key: bytes | str | None = None
    timestamp_ms: int | None = None
    correlation_id: str | None = None

    def into(self, command: KafkaPublish) -> None:
        """Make a command of the batch that of this message."""
        command.message = self.body
        for name in ("key", "timestamp_ms", "correlation_id"):
            value = getattr(self, name)
            if value is not None:
                setattr(command, name, value)
        if self.headers is not None:
            command.headers = {**(command.headers or {}), **self.headers}


class KafkaPublish(PublishCommand):
    """One message to be published.

    Fields:
        message: the body before encoding; None is a tombstone.
        topic: where it goes.
        key: those with the same key keep their order.
        partition: the partition, instead of one by the key.
        timestamp_ms: its time, in milliseconds since the epoch; now by default.
        no_confirm: return at once, with a future of the receipt.
    """

    message: Any = None
    topic: str | Topic = ""
    key: bytes | str | None = msgspec.field(default=None)
    partition: int | None = msgspec.field(default=None)
    timestamp_ms: int | None = msgspec.field(default=None)
    no_confirm: bool = msgspec.field(default=False)

    def __post_init__(self) -> None:
        if type(self.message) is KafkaPublishMessage:
            self.message.into(self)

    @property
    def destination(self) -> str:
        return self.topic if isinstance(self.topic, str) else self.topic.name

    @destination.setter
    def destination(self, value: str) -> None:
        self.topic = value


class KafkaRequest(KafkaPublish, kw_only=True):
    """One request.

    Fields:
        message: the body before encoding.
        topic: where it goes.
        response_model: the type of the answer's body; without it the answer is a message.
    """

    response_model: Any = None
