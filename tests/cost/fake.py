"""A broker that costs nothing: what is counted around it is the core alone.

Its driver keeps the sink of each subscription, so that a test awaits deliveries itself; its
messages settle by one bare coroutine, as a client library's would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from millstream.ack import Settlement
from millstream.address import AddressSyntax
from millstream.broker import Broker
from millstream.clock import Clock, LoopClock
from millstream.driver import (
    Capability,
    PublicationSpec,
    PublishCommand,
    Sink,
    Spec,
    SubscriptionSpec,
)
from millstream.endpoints import Endpoints, asks, declares, produces, sends
from millstream.memory import MemoryDriver, MemoryLetters
from millstream.message import Message


class Raw:
    """What the client library would hand over."""

    __slots__ = ("data", "headers", "subject")

    def __init__(self, data: bytes) -> None:
        self.subject, self.data, self.headers = "in", data, None


class FakeMessage(Message[Raw]):
    __slots__ = ()

    @property
    def body(self) -> bytes:
        return self.raw.data

    @property
    def headers(self) -> Mapping[str, str]:
        return self.raw.headers or {}

    @property
    def destination(self) -> str:
        return self.raw.subject

    @property
    def unusual(self) -> bool:
        return False


class FakeOptions(SubscriptionSpec, frozen=True, kw_only=True):
    def prefixed(self, prefix: str) -> FakeOptions:
        return self

    @property
    def envelope(self) -> type[Message[Any]]:
        return FakeMessage

    @property
    def capabilities(self) -> Capability:
        return (
            Capability.ACK
            | Capability.NACK
            | Capability.NACK_DELAY
            | Capability.REJECT
            | Capability.DELIVERY_COUNT
            | Capability.HEADERS
            | Capability.REPLY
        )


class FakeSubscription(FakeOptions, frozen=True):
    subject: str = ""

    @property
    def destination(self) -> str:
        return self.subject


class FakePublicationOptions(PublicationSpec, frozen=True, kw_only=True):
    def prefixed(self, prefix: str) -> FakePublicationOptions:
        return self


class FakePublication(FakePublicationOptions, frozen=True):
    subject: str = ""

    @property
    def destination(self) -> str:
        return self.subject


class FakePublishOptions(PublishCommand, kw_only=True):
    pass


class FakePublish(FakePublishOptions):
    message: Any = None
    subject: str = ""

    @property
    def destination(self) -> str:
        return self.subject

    @destination.setter
    def destination(self, value: str) -> None:
        self.subject = value


class FakeIntake:
    def __init__(self) -> None:
        self.acks = 0

    async def pause(self) -> int:
        return 0

    async def close(self) -> None:
        pass

    async def settle(self, raw: Any, how: Settlement, delay: float | None, /, **o: Any) -> None:
        if how is Settlement.ACK:
            self.acks += 1

    async def touch(self, raw: Any, /) -> None:
        pass

    async def begun(self, raw: Any, /) -> bool:
        return True

    async def lag(self) -> int | None:
        return None


class FakeDriver:
    name: ClassVar[str] = "fake"
    syntax: ClassVar[AddressSyntax] = AddressSyntax()
    command: ClassVar[type[PublishCommand]] = FakePublish

    def __init__(self) -> None:
        self.clock: Clock = LoopClock()
        self.notify: Callable[[str, str], None] = lambda event, reason: None
        self.sinks: list[Sink] = []
        self.intakes: list[FakeIntake] = []
        self.published = 0

    def describe(self) -> str:
        return "fake://"

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def ping(self, timeout: float) -> bool:
        return True

    async def declare(self, specs: Sequence[Spec]) -> None:
        pass

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> FakeIntake:
        self.sinks.append(sink)
        self.intakes.append(FakeIntake())
        return self.intakes[-1]

    async def publish(self, command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        self.published += 1

    async def request(
        self, command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        return Raw(data)

    def reply_envelope(self) -> type[Message[Any]]:
        return FakeMessage

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        return name or f"{spec.destination}.dlq"

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        return name or f"{spec.destination}.dlq"

    def letters(self, address: str) -> MemoryLetters:
        return MemoryLetters(MemoryDriver(), address)


class FakeEndpoints(Endpoints):
    subscriber = declares(FakeSubscription)
    publisher = produces(FakePublication)


class FakeBroker(FakeEndpoints, Broker):
    publish = sends(FakePublish)
    request = asks(FakePublish)

    def __init__(self, **options: Any) -> None:
        super().__init__(FakeDriver(), **options)
