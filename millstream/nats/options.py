"""What can be said about a NATS subscription, a publication and one message."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig

from ..address import AddressSyntax
from ..driver import Batch, Bindings, Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import AddressError, SetupError
from ..message import Message
from .message import NatsKvMessage, NatsMessage, NatsObjMessage, NatsStreamMessage

#: `*` is one token, `>` all that remain and at least one (docs.nats.io, Subject-Based Messaging).
SYNTAX = AddressSyntax(separator=".", one="*", rest=">", rest_empty=False)

_NAME = re.compile(r"[^\s.*>/\\]+")
#: The server's own default (docs.nats.io, Consumers, AckWait), in seconds.
ACK_WAIT = 30.0


@dataclass
class JStream(StreamConfig):
    """A stream, created or updated when the application starts.

    Takes every setting of nats-py's ``StreamConfig`` (ages and windows in seconds); what is
    left out keeps the server's value. The subjects of the application's subscribers and
    publishers are added to ``subjects``; subjects that others put there stay.

    Args:
        declare: False if the stream must exist already and is not to be touched.
    """

    declare: bool = True

    def __post_init__(self) -> None:
        _check_name("stream", self.name or "")

    def settings(self) -> dict[str, Any]:
        """What was set, in the words of the JetStream API."""
        values = {f.name: getattr(self, f.name) for f in fields(StreamConfig)}
        wanted, default = StreamConfig(**values).as_dict(), StreamConfig().as_dict()
        return {key: value for key, value in wanted.items() if default.get(key) != value}


class PullSub(msgspec.Struct, frozen=True):
    """How a JetStream subscription fetches.

    Fields:
        batch_size: how many messages may be held ready; None means as many as keep the
            handler busy for a fraction of a second (with ``batch``: 100).
        timeout: seconds a batch waits to fill after its first message.
        batch: hand the handler lists of up to ``batch_size`` messages.
    """

    batch_size: int | None = None
    timeout: float = 5.0
    batch: bool = False


class KvWatch(msgspec.Struct, frozen=True):
    """A watched key-value bucket.

    Fields:
        name: the bucket.
        headers_only: leave the values out.
        include_history: begin with every kept revision, not only the latest of each key.
        ignore_deletes: leave out deletions and purges.
        meta_only: the same as ``headers_only``.
        inactive_threshold: seconds after which the server forgets a watcher that went away.
        timeout: accepted for callers of other frameworks; updates are never polled.
        declare: create the bucket if it is not there.
    """

    name: str
    headers_only: bool = False
    include_history: bool = False
    ignore_deletes: bool = False
    meta_only: bool = False
    inactive_threshold: float | None = None
    timeout: float = 5.0
    declare: bool = True


class ObjWatch(msgspec.Struct, frozen=True):
    """A watched object store; see :class:`KvWatch` for the fields."""

    ignore_deletes: bool = False
    include_history: bool = False
    meta_only: bool = False
    timeout: float = 5.0
    declare: bool = True


class Schedule(msgspec.Struct, frozen=True):
    """Deliver a message later (nats-server 2.12 and newer, ADR-51).

    The stream needs ``allow_msg_schedules=True`` and has to hold both the subject published
    to, which identifies the schedule, and ``target``.

    Fields:
        time: when; taken as UTC if it has no time zone.
        target: the subject the message is delivered on.
    """

    time: datetime
    target: str

    def headers(self) -> dict[str, str]:
        """The two headers that tell the server."""
        at = self.time if self.time.tzinfo else self.time.replace(tzinfo=UTC)
        stamp = at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"Nats-Schedule": f"@at {stamp}", "Nats-Schedule-Target": self.target}


class NatsOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a NATS subscription, besides its subject and queue.

    Fields:
        stream: the JetStream stream to read from; created unless ``JStream(declare=False)``.
        durable: the durable consumer's name: where reading goes on after a restart, shared
            by all processes that name it. Derived from ``queue`` if that is given.
        config: nats-py's ``ConsumerConfig``: every setting of the consumer.
        deliver_policy: where a new consumer starts; everything by default.
        pull_sub: how messages are fetched; True is ``PullSub()``.
        push: let the server push instead of fetching.
        ordered_consumer: read in strict order without acknowledging; gaps are read again.
        idle_heartbeat: seconds after which the server gives a sign of life when idle.
        flow_control: have the server wait for this client (push only; fetching always does).
        headers_only: leave the bodies out.
        max_msgs: end after so many messages (core and push).
        pending_msgs_limit: messages that may wait in this process (core and push; further
            ones are dropped on core NATS and come again on a stream).
        pending_bytes_limit: the same in bytes.
        inbox_prefix: begins the name of the inbox that a stream's messages arrive at.
        kv_watch: watch a key-value bucket; the subject is the key, wildcards included.
        obj_watch: watch an object store; the subject is its name.
    """

    stream: str | JStream | None = None
    durable: str | None = None
    config: ConsumerConfig | None = None
    deliver_policy: DeliverPolicy | None = None
    pull_sub: bool | PullSub = False
    push: bool = False
    ordered_consumer: bool = False
    idle_heartbeat: float | None = None
    flow_control: bool | None = None
    headers_only: bool | None = None
    max_msgs: int = 0
    pending_msgs_limit: int | None = None
    pending_bytes_limit: int | None = None
    inbox_prefix: str | bytes = ""
    kv_watch: str | KvWatch | None = None
    obj_watch: bool | ObjWatch = False


class NatsSubscription(NatsOptions, frozen=True):
    """A subscription on NATS: core, JetStream, key-value or object store.

    Fields:
        subject: such as ``orders.{region}.created``; ``*`` is one token, ``>`` the rest.
        queue: members of one queue share the messages.
    """

    subject: str = ""
    queue: str = ""

    def __post_init__(self) -> None:
        pull = self.pull
        if pull is not None and pull.batch and self.batch is None:
            batch = Batch(pull.batch_size or 100, pull.timeout)
            msgspec.structs.force_setattr(self, "batch", batch)

    @property
    def bindings(self) -> Bindings:
        if not self.queue:
            return {}
        return {"operation": {"nats": {"queue": self.queue, "bindingVersion": "0.1.0"}}}

    @property
    def pull(self) -> PullSub | None:
        """The settings for fetching, if any were given."""
        return PullSub() if self.pull_sub is True else self.pull_sub or None

    @property
    def kv(self) -> KvWatch | None:
        """The watched bucket."""
        return KvWatch(self.kv_watch) if isinstance(self.kv_watch, str) else self.kv_watch

    @property
    def obj(self) -> ObjWatch | None:
        """The watched object store."""
        return ObjWatch() if self.obj_watch is True else self.obj_watch or None

    @property
    def watch(self) -> KvWatch | ObjWatch | None:
        """Whichever of the two stores is watched."""
        return self.kv or self.obj

    @property
    def stream_name(self) -> str | None:
        """The stream that messages are read from."""
        if self.kv is not None:
            return f"KV_{self.kv.name}"
        if self.obj is not None:
            return f"OBJ_{self.subject}"
        return self.stream.name if isinstance(self.stream, JStream) else self.stream

    @property
    def pattern(self) -> str:
        """The subject as the server is asked for it."""
        return SYNTAX.compile(self.subject).pattern if self.subject else ""

    @property
    def filters(self) -> list[str]:
        """The subjects taken from the stream; none means all."""
        config = self.config or ConsumerConfig()
        if self.kv is not None:
            return [f"$KV.{self.kv.name}.{self.pattern or '>'}"]
        if self.obj is not None:
            return [f"$O.{self.subject}.M.>"]
        own = config.filter_subjects or ([config.filter_subject] if config.filter_subject else [])
        return list(own) or ([self.pattern] if self.subject else [])

    @property
    def acknowledged(self) -> bool:
        """Whether the server waits for an acknowledgement of each message."""
        if self.stream_name is None or self.watch is not None or self.ordered_consumer:
            return False
        return self.config is None or self.config.ack_policy is not AckPolicy.NONE

    # What the core asks

    def prefixed(self, prefix: str) -> NatsSubscription:
        if not prefix or self.obj is not None:
            return self
        config = self.config
        if config is not None and self.filters:
            one, some = config.filter_subject, config.filter_subjects
            config = config.evolve(
                filter_subject=prefix + one if one else None,
                filter_subjects=[prefix + subject for subject in some] if some else None,
            )
        subject = prefix + self.subject if self.subject else ""
        return msgspec.structs.replace(self, subject=subject, config=config)

    @property
    def destination(self) -> str:
        if self.subject:
            return self.subject
        filters = self.filters
        return filters[0] if len(filters) == 1 else ">"

    @property
    def envelope(self) -> type[Message[Any]]:
        if self.kv is not None:
            return NatsKvMessage
        if self.obj is not None:
            return NatsObjMessage
        return NatsMessage if self.stream_name is None else NatsStreamMessage

    @property
    def capabilities(self) -> Capability:
        if self.watch is not None:
            return Capability.PERSISTENT
        plain = Capability.HEADERS | Capability.REPLY
        if self.stream_name is None:
            return plain | Capability.GROUPS
        if not self.acknowledged:
            return plain | Capability.PERSISTENT
        return (
            plain
            | Capability.ACK
            | Capability.NACK
            | Capability.NACK_DELAY
            | Capability.REJECT
            | Capability.TOUCH
            | Capability.DELIVERY_COUNT
            | Capability.GROUPS
            | Capability.PERSISTENT
        )

    @property
    def ack_wait(self) -> float | None:
        if not self.acknowledged:
            return None
        config = self.config or ConsumerConfig()
        return min(config.backoff) if config.backoff else config.ack_wait or ACK_WAIT

    @property
    def prefetch(self) -> int:
        pull = self.pull
        if pull is not None and pull.batch_size is not None and self.batch is None:
            return max(pull.batch_size, 1)
        return super().prefetch

    def check(self) -> None:
        if self.subject and self.obj is None:
            _check_subject(self.subject)
        self._check_source()
        self._check_mode()
        for kind, name in (("stream", self.stream_name), ("durable", self.durable)):
            if name is not None:
                _check_name(kind, name)
        if self.pull is not None and self.pull.batch_size is not None and self.pull.batch_size < 1:
            raise SetupError(
                f"batch_size={self.pull.batch_size}", fix="hold at least one message ready"
            )

    def _check_source(self) -> None:
        """Which of core, stream and store this is, and whether the options are of that kind."""
        if self.kv is not None and self.obj is not None:
            raise SetupError(
                "kv_watch and obj_watch exclude each other", fix="declare two subscribers"
            )
        if self.watch is not None:
            what = "kv_watch" if self.kv is not None else "obj_watch"
            self._refuse(what, ("stream", "queue", "durable", "config", "pull_sub", "push"))
            if self.obj is not None and not self.subject:
                raise SetupError("obj_watch without a bucket", fix='give its name: ("files", ...)')
        elif self.stream is None:
            needs = ("durable", "config", "deliver_policy", "pull_sub", "push")
            self._refuse("core NATS", (*needs, "ordered_consumer", "headers_only"), "stream")
            if not self.subject:
                raise SetupError("a subscription without a subject", fix="name the subject to read")

    def _check_mode(self) -> None:
        """Whether the ways to read a stream fit together."""
        if self.push:
            self._refuse("push=True", ("pull_sub", "ordered_consumer"))
        if self.ordered_consumer:
            self._refuse("ordered_consumer=True", ("queue", "durable", "pull_sub"))
        if self.max_msgs and (self.stream_name is not None and not self.push):
            raise SetupError(
                f"max_msgs={self.max_msgs} on a pull consumer",
                fix="use push=True, or stop the subscription with `raise StopConsume`",
            )
        if self.flow_control and self.push and not self.idle_heartbeat:
            raise SetupError("flow_control without idle_heartbeat", fix="set idle_heartbeat=5")
        config = self.config
        if config is not None and config.ack_policy is AckPolicy.ALL and self.lanes > 1:
            raise SetupError(
                f"AckPolicy.ALL with {self.lanes} messages at once acknowledges unhandled ones",
                fix="set concurrency=1 or ack_policy=AckPolicy.EXPLICIT in the ConsumerConfig",
            )
        names = {self.durable, config and config.durable_name, config and config.name}
        names -= {None, ""}
        if len(names) > 1:
            raise SetupError(
                f"the consumer has several names: {', '.join(sorted(map(str, names)))}",
                fix="give one, as durable=",
            )

    def _refuse(self, kind: str, names: tuple[str, ...], needed: str = "") -> None:
        given = [name for name in names if getattr(self, name)]
        if given:
            what = f"{kind} cannot be combined with {', '.join(given)}"
            raise SetupError(
                what, fix=f"add {needed}=, or leave them out" if needed else "choose one"
            )


class NatsPublication(PublicationSpec, frozen=True):
    """A declared publication on NATS.

    Fields:
        subject: where the messages go.
        stream: the stream that has to store them; each publication then waits for its
            confirmation. Created like a subscriber's.
        timeout: seconds to wait for a lost connection and for the confirmation.
    """

    address_field: ClassVar[str] = "subject"
    subject: str
    stream: str | JStream | None = None
    timeout: float | None = None

    def check(self) -> None:
        _check_subject(self.subject)
        if self.stream is not None:
            _check_name("stream", stream_name(self.stream))


class NatsPublishOptions(PublishCommand, kw_only=True):
    """Options of one published message, besides its body and subject.

    Fields:
        stream: the stream that has to store it; ``publish`` then returns its ``PubAck``.
        message_id: the stream stores messages of one id once (``Nats-Msg-Id``; within the
            stream's ``duplicate_window``, 2 minutes by default).
        schedule: deliver it later.
    """

    stream: str | JStream | None = None
    message_id: str | None = None
    schedule: Schedule | None = None


class NatsPublish(NatsPublishOptions):
    """One message to be published.

    Fields:
        message: the body before encoding.
        subject: where it goes.
    """

    address_field: ClassVar[str] = "subject"
    message: Any = None
    subject: str = ""

    def answer(self, message: Message[Any]) -> None:
        super().answer(message)
        self.stream = self.message_id = self.schedule = None  # no stream stores it

    @property
    def stored(self) -> bool:
        """Whether a stream has to confirm it."""
        return bool(self.stream or self.message_id or self.schedule)

    def wire_headers(self, headers: Mapping[str, str] | None) -> dict[str, str] | None:
        """``headers`` and what JetStream reads from them (docs.nats.io, JetStream Headers)."""
        if not self.stored:
            return dict(headers) if headers else None
        extra = dict(headers or {})
        if self.stream:
            extra["Nats-Expected-Stream"] = stream_name(self.stream)
        if self.message_id:
            extra["Nats-Msg-Id"] = self.message_id
        if self.reply_to:  # on the wire the reply subject is where the PubAck goes
            extra.setdefault("reply_to", self.reply_to)
        if self.schedule is not None:
            extra.update(self.schedule.headers())
        return extra


class NatsRequest(NatsPublish, kw_only=True):
    """One request.

    Fields:
        message: the body before encoding.
        subject: where it goes.
        response_model: the type of the answer's body; without it the answer is a message.
    """

    response_model: Any = None


def stream_name(stream: str | JStream) -> str:
    """The name of a stream given either way."""
    return stream if isinstance(stream, str) else stream.name or ""


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SetupError(
            f"{name!r} is no name for a {kind}", fix="leave out spaces and any of . * > / \\"
        )


def _check_subject(subject: str) -> None:
    tokens = SYNTAX.compile(subject).pattern.split(".")
    if not all(tokens) or re.search(r"\s", subject):
        raise AddressError(
            f"{subject!r} is no subject", fix="write tokens without spaces, joined by single dots"
        )
