"""Topics inside the process: the engine of the memory broker and of all test brokers.

A subscription takes its messages from a store: one of its own, or one with a name that several
share. A store that waits for acknowledgements keeps a message until it is settled (at least
once); another gives each message away once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..ack import Settlement
from ..address import Address
from ..base import Feed
from ..clock import Clock, Timer, wake
from ..driver import Sink, SubscriptionSpec
from ..errors import PublishTimeout, SetupError
from ..letters import REPLAY_TO

if TYPE_CHECKING:
    from .driver import MemoryDriver

_log = logging.getLogger("millstream.memory")
#: Messages that one subscription handles before others get their turn.
_SHARE = 8


class Record(msgspec.Struct, frozen=True):
    """What was published; ``sequence`` counts the messages of the bus."""

    destination: str
    body: bytes
    headers: Mapping[str, str]
    reply_to: str
    sequence: int
    #: Seconds since the epoch, by the publisher's clock.
    timestamp: float


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a subscription takes its messages from.

    Fields:
        patterns: addresses, wildcards and placeholders allowed.
        group: of the stores with the same group one gets a message.
        durable: the name of the store; subscriptions with the same name share it. Without one
            the subscription has its own, which ends with it.
        ack_wait: seconds until an unsettled message is delivered again; infinite means when
            its consumer ends. None means that nothing is acknowledged.
        max_deliver: deliveries after which the store gives a message up; 0 is no limit.
        replay: which of the kept messages of its addresses a new store begins with: ``all``,
            ``none``, ``last`` (the newest) or ``latest`` (the newest of each address).
        kept: the log that keeps the messages, settled or not; the store then takes only what
            the log does.
        without: addresses that the patterns take and that it does not.
    """

    patterns: tuple[str, ...]
    without: tuple[str, ...] = ()
    group: str = ""
    durable: str = ""
    ack_wait: float | None = None
    max_deliver: int = 0
    replay: str = "none"
    kept: str = ""

    @property
    def stored(self) -> bool:
        """Whether what was not fetched waits somewhere else than in this process."""
        return bool(self.durable or self.kept)


class Entry:
    """One message on its way through one store; of a letter or a reply, through none."""

    __slots__ = ("begun", "cause", "count", "current", "done", "record", "store", "timer")

    def __init__(self, record: Record, store: Store | None = None) -> None:
        self.record = record
        self.store = store
        #: The number of the next delivery.
        self.count = 1
        #: The delivery that is being handled; None while the message waits.
        self.current: Delivery | None = None
        #: The ack deadline, or the delay before a redelivery.
        self.timer: Timer | None = None
        self.done = False
        #: Whether its last attempt has begun.
        self.begun = False
        #: Free for whoever watches the bus.
        self.cause: Any = None

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @property
    def waiting(self) -> bool:
        """Whether the next delivery is due now."""
        return not (self.store is None or self.done or self.current or self.timer)


class Delivery:
    """One handing over of a message, ``count`` from 1: the raw object of :class:`MemoryMessage`.

    A driver that makes its raw objects look like another client's hangs it on them as
    their attribute ``delivery``.
    """

    __slots__ = ("count", "entry", "marked", "record", "unusual")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.record = entry.record
        self.count = entry.count
        self.marked = REPLAY_TO in entry.record.headers
        self.unusual = self.marked or self.count > 1


class Store:
    """The messages of one source, until they are acknowledged or given away."""

    def __init__(
        self, source: Source, addresses: Sequence[Address], log: Sequence[Address] | None
    ) -> None:
        self.source = source
        self.addresses = addresses
        self.log = log
        self.ready: deque[Entry] = deque()
        self.unsettled: set[Entry] = set()
        self.members: list[MemoryIntake] = []

    def wants(self, destination: str) -> bool:
        return (
            matches(self.addresses, destination)
            and (self.log is None or matches(self.log, destination))
            and destination not in self.source.without
        )

    @property
    def load(self) -> int:
        """Messages that nobody has finished taking."""
        return len(self.ready) + sum(member.load for member in self.members)

    def put(self, entry: Entry) -> None:
        self.ready.append(entry)
        self.dispatch()

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Make messages available again, before all others."""
        self.ready.extendleft(reversed(list(entries)))
        self.dispatch()

    def dispatch(self) -> None:
        """Hand messages to the members with room, the least loaded first, in turn."""
        while self.ready:
            open_ = [m for m in self.members if len(m.waiting) < m.prefetch]
            if not open_:
                return
            entry = self.ready.popleft()
            if entry.done:
                continue
            self.unsettled.add(entry)
            _least(open_, self.members).put(entry)

    def finish(self, entry: Entry) -> None:
        entry.done = True
        entry.stop_timer()
        self.unsettled.discard(entry)

    def again(self, entry: Entry, delay: float, clock: Clock) -> None:
        """Deliver a message again after ``delay`` seconds."""
        entry.stop_timer()
        entry.current = None
        if self.source.max_deliver and entry.count > self.source.max_deliver:
            self.finish(entry)
        elif delay > 0:
            entry.timer = clock.call_later(delay, self._due, entry)
        else:
            self._due(entry)

    def _due(self, entry: Entry) -> None:
        entry.timer = None
        self.unsettled.discard(entry)
        self.put_back((entry,))


T = TypeVar("T", "Store", "MemoryIntake")


def _least(some: list[T], all_: list[T]) -> T:
    """The least loaded of ``some``; it goes to the end of ``all_``, so that ties take turns."""
    chosen = min(some, key=lambda m: m.load)
    all_.remove(chosen)
    all_.append(chosen)
    return chosen


class MemoryBus:
    """The topics of one process; brokers that are given the same bus talk to each other.

    Args:
        backlog: messages that may wait for one subscription without acknowledgements; a
            publisher of more waits for room.
        kept: how many dead letters (and other kept messages) are held of each address.
    """

    def __init__(self, *, backlog: int = 65_536, kept: int = 10_000) -> None:
        self.backlog = backlog
        self.kept = kept
        #: The stores with a name, and those that belong to one subscription.
        self.stores: dict[str, Store] = {}
        self.own: list[Store] = []
        #: The name of a log → the addresses whose messages it keeps, settled or not.
        self.logs: dict[str, list[Address]] = {}
        #: An address → what is kept of it.
        self.held: dict[str, deque[Record]] = {}
        self.inboxes: dict[str, asyncio.Future[Record]] = {}
        #: Publishers that wait for room.
        self.waiting: list[asyncio.Future[None]] = []
        self.sequence = 0

    # Logs

    def keep(self, name: str, addresses: Iterable[Address]) -> None:
        """Keep the messages of some addresses from now on, under a name."""
        log = self.logs.setdefault(name, [])
        known = {address.template for address in log}
        log += [address for address in addresses if address.template not in known]

    def keeps(self, destination: str) -> bool:
        """Whether what is sent to an address is kept."""
        return any(matches(log, destination) for log in self.logs.values())

    def records(self, destination: str) -> list[Record]:
        """The kept messages that were sent to an address, such as that of dead letters."""
        return list(self.held.get(destination, ()))

    def forget(self, destination: str, sequence: int) -> bool:
        """Keep a message no longer; False if it was not kept."""
        records = self.held.get(destination, deque())
        for record in records:
            if record.sequence == sequence:
                records.remove(record)
                return True
        return False

    # Stores

    def store(self, source: Source, addresses: Sequence[Address]) -> Store:
        """The store of a source, made on first use.

        Raises:
            SetupError: the store of this name is for other addresses.
        """
        store = self.stores.get(source.durable)
        if store is not None:
            if {a.pattern for a in store.addresses} != {a.pattern for a in addresses}:
                raise SetupError(
                    f"the durable {source.durable!r} is for {store.source.patterns[0]!r}, "
                    f"not for {source.patterns[0]!r}",
                    fix="give each address a durable of its own",
                )
            return store
        store = Store(source, addresses, self.logs.get(source.kept))
        if source.durable:
            self.stores[source.durable] = store
        else:
            self.own.append(store)
        kept = [r for found in self.held.values() for r in found if store.wants(r.destination)]
        kept.sort(key=lambda record: record.sequence)
        if source.replay == "latest":
            kept = [*{record.destination: record for record in kept}.values()]
        for record in {"none": [], "last": kept[-1:]}.get(source.replay, kept):
            store.put(Entry(record, store))
        return store

    def takers(self, destination: str) -> list[Store]:
        """The stores that get a message for an address: of each group, one."""
        chosen: list[Store] = []
        groups: dict[str, list[Store]] = {}
        for store in [*self.own, *self.stores.values()]:
            if store.wants(destination):
                if store.source.group:
                    groups.setdefault(store.source.group, []).append(store)
                else:
                    chosen.append(store)
        return chosen + [_least(group, self.own) for group in groups.values()]

    # Room

    async def room(self, destination: str, patience: float, clock: Clock) -> None:
        """Wait while a subscription that has no store elsewhere is too far behind.

        Raises:
            PublishTimeout: it still is after ``patience`` seconds.
        """
        end = clock.now() + patience
        while full := [s for s in self.own if self._full(s) and s.wants(destination)]:
            left = end - clock.now()
            if left <= 0:
                raise PublishTimeout(
                    f"{full[0].load} messages wait for {full[0].source.patterns[0]!r}, and "
                    f"there was no room for another one within {patience:g} s"
                )
            room = asyncio.get_running_loop().create_future()
            self.waiting.append(room)
            timer = clock.call_later(left, wake, room)
            try:
                await room
            finally:
                timer.cancel()

    def _full(self, store: Store) -> bool:
        return not store.source.stored and any(
            len(member.waiting) >= self.backlog for member in store.members
        )

    def make_room(self) -> None:
        """Let the waiting publishers look again."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            wake(future)


def matches(addresses: Iterable[Address], destination: str) -> bool:
    """Whether one of some addresses takes what is sent to another."""
    return any(address.matches(destination) for address in addresses)


class MemoryIntake(Feed):
    """One subscription: what was fetched waits, and goes to the sink one after another."""

    def __init__(
        self,
        driver: MemoryDriver,
        spec: SubscriptionSpec,
        sink: Sink,
        lost: Callable[[Exception], None],
    ) -> None:
        self.driver, self.spec, self.lost = driver, spec, lost
        self.bus = driver.bus
        self.source = driver.source(spec)
        self.prefetch = spec.prefetch if self.source.stored else math.inf
        #: What the sink has at the moment.
        self.at_hand: Entry | None = None
        #: What was given and may not be settled, where there is no deadline.
        self._held: set[Entry] = set()
        self.store = self.bus.store(self.source, driver.compile(self.source))
        super().__init__(spec.destination, sink, _log)
        self.store.members.append(self)
        self.store.dispatch()

    @property
    def load(self) -> int:
        """Messages that this member has not finished taking."""
        return len(self.waiting) + (self.at_hand is not None)

    @property
    def over(self) -> bool:
        """Whether the sink has nothing of it any more, nor will get anything."""
        return self._task.done()

    def ended(self) -> bool:
        return not self.waiting

    async def give(self, raw: Any) -> None:
        entry: Entry = raw
        if entry.done:  # acknowledged after its deadline
            self.store.dispatch()
            return
        self.at_hand = entry
        self.store.dispatch()
        self.bus.make_room()
        delivery = entry.current = Delivery(entry)
        entry.count += 1
        self._watch(delivery)
        try:
            await self.sink(self.driver.raw(delivery, self.source))
        except Exception as error:
            self._leave()
            self.lost(error)
        finally:
            self.at_hand = None
        self.given += 1
        if self.given % _SHARE == 0:  # handlers that never wait must not stop all else
            await asyncio.sleep(0)

    def _watch(self, delivery: Delivery) -> None:
        """Begin the time in which a message has to be settled."""
        entry, seconds, clock = delivery.entry, self.source.ack_wait, self.driver.clock
        if seconds is None:
            self.store.finish(entry)
        elif seconds == math.inf:
            self._held = {e for e in self._held if not e.done} | {entry}
        else:
            entry.stop_timer()
            entry.timer = clock.call_later(seconds, self.store.again, entry, 0.0, clock)

    def _leave(self) -> None:
        self.paused = True
        if self in self.store.members:
            self.store.members.remove(self)
        if self.store in self.bus.own:
            self.bus.own.remove(self.store)
        self.bus.make_room()
        self.wake()

    def _give_back(self) -> int:
        back = list(self.waiting)
        self.waiting.clear()
        self.store.unsettled.difference_update(back)
        self.store.put_back(back)
        return len(back)

    async def pause(self) -> int:
        self._leave()
        if self.source.ack_wait is not None:
            return self._give_back()
        await self.finish()
        return 0

    async def close(self) -> None:
        self._leave()
        self._give_back()
        await self.cut_off()
        for entry in self._held:
            if entry.current is not None and not entry.done:
                self.store.again(entry, 0.0, self.driver.clock)

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        delivery: Delivery = getattr(raw, "delivery", raw)
        entry = delivery.entry
        if entry.done or how is Settlement.NONE:
            return
        if options:
            how = self.driver.settlement(how, options)
        if how is not Settlement.NACK:
            self.store.finish(entry)
        elif entry.current is delivery:
            self.store.again(entry, delay or 0.0, self.driver.clock)

    async def touch(self, raw: Any, /) -> None:
        delivery: Delivery = getattr(raw, "delivery", raw)
        if delivery.entry.current is delivery and not delivery.entry.done:
            self._watch(delivery)

    async def ours(self, raws: list[Any], /) -> list[Any]:
        return [raw for raw in raws if self._has(getattr(raw, "delivery", raw))]

    def _has(self, delivery: Delivery) -> bool:
        entry = delivery.entry
        return self.source.ack_wait is None or (entry.current is delivery and not entry.done)

    async def begun(self, raw: Any, /) -> bool:
        entry = getattr(raw, "delivery", raw).entry
        before, entry.begun = entry.begun, True
        return bool(before)

    async def lag(self) -> int | None:
        return len(self.waiting) + len(self.store.ready)
