"""The contract that a broker's driver fills, and the values that pass through it.

A driver turns declarations into client calls and hands raw messages to a sink. It knows
nothing of handlers, decoding, retries, logging or tests: those are written once, in the
core, for every broker.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import msgspec

from .ack import AckPolicy, Settlement
from .address import AddressSyntax
from .breaker import Breaker
from .clock import Clock
from .codec import Codec
from .dedup import Dedup
from .errors import SetupError
from .letters import Letters
from .message import Message
from .middleware import Middleware
from .params import Depends
from .retry import DeadLetter, Retry


class Capability(enum.Flag):
    """What a source (one subscription of a broker) can do."""

    NOTHING = 0
    #: Messages are settled; an unsettled one is delivered again, so at-least-once is possible.
    ACK = enum.auto()
    #: A redelivery can be asked for.
    NACK = enum.auto()
    #: A redelivery can be asked for after a delay.
    NACK_DELAY = enum.auto()
    #: A message can be discarded with the broker knowing it.
    REJECT = enum.auto()
    #: The ack deadline of a running message can be pushed back.
    TOUCH = enum.auto()
    #: The broker counts deliveries of a message.
    DELIVERY_COUNT = enum.auto()
    #: Messages carry headers.
    HEADERS = enum.auto()
    #: A request can be answered.
    REPLY = enum.auto()
    #: Several consumers can share one source (queue groups, durable consumers).
    GROUPS = enum.auto()
    #: Messages outlive the processes that read them.
    PERSISTENT = enum.auto()
    #: A failed message can wait at the broker beside its source, while those behind it go on.
    RETRY_TOPIC = enum.auto()


class Batch(msgspec.Struct, frozen=True):
    """Hand a handler lists: up to ``size`` messages, at most ``wait`` seconds after the first."""

    size: int = 100
    wait: float = 0.2

    def __post_init__(self) -> None:
        if self.size < 1 or self.wait < 0:
            raise SetupError(
                f"{self!r}", code="MS129", fix="size is 1 or more, wait in seconds, 0 or more"
            )


Bindings = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What every declaration can say about itself.

    Fields:
        title: a name for documents; the handler's name by default.
        description: a text for documents; the handler's docstring by default.
        include_in_schema: whether documents show it.
    """

    #: The field of the address, which has the broker's own name (``subject``, ``topic`` …).
    address_field: ClassVar[str] = ""

    title: str | None = None
    description: str | None = None
    include_in_schema: bool = True

    def prefixed(self, prefix: str) -> Self:
        """The same declaration under a router's prefix."""
        return msgspec.structs.replace(self, **{self.address_field: prefix + self.destination})

    @property
    def destination(self) -> str:
        """The address as it was declared, with its placeholders."""
        return getattr(self, self.address_field)  # type: ignore[no-any-return]

    @property
    def bindings(self) -> Bindings:
        """What AsyncAPI calls its bindings: settings that only this protocol has.

        By what they belong to (``channel``, ``operation``), then by the protocol. Source: the
        AsyncAPI bindings specifications. Redis has none there.
        """
        return {}


class SubscriptionSpec(Spec, frozen=True, kw_only=True):
    """Options of every subscription, whatever the broker.

    Fields:
        ack_policy: when a message counts as handled; the router's, then the broker's, then
            RETRY where the source can redeliver.
        retry: what an error leads to under the RETRY policy.
        dead_letter: where messages go that cannot be handled: an address, a
            :class:`DeadLetter`, or None for nowhere.
        concurrency: how many messages are handled at once; 1 keeps their order.
        max_workers: the same under the name of other frameworks.
        ordered_by: keeps order per key while ``concurrency`` messages run: a header's name
            (``"header:tenant"``), a field of the body (``"carrier"``) or a function of the
            message.
        batch: hand the handler lists.
        deduplicate: handle a message that comes again, or was sent twice, only once.
        breaker: pause while most attempts fail.
        handler_timeout: seconds a handler may run before it is cancelled and counts as failed.
        inline: run a plain ``def`` handler on the event loop instead of in a thread.
        no_reply: never answer, even if the message asks for a reply.
        persistent: start with the broker; otherwise by ``await subscriber.start()``.
        codec: how bodies are decoded and results encoded.
        parser: ``(raw, original)`` → Message, instead of the driver's own envelope.
        decoder: ``(message[, original])`` → the decoded body.
        dependencies: run before the handler for their side effects.
        middlewares: wrapped around the handler, inside the router's and the broker's.
    """

    ack_policy: AckPolicy | None = None
    retry: Retry | None = None
    dead_letter: DeadLetter | str | msgspec.UnsetType | None = msgspec.UNSET
    concurrency: int = 1
    max_workers: int | None = None
    ordered_by: str | Callable[[Message[Any]], Hashable] | None = None
    batch: Batch | None = None
    deduplicate: Dedup | None = None
    breaker: Breaker | None = None
    handler_timeout: float | None = None
    inline: bool = False
    no_reply: bool = False
    persistent: bool = True
    codec: Codec | None = None
    parser: Callable[..., Any] | None = None
    decoder: Callable[..., Any] | None = None
    dependencies: Sequence[Depends] = ()
    middlewares: Sequence[Middleware | Callable[..., Any]] = ()

    @property
    def envelope(self) -> type[Message[Any]]:
        """The class that wraps this source's raw messages."""
        raise NotImplementedError

    @property
    def capabilities(self) -> Capability:
        """What this source can do."""
        raise NotImplementedError

    @property
    def guarantee(self) -> str:
        """``at-least-once`` or ``at-most-once``, for people."""
        if Capability.ACK not in self.capabilities or self.ack_policy is AckPolicy.ACK_FIRST:
            return "at-most-once"
        return "at-least-once"

    @property
    def buried(self) -> DeadLetter | msgspec.UnsetType | None:
        """Where messages go that cannot be handled, as far as that is said."""
        then = self.retry.then if self.retry is not None else None
        named = then if isinstance(then, DeadLetter) else self.dead_letter
        return DeadLetter(named) if isinstance(named, str) else named

    @property
    def ack_wait(self) -> float | None:
        """Seconds until the broker delivers an unsettled message again; None for never."""
        return None

    @property
    def lanes(self) -> int:
        """How many messages run at once."""
        return self.max_workers or self.concurrency

    @property
    def prefetch(self) -> int:
        """How many messages a driver should hold ready: enough to keep every lane busy."""
        if self.batch is not None:
            return max(self.batch.size * 2, 1)
        return max(self.lanes * 2, 1)

    def check(self) -> None:
        """Raise a :class:`SetupError` for options that contradict each other."""


class PublicationSpec(Spec, frozen=True, kw_only=True):
    """Options of every declared publication.

    Fields:
        headers: sent with each message.
        reply_to: the address where answers are wanted.
        schema: the type of the messages, where the handler's return annotation does not say it.
        codec: how messages are encoded.
        middlewares: wrapped around each publication, inside the router's and the broker's.
    """

    headers: Mapping[str, str] | None = None
    reply_to: str = ""
    schema: Any = None
    codec: Codec | None = None
    middlewares: Sequence[Middleware | Callable[..., Any]] = ()

    @property
    def many(self) -> bool:
        """Whether what is published is a list, each item of which is a message."""
        return False

    def check(self) -> None:
        """Raise a :class:`SetupError` for options that contradict each other."""


class PublishCommand(msgspec.Struct, kw_only=True):
    """One message to be published: the arguments of ``publish``, as middlewares see them.

    A broker's own command adds ``message`` and the address as positional fields, under the
    name the broker uses (``subject``, ``topic``, ``queue`` …).

    Fields:
        headers: metadata in the broker's own headers.
        reply_to: where the answer is wanted.
        correlation_id: ties an answer or a consequence to its cause.
        content_type: overrides the codec's.
        timeout: seconds to wait for a lost connection to come back and for the broker's
            confirmation; None means the broker's ``publish_timeout``.
    """

    #: As of a :class:`Spec`.
    address_field: ClassVar[str] = ""

    headers: dict[str, str] | None = None
    reply_to: str = ""
    correlation_id: str | None = None
    content_type: str | None = None
    timeout: float | None = None

    # Subclasses declare the field `message: Any = None` and the address.
    if TYPE_CHECKING:
        message: Any = None

    @property
    def destination(self) -> str:
        """Where the message goes."""
        return getattr(self, self.address_field)  # type: ignore[no-any-return]

    @destination.setter
    def destination(self, value: str) -> None:
        setattr(self, self.address_field, value)

    @property
    def body(self) -> Any:
        """The message before encoding."""
        return self.message

    @body.setter
    def body(self, value: Any) -> None:
        self.message = value

    def answer(self, message: Message[Any]) -> None:
        """Make it the answer to a message: it goes where that wants it, whatever it said before."""
        self.destination = message.reply_to
        if self.correlation_id is None:
            self.correlation_id = message.known_correlation_id


#: Takes one raw message; the driver awaits it, and that wait is the back-pressure.
Sink = Callable[[Any], Awaitable[None]]


#: Seconds that a handler gets to end once it was cancelled; one that does not is left behind.
CANCELLED = 0.5


class Intake(Protocol):
    """One live subscription, as its driver runs it."""

    async def pause(self) -> int:
        """Stop taking messages.

        Once it returns the sink gets no further message. Messages that were fetched but not
        given to the sink are handed back to the broker at once where the source can settle,
        and are given to the sink first where it cannot. Returns how many were handed back.
        """
        ...

    async def close(self) -> None:
        """Free what the subscription holds and cancel the sink call that still runs.

        A sink that does not end within :data:`CANCELLED` seconds is left behind.
        """

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        """Tell the broker what became of a message; ``delay`` (seconds) belongs to NACK.

        ``options`` are the broker's own. With a NACK, ``unbegun`` says that no handler has seen
        the message: where the broker can, this delivery does not count.
        """

    async def touch(self, raw: Any, /) -> None:
        """Push back the ack deadline of a message that still runs."""

    async def begun(self, raw: Any, /) -> bool:
        """Note at the source that the last attempt at a message begins.

        Returns whether that was noted before, so that the attempt ended with its process; the
        number of deliveries cannot tell, since a message that was only fetched counts as well.
        Asked only of sources that count deliveries; one that cannot keep notes says True.
        """
        ...

    async def lag(self) -> int | None:
        """Messages that wait at the broker for this source; None where it does not tell."""
        ...


@runtime_checkable
class Undoing(Intake, Protocol):
    """An intake whose handlers' publications go out with the settlement of their message."""

    def undo(self, raw: Any, /) -> None:
        """Drop what a failed attempt published; ``raw`` is a list for a batch."""


@runtime_checkable
class Lending(Intake, Protocol):
    """An intake whose messages may become another process's while this one holds them."""

    async def ours(self, raws: list[Any], /) -> list[Any]:
        """Those of some messages that waited, in a lane or for another attempt, that may begin.

        The others are delivered again by the source, or were already: nothing more is said of them.
        """
        ...


class Driver(Protocol):
    """One connection to one broker."""

    #: Short name: loggers, documents, messages for people.
    name: ClassVar[str]
    syntax: ClassVar[AddressSyntax]
    #: The command class of this broker's ``publish``.
    command: ClassVar[type[PublishCommand]]
    #: How the names of the broker's own control headers begin: never copied to another message.
    control_headers: ClassVar[str | tuple[str, ...]]
    #: Set by the broker before ``connect``: called with "disconnected", "reconnected",
    #: "closed" or "error" and a short reason.
    notify: Callable[[str, str], None]
    clock: Clock

    def describe(self) -> str:
        """The broker's address, without any password."""
        ...

    async def connect(self) -> None:
        """Connect, in one attempt; afterwards a lost connection comes back by itself.

        Raises:
            ConnectError: not reached or not let in; ``permanent`` where a retry cannot help.
        """

    async def close(self) -> None:
        """Flush what ``publish`` accepted, then disconnect."""

    async def ping(self, timeout: float) -> bool:
        """Whether the broker answers within ``timeout`` seconds."""
        ...

    async def declare(self, specs: Sequence[Spec]) -> None:
        """Create or check what all declarations need (streams, queues, groups); idempotent."""

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        """Start to deliver; ``lost`` is called once if the subscription dies and cannot heal."""
        ...

    async def publish(self, command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        """Send encoded bytes; returns the broker's receipt (None where it gives none).

        Raises:
            NotConnected: the connection did not come back within the timeout.
            PublishTimeout: no confirmation came within the timeout.
            MessageTooLarge: over the broker's maximum.
            PublishError: refused for another reason.
        """
        ...

    async def request(
        self, command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        """Send a request and return the raw reply.

        Raises:
            RequestTimeout: no reply in time.
            NoResponders: nobody listens.
            NotConnected: the connection did not come back within the timeout.
        """
        ...

    def reply_envelope(self) -> type[Message[Any]]:
        """The class that wraps raw replies."""
        ...

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        """The address of a subscription's dead letters, told without a connection.

        ``name`` is the one the user gave; None means the default, ``{source}.dlq``.

        Raises:
            SetupError: there can be none.
        """
        ...

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        """The same, made ready to take them; another one if a server has that already. What is
        stored there must outlive this process where the source itself does. Without
        ``declare`` the address is only told, and nothing is made.
        """
        ...

    def letters(self, address: str) -> Letters:
        """The dead letters of an address, to work with."""
        ...
