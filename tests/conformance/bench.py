"""What the behaviours are tried on: a broker of some kind, its addresses and its time.

A new broker adds a module with its `Kind`s to the package `kinds` and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from millstream.broker import Broker
from millstream.clock import VirtualClock
from millstream.driver import Capability
from tests.helpers import eventually, unique


@dataclass(frozen=True)
class Kind:
    """One kind of source of one broker.

    ``make(bench, url)`` returns a new broker on the same server (or bus) each time;
    ``run(bench)`` is the context in which all brokers of the bench run; ``source(bench,
    address, group)`` are the options that make ``subscriber(address, ...)`` a source of this
    kind, those of one ``group`` sharing the messages; ``address`` among them replaces the address
    where a source is more than that.
    """

    name: str
    capabilities: Capability
    make: Callable[[Bench], Any]
    run: Callable[[Bench], AbstractAsyncContextManager[Any]]
    source: Callable[[Bench, str, str], dict[str, Any]]
    #: The fixture that gives the server, for real brokers.
    server: str | None = None
    #: Bytes of a message that the broker refuses.
    too_large: int = 0
    #: Options of `publish` that have the message stored, where that is said; a stream of NATS
    #: answers every request by itself, so no handler of such a kind does.
    stored: Callable[[Bench], dict[str, Any]] | None = None
    #: The default address of an address's dead letters.
    dead: Callable[[Bench, str], str] = lambda bench, address: f"{address}.dlq"
    separator: str = "."
    #: The options of a plain subscription to an address.
    plain: Callable[[Bench, str], dict[str, Any]] = lambda bench, address: {}
    #: What sources of this kind cannot be: "patterns" (an address is one place), "fan-out" (each
    #: message goes to one taker), "absence" (nobody tells that a request has no taker),
    #: "hand-over" (what one member of a group left goes to no other), "letter order" (who looks at
    #: some dead letters finds them behind the others the next time).
    lacks: frozenset[str] = frozenset()

    @property
    def cannot(self) -> frozenset[str]:
        """The same; a test broker keeps what it sees for assertions ("forgetting")."""
        return self.lacks | {"forgetting"} if self.name.startswith("test-") else self.lacks


@dataclass
class Bench:
    """Two brokers of one kind on the same server; behaviours declare, then start."""

    kind: Kind
    url: str = ""
    clock: VirtualClock | None = None
    prefix: str = field(default_factory=unique)
    #: Shared by all brokers of the bench where the kind needs something to share.
    shared: Any = None
    _count: Any = field(default_factory=lambda: itertools.count(1))
    _running: AbstractAsyncContextManager[Any] | None = None

    def __post_init__(self) -> None:
        self.broker: Any = self.kind.make(self)
        self.second: Any = self.kind.make(self)

    @property
    def brokers(self) -> tuple[Broker, Broker]:
        return self.broker, self.second

    def address(self, *segments: str) -> str:
        """An address of this test's own; segments may be placeholders."""
        return self.kind.separator.join((self.prefix, *segments))

    def subscriber(self, address: str, *, group: str = "", on: Any = None, **options: Any) -> Any:
        """Declare a subscription of the bench's kind."""
        group_name = group or f"own-{next(self._count)}"
        source = self.kind.source(self, address, group_name if group or self.acks else "")
        return (on or self.broker).subscriber(
            source.pop("address", address), **{**source, **options}
        )

    def capture(self, address: str) -> Any:
        """Declare a plain subscription to what is sent to an address, stored or not."""
        plain = self.kind.plain(self, address)
        return self.broker.subscriber(plain.pop("address", address), **plain)

    @property
    def stored(self) -> dict[str, Any]:
        return self.kind.stored(self) if self.kind.stored is not None else {}

    @property
    def acks(self) -> bool:
        return Capability.ACK in self.kind.capabilities

    async def start(self) -> None:
        self._running = self.kind.run(self)
        await self._running.__aenter__()

    async def stop(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            await running.__aexit__(None, None, None)

    # Time

    def now(self) -> float:
        return self.clock.now() if self.clock is not None else time.monotonic()

    async def until(self, condition: Callable[[], Any], within: float = 5.0) -> Any:
        """Wait for a condition for at most ``within`` seconds of the bench's time."""
        if self.clock is None:
            return await eventually(condition, within)
        end = self.clock.now() + within
        while True:
            await self.clock.settle()
            value = condition()
            if value:
                return value
            assert self.clock.now() < end, f"not true within {within} s; last: {value!r}"
            await self.clock.advance(0.05)

    async def quiet(self, seconds: float = 0.3) -> None:
        """Let some time pass in which something unwanted would show."""
        if self.clock is None:
            await asyncio.sleep(seconds)
        else:
            await self.clock.advance(seconds)

    async def within(self, work: Awaitable[Any], seconds: float = 5.0) -> Any:
        """Run something that takes the bench's time and return its result."""
        task = asyncio.ensure_future(work)
        await self.until(task.done, seconds)
        return await task


@asynccontextmanager
async def started(bench: Bench) -> AsyncIterator[None]:
    """The brokers run by themselves."""
    try:
        for broker in bench.brokers:
            await broker.start()
        yield
    finally:
        for broker in bench.brokers:
            await broker.stop()
