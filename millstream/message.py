"""The message, as handlers see it: a thin, lazy view of what the client library delivered."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from .ack import Settlement
from .codec import JSON, any_decoder
from .errors import MillstreamError

if TYPE_CHECKING:
    from .address import Address
    from .driver import Driver, Intake, PublishCommand, SubscriptionSpec
    from .plan import Site

RawT = TypeVar("RawT")

#: The message that the running task handles; read by the log filter and by publishers.
current: ContextVar[Message[Any] | None] = ContextVar("millstream_message", default=None)

_prefix = os.urandom(6).hex()
_counter = itertools.count(1)


def new_id() -> str:
    """A process-wide unique id, far cheaper than a UUID."""
    return f"{_prefix}-{next(_counter):x}"


def current_message() -> Message[Any] | None:
    """The message that the running task handles, if any."""
    return current.get()


class Link:
    """What all messages of one subscription share while it runs."""

    __slots__ = ("address", "decode", "driver", "handler", "intake", "site")

    def __init__(self, driver: Driver, spec: SubscriptionSpec | None, handler: str = "") -> None:
        self.driver = driver
        self.handler = handler
        #: Set once the driver subscribed; None for replies and in `get_one` of plain sources.
        self.intake: Intake | None = None
        self.address: Address | None = (
            driver.syntax.compile(spec.destination) if spec is not None else None
        )
        self.decode: Callable[[Message[Any]], Any] | None = None
        self.site: Site | None = None


class Message(Generic[RawT]):
    """One message.

    A broker's own class overrides the accessors, each of which reads the raw object only
    when it is asked. ``settled`` is None until the message is settled.
    """

    __slots__ = (
        "_correlation_id",
        "_message_id",
        "_value",
        "closers",
        "link",
        "raw",
        "settled",
        "tries",
    )

    #: Attempts made by this process without the broker knowing; set by a retry in place.
    tries: int

    #: Dependencies of the scope ``message`` that end after settlement; set where there are any.
    closers: list[Any]

    def __init__(self, raw: RawT, link: Link) -> None:
        self.raw = raw
        self.link = link
        self.settled: Settlement | None = None
        self._correlation_id: str | None = None

    # Accessors a broker's class provides

    @property
    def body(self) -> bytes:
        """The bytes, as they arrived."""
        raise NotImplementedError

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers; empty if there are none."""
        raise NotImplementedError

    @property
    def destination(self) -> str:
        """The address the message was sent to."""
        raise NotImplementedError

    @property
    def reply_to(self) -> str:
        """Where an answer is wanted, or an empty string."""
        return self.headers.get("reply_to", "")

    @property
    def key(self) -> bytes | None:
        """The message's key on brokers that have one."""
        return None

    @property
    def delivery_count(self) -> int:
        """How many times the message was delivered, this time included."""
        return 1

    @property
    def timestamp(self) -> datetime | None:
        """When the broker got the message, if it tells."""
        return None

    # Common

    @property
    def content_type(self) -> str | None:
        """The media type of the body, if the sender said it."""
        return self.headers.get("content-type")

    @property
    def message_id(self) -> str:
        """The sender's id, or one made on first use."""
        try:
            return self._message_id
        except AttributeError:
            self._message_id: str = self.headers.get("message_id") or new_id()
            return self._message_id

    @property
    def correlation_id(self) -> str:
        """The sender's correlation id, or one made on first use; answers carry the same."""
        if self._correlation_id is None:
            self._correlation_id = self.headers.get("correlation_id") or new_id()
        return self._correlation_id

    @property
    def known_correlation_id(self) -> str | None:
        """The correlation id if the sender gave one or somebody read it; none is made."""
        return self._correlation_id or self.headers.get("correlation_id")

    @property
    def path(self) -> dict[str, str]:
        """The values of the placeholders of the subscription's address."""
        address = self.link.address
        return address.extract(self.destination) if address is not None else {}

    @property
    def raw_message(self) -> RawT:
        """The client library's own object."""
        return self.raw

    @property
    def committed(self) -> Settlement | None:
        """How the message was settled, or None."""
        return self.settled

    @property
    def attempt(self) -> int:
        """Which attempt at handling this is, counted from 1."""
        return getattr(self, "tries", 0) or self.delivery_count

    #: True if it carries headers, among which may be the engine's own. Read for each message,
    #: so a broker's class makes it an attribute of the raw object that takes no call.
    marked: ClassVar[Any] = property(operator.attrgetter("headers"))

    @property
    def unusual(self) -> bool:
        """Whether it was delivered before, or is :attr:`marked`."""
        return self.delivery_count > 1 or bool(self.marked)

    def carry(self, command: PublishCommand) -> None:
        """Give a copy of this message what is neither its body nor in its headers (a key)."""

    async def decode(self) -> Any:
        """The body as the subscription's codec reads it; decoded once.

        Raises:
            DecodeError: the body is not what the codec expects.
        """
        try:
            return self._value
        except AttributeError:
            decode = self.link.decode
            if decode is None:
                raise MillstreamError("this message has no decoder") from None
            value = decode(self)
            if hasattr(value, "__await__"):
                value = await value
            self._value: Any = value
            return value

    async def ack(self, **options: Any) -> bool:
        """The message is done. False if it was settled otherwise before."""
        return await self.settle(Settlement.ACK, **options)

    async def nack(self, delay: float | None = None, **options: Any) -> bool:
        """Deliver it again, after ``delay`` seconds. False if it was settled otherwise before."""
        return await self.settle(Settlement.NACK, delay, **options)

    async def reject(self, **options: Any) -> bool:
        """Discard it for good. False if it was settled otherwise before."""
        return await self.settle(Settlement.REJECT, **options)

    async def in_progress(self) -> None:
        """Push back the broker's ack deadline, where there is one."""
        if self.link.intake is not None and self.settled is None:
            await self.link.intake.touch(self.raw)

    async def settle(self, how: Settlement, delay: float | None = None, /, **options: Any) -> bool:
        """Settle once: the first call wins, the same again is no error."""
        if self.settled is not None:
            return self.settled is how
        self.settled = how
        intake = self.link.intake
        if intake is not None:
            try:
                await intake.settle(self.raw, how, delay, **options)
            except BaseException:
                self.settled = None
                raise
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.destination!r} {len(self.body)} bytes>"


_decode = any_decoder(JSON())


def decode_message(message: Message[Any]) -> Any:
    """The body by its content type: JSON, text or bytes; for a ``decoder=`` of one's own.

    Raises:
        Exception: whatever a reader of that type raises for a body that is none.
    """
    return _decode(message.body, message.content_type)


# Under the names of other frameworks.
StreamMessage = Message
AckStatus = Settlement

_marked = operator.attrgetter("marked")


class Bundle(Protocol):
    """Raw messages that follow each other, of which a driver keeps account as of one.

    A batch of them is decoded and acknowledged without a look at each. As soon as somebody wants
    to see a message, the bundle is taken apart for good.
    """

    def __len__(self) -> int: ...

    def bodies(self) -> list[bytes]:
        """What each of the messages says."""
        ...

    def apart(self) -> list[Any]:
        """The raw messages; the driver keeps account of each from now on."""
        ...

    def split(self, count: int) -> Bundle:
        """Keep the first ``count`` messages and return the others."""
        ...


def apart(raws: Sequence[Any]) -> list[Any]:
    """Raw messages, with every bundle among them taken apart."""
    return [one for raw in raws for one in (raw.apart() if hasattr(raw, "apart") else (raw,))]


class BatchMessage(Message[list[Any]]):
    """Several messages that one call handles; ``messages`` are the single ones.

    Args:
        raws: the raw messages, or bundles of them.
        envelope: the class of the single messages.
        link: what they are connected with.
    """

    __slots__ = ("_envelope", "_messages", "bundles")

    def __init__(self, raws: list[Any], envelope: type[Message[Any]], link: Link) -> None:
        self.link, self._envelope = link, envelope
        self.settled, self._correlation_id = None, None
        #: What it is made of, until somebody looks at a message; None where that is messages.
        self.bundles: list[Bundle] | None = None
        if all(hasattr(raw, "apart") for raw in raws):
            self.bundles = raws
        else:
            self._messages = [envelope(raw, link) for raw in apart(raws)]

    @property
    def messages(self) -> list[Message[Any]]:
        """The single messages."""
        if self.bundles is not None:
            raws, self.bundles = apart(self.bundles), None
            self._messages = [self._envelope(raw, self.link) for raw in raws]
            for message in self._messages:
                message.settled = self.settled
        return self._messages

    #: The single raw messages.
    raw: Any = property(lambda self: [m.raw for m in self.messages])

    @property
    def body(self) -> Any:
        return self.bodies()

    def bodies(self) -> list[bytes]:
        """What each message says, encoded."""
        if self.bundles is None:
            return [m.body for m in self._messages]
        return [body for bundle in self.bundles for body in bundle.bodies()]

    @property
    def headers(self) -> Mapping[str, str]:
        return self.messages[0].headers

    @property
    def batch_headers(self) -> list[Mapping[str, str]]:
        """Each message's headers."""
        return [m.headers for m in self.messages]

    @property
    def destination(self) -> str:
        return self.messages[0].destination

    marked = property(lambda self: self.bundles is None and any(map(_marked, self._messages)))

    @property
    def delivery_count(self) -> int:
        return max(m.delivery_count for m in self.messages)

    async def ack(self, *indexes: int, **options: Any) -> bool:
        """All messages are done, or those at the given indexes; the others stay open."""
        if not indexes:
            return await super().ack(**options)
        return all([await self.messages[i].ack(**options) for i in indexes])

    async def nack(
        self, delay: float | None = None, *, index: int | None = None, **options: Any
    ) -> bool:
        """Deliver all again after ``delay`` seconds, or the one at ``index``."""
        if index is None:
            return await super().nack(delay, **options)
        return await self.messages[index].nack(delay, **options)

    async def in_progress(self) -> None:
        for message in self.messages:
            await message.in_progress()

    async def settle(self, how: Settlement, delay: float | None = None, /, **options: Any) -> bool:
        """Settle every message that is not settled yet."""
        if self.settled is not None:
            return self.settled is how
        bundles = self.bundles if how is Settlement.ACK and not options else None
        messages = self.messages if bundles is None else ()
        self.settled = how
        failed: Exception | None = None
        intake = self.link.intake
        try:
            for bundle in bundles or ():
                if intake is not None:  # a driver knows what is done if this is tried again
                    await intake.settle(bundle, how, delay)
            for message in messages:
                if message.settled is not None:
                    continue
                message.settled = how  # as its own `settle` does; batches are to be cheap
                try:
                    if intake is not None:
                        await intake.settle(message.raw, how, delay, **options)
                except BaseException as error:
                    message.settled = None
                    if not isinstance(error, Exception):
                        raise
                    failed = error
            if failed is not None:
                raise failed
        except BaseException:
            self.settled = None
            raise
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.messages)}>"
