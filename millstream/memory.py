"""The broker inside the process: an embedded bus, and what all other brokers are in tests.

A subscription is *plain* (it gets what is published while it listens, at most once) or
*durable* (its messages are stored until they are acknowledged, at least once).
"""

from __future__ import annotations

import asyncio
import math
import operator
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Unpack

import msgspec

from .ack import Settlement
from .address import Address, AddressSyntax
from .broker import Broker, BrokerOptions
from .clock import Clock, LoopClock, Timer
from .driver import (
    CANCELLED,
    Capability,
    PublicationSpec,
    PublishCommand,
    Sink,
    Spec,
    SubscriptionSpec,
)
from .endpoints import Endpoints, Router, asks, declares, produces, sends
from .errors import (
    AddressError,
    MessageTooLarge,
    NoLetters,
    NoResponders,
    NotConnected,
    PublishTimeout,
    RequestTimeout,
    SetupError,
)
from .letters import REPLAY_TO, Letter
from .message import Link, Message, new_id

#: Seconds a publisher waits for room when nothing else is said.
_PATIENCE = 5.0
#: Messages that one subscription handles before others get their turn.
_SHARE = 8
_PLAIN = Capability.HEADERS | Capability.REPLY | Capability.GROUPS
_DURABLE = (
    Capability.ACK
    | Capability.NACK
    | Capability.NACK_DELAY
    | Capability.REJECT
    | Capability.TOUCH
    | Capability.DELIVERY_COUNT
)


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
        group: subscriptions with the same group share the messages.
        durable: the name of the store; subscriptions with the same name share it.
        ack_wait: seconds until an unsettled message is delivered again; infinite means when
            its consumer ends.
        max_deliver: deliveries after which the store gives a message up; 0 is no limit.
        replay: which of the kept messages of its addresses a new store begins with; ``latest``
            is the newest of each address, ``last`` the newest of all.
        kept: the log that keeps the messages, settled or not; the store then takes only what
            the log does.
        acks: whether the store waits for acknowledgements.
        temporary: the store is not made before there is a subscription.
    """

    patterns: tuple[str, ...]
    group: str = ""
    durable: str = ""
    ack_wait: float = 30.0
    max_deliver: int = 0
    replay: str = "all"
    kept: str = ""
    acks: bool = True
    temporary: bool = False


class Entry:
    """One message on its way to one taker: a plain subscription, or a store."""

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
    """The messages of one durable name, until they are acknowledged."""

    def __init__(self, source: Source, addresses: Sequence[Address], log: Log | None) -> None:
        self.source = source
        self.addresses = addresses
        self.log = log
        self.ready: deque[Entry] = deque()
        self.unsettled: set[Entry] = set()
        self.members: list[MemoryIntake] = []

    def wants(self, destination: str) -> bool:
        return _match(self.addresses, destination) and (
            self.log is None or _match(self.log.addresses, destination)
        )

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
            open_ = [m for m in self.members if len(m.fetched) < m.prefetch]
            if not open_:
                return
            entry = self.ready.popleft()
            if entry.done:
                continue
            member = _least(open_, self.members)
            self.unsettled.add(entry)
            member.take(entry)

    def finish(self, entry: Entry) -> None:
        entry.done = True
        _cancel(entry)
        self.unsettled.discard(entry)

    def again(self, entry: Entry, delay: float, clock: Clock) -> None:
        """Deliver a message again after ``delay`` seconds."""
        _cancel(entry)
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


def _cancel(entry: Entry) -> None:
    if entry.timer is not None:
        entry.timer.cancel()
        entry.timer = None


def _least(some: list[MemoryIntake], members: list[MemoryIntake]) -> MemoryIntake:
    """The least loaded of ``some``; it goes to the end of ``members``, so that ties take turns."""
    member = min(some, key=lambda m: m.load)
    members.remove(member)
    members.append(member)
    return member


class Log:
    """The newest messages of some addresses, kept whether they are settled or not."""

    def __init__(self, addresses: Sequence[Address], size: int) -> None:
        self.addresses = addresses
        self.records: deque[Record] = deque(maxlen=size)


class MemoryBus:
    """The topics of one process; brokers that are given the same bus talk to each other.

    Args:
        backlog: messages that may wait for one plain subscription; a publisher of more
            waits for room.
        kept: how many dead letters (and other kept messages) are held of each address.
    """

    def __init__(self, *, backlog: int = 65_536, kept: int = 10_000) -> None:
        self.backlog = backlog
        self.kept = kept
        self.plain: list[MemoryIntake] = []
        self.stores: dict[str, Store] = {}
        self.logs: dict[str, Log] = {}
        self.inboxes: dict[str, asyncio.Future[Record]] = {}
        #: Publishers that wait for room.
        self.waiting: list[asyncio.Future[None]] = []
        self.sequence = 0

    def make_room(self) -> None:
        """Let the waiting publishers look again."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            _wake(future)

    def keep(self, name: str, addresses: Sequence[Address]) -> Log:
        """Keep the messages of some addresses from now on, under a name."""
        log = self.logs.get(name)
        if log is None:
            log = self.logs[name] = Log(addresses, self.kept)
        else:
            log.addresses = _union(log.addresses, addresses)
        return log

    def records(self, destination: str) -> list[Record]:
        """The kept messages that were sent to an address, such as that of dead letters."""
        return [record for record in self._kept() if record.destination == destination]

    def keeps(self, destination: str) -> bool:
        """Whether what is sent to an address is kept."""
        return any(_match(log.addresses, destination) for log in self.logs.values())

    def forget(self, destination: str, sequence: int) -> bool:
        """Keep a message no longer; False if it was not kept."""
        found = False
        for log in self.logs.values():
            for record in list(log.records):
                if record.sequence == sequence and record.destination == destination:
                    log.records.remove(record)
                    found = True
        return found

    def store(self, source: Source, addresses: Sequence[Address]) -> Store:
        """The store of a durable source, made on first use."""
        store = self.stores.get(source.durable)
        if store is not None:
            if {a.pattern for a in store.addresses} != {a.pattern for a in addresses}:
                raise SetupError(
                    f"the durable {source.durable!r} is for {store.source.patterns[0]!r}, "
                    f"not for {source.patterns[0]!r}",
                    fix="give each address a durable of its own",
                )
            return store
        store = self.stores[source.durable] = Store(source, addresses, self.logs.get(source.kept))
        records = [record for record in self._kept() if store.wants(record.destination)]
        if source.replay == "latest":
            records = [*{record.destination: record for record in records}.values()]
        for record in {"none": [], "last": records[-1:]}.get(source.replay, records):
            store.put(Entry(record, store))
        return store

    def _kept(self) -> list[Record]:
        kept = {r.sequence: r for log in self.logs.values() for r in log.records}
        return [kept[sequence] for sequence in sorted(kept)]

    def takers(self, destination: str) -> tuple[list[MemoryIntake], list[Store]]:
        """Who gets a message for an address: one member of each group, and each store."""
        chosen: list[MemoryIntake] = []
        groups: dict[str, list[MemoryIntake]] = {}
        for intake in self.plain:
            if _match(intake.addresses, destination):
                if intake.source.group:
                    groups.setdefault(intake.source.group, []).append(intake)
                else:
                    chosen.append(intake)
        chosen.extend(_least(members, self.plain) for members in groups.values())
        return chosen, [s for s in self.stores.values() if s.wants(destination)]


def _match(addresses: Iterable[Address], destination: str) -> bool:
    return any(address.matches(destination) for address in addresses)


def _union(some: Sequence[Address], others: Sequence[Address]) -> list[Address]:
    return list({address.template: address for address in (*some, *others)}.values())


class MemoryIntake:
    """One subscription: a task that hands what was fetched to the sink, one after another."""

    def __init__(
        self,
        driver: MemoryDriver,
        spec: SubscriptionSpec,
        sink: Sink,
        lost: Callable[[Exception], None],
    ) -> None:
        self.driver, self.spec, self.sink, self.lost = driver, spec, sink, lost
        self.bus = driver.bus
        self.source = driver.source(spec)
        self.addresses = driver.compile(self.source)
        self.prefetch = spec.prefetch
        self.fetched: deque[Entry] = deque()
        #: What the sink has at the moment.
        self.given: Entry | None = None
        #: What was given and may not be settled, where there is no deadline.
        self._held: set[Entry] = set()
        self.paused = False
        #: Resolved to wake the task up.
        self._idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.store = self.bus.store(self.source, self.addresses) if self.source.durable else None
        self._members = self.bus.plain if self.store is None else self.store.members
        self._members.append(self)
        self.task = asyncio.get_running_loop().create_task(self._run())
        if self.store is not None:
            self.store.dispatch()

    @property
    def load(self) -> int:
        """Messages that this member has not finished taking."""
        return len(self.fetched) + (self.given is not None)

    @property
    def full(self) -> bool:
        return len(self.fetched) >= self.bus.backlog

    def take(self, entry: Entry) -> None:
        self.fetched.append(entry)
        _wake(self._idle)

    async def _run(self) -> None:
        try:
            count = 0
            while not (self.paused and not self.fetched):
                if self.fetched:
                    await self._give(self.fetched.popleft())
                    count += 1
                    if count % _SHARE == 0:  # handlers that never wait must not stop all else
                        await asyncio.sleep(0)
                else:
                    self._idle = asyncio.get_running_loop().create_future()
                    await self._idle
        except Exception as error:
            self._leave()
            self.lost(error)

    async def _give(self, entry: Entry) -> None:
        if entry.done:  # acknowledged after its deadline
            if self.store is not None:
                self.store.dispatch()
            return
        self.given = entry
        if self.store is not None:
            self.store.dispatch()
        elif self.bus.waiting:
            self.bus.make_room()
        delivery = entry.current = Delivery(entry)
        entry.count += 1
        if self.store is not None and not self.source.acks:
            self.store.finish(entry)
        self._watch(delivery)
        try:
            await self.sink(self.driver.raw(delivery, self.source))
        finally:
            self.given = None
            if self.store is None:
                entry.done = True

    def _watch(self, delivery: Delivery) -> None:
        entry = delivery.entry
        if self.store is not None and not entry.done:
            if self.source.ack_wait == math.inf:
                self._held = {e for e in self._held if not e.done} | {entry}
                return
            _cancel(entry)
            entry.timer = self.driver.clock.call_later(
                self.source.ack_wait, self.store.again, entry, 0.0, self.driver.clock
            )

    def _leave(self) -> None:
        self.paused = True
        if self in self._members:
            self._members.remove(self)
        self.bus.make_room()
        _wake(self._idle)

    async def pause(self) -> int:
        self._leave()
        if self.store is None:
            if asyncio.current_task() is not self.task:
                await asyncio.wait([self.task])
            return 0
        back = list(self.fetched)
        self.fetched.clear()
        self.store.unsettled.difference_update(back)
        self.store.put_back(back)
        return len(back)

    async def close(self) -> None:
        self._leave()
        if self.store is not None:
            await self.pause()
        self.fetched.clear()
        if asyncio.current_task() is not self.task:
            self.task.cancel()
            await asyncio.wait([self.task], timeout=CANCELLED)
        for entry in self._held:
            if self.store is not None and entry.current is not None and not entry.done:
                self.store.again(entry, 0.0, self.driver.clock)

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        delivery: Delivery = getattr(raw, "delivery", raw)
        entry, store = delivery.entry, delivery.entry.store
        if store is None or entry.done or how is Settlement.NONE:
            return
        if how is not Settlement.NACK:
            store.finish(entry)
        elif entry.current is delivery:
            store.again(entry, delay or 0.0, self.driver.clock)

    async def touch(self, raw: Any, /) -> None:
        delivery: Delivery = getattr(raw, "delivery", raw)
        if delivery.entry.current is delivery:
            self._watch(delivery)

    async def begun(self, raw: Any, /) -> bool:
        entry = getattr(raw, "delivery", raw).entry
        before, entry.begun = entry.begun, True
        return bool(before)

    async def lag(self) -> int | None:
        return len(self.fetched) + (0 if self.store is None else len(self.store.ready))


class MemoryLetters:
    """The dead letters of one address of the bus; they end with the process."""

    def __init__(self, driver: MemoryDriver, address: str) -> None:
        self.driver, self.address = driver, address
        self._link = Link(driver, None)

    def _records(self) -> list[Record]:
        if not self.driver.bus.keeps(self.address):
            raise NoLetters(f"nothing keeps {self.address!r} in this process")
        return self.driver.bus.records(self.address)

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        driver, first = self.driver, int(after or 0)
        for record in [r for r in self._records() if r.sequence > first][:limit]:
            raw = driver.raw(Delivery(Entry(record)), None)
            stored = datetime.fromtimestamp(record.timestamp, UTC)
            message = driver.reply_envelope()(raw, self._link)
            yield Letter(str(record.sequence), message, stored)

    async def count(self) -> int:
        return len(self._records())

    async def remove(self, id: str) -> bool:
        return self.driver.bus.forget(self.address, int(id))

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        command = self.driver.command()
        taken = await self.driver._send(command, letter.origin, letter.message.body, headers, "")
        if not taken and not self.driver.bus.keeps(letter.origin):
            raise NoResponders(f"nobody listens at {letter.origin!r}")


class MemoryMessage(Message[Delivery]):
    """A message of the memory broker."""

    __slots__ = ()
    marked: ClassVar[Any] = property(operator.attrgetter("raw.marked"))
    unusual: ClassVar[Any] = property(operator.attrgetter("raw.unusual"))

    @property
    def body(self) -> bytes:
        return self.raw.record.body

    @property
    def headers(self) -> Mapping[str, str]:
        return self.raw.record.headers

    @property
    def destination(self) -> str:
        return self.raw.record.destination

    @property
    def reply_to(self) -> str:
        return self.raw.record.reply_to

    @property
    def delivery_count(self) -> int:
        return self.raw.count

    @property
    def timestamp(self) -> datetime | None:
        return datetime.fromtimestamp(self.raw.record.timestamp, UTC)


class MemorySubscriptionOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a subscription to the memory broker, besides its subject.

    Fields:
        durable: store messages under this name until they are acknowledged. The store is
            made when the subscription is declared, and shared by all subscriptions that
            give the same name.
        ack_deadline: seconds until an unsettled message of a durable is delivered again.
    """

    durable: str | None = None
    ack_deadline: float = 30.0


class MemorySubscription(MemorySubscriptionOptions, frozen=True):
    """A subscription to the memory broker.

    Fields:
        subject: an address such as ``orders.{region}``; ``*`` is one segment, ``>`` the rest.
        queue: subscriptions with the same queue share the messages.
    """

    subject: str
    queue: str = ""

    def prefixed(self, prefix: str) -> MemorySubscription:
        return msgspec.structs.replace(self, subject=prefix + self.subject)

    @property
    def destination(self) -> str:
        return self.subject

    @property
    def envelope(self) -> type[MemoryMessage]:
        return MemoryMessage

    @property
    def capabilities(self) -> Capability:
        return _PLAIN if self.durable is None else _PLAIN | _DURABLE

    @property
    def ack_wait(self) -> float | None:
        return None if self.durable is None else self.ack_deadline

    def check(self) -> None:
        if self.durable == "":
            raise SetupError("the durable has no name", fix='give one, such as durable="invoices"')
        if self.durable is not None and self.queue:
            raise SetupError(
                f"durable={self.durable!r} and queue={self.queue!r} exclude each other",
                fix="leave out queue: subscriptions with the same durable share the messages",
            )
        if self.ack_deadline <= 0:
            raise SetupError(
                f"ack_deadline={self.ack_deadline}", fix="give it in seconds, more than 0"
            )


class MemoryPublication(PublicationSpec, frozen=True):
    """A declared publication to the memory broker.

    Fields:
        subject: where the messages go.
    """

    subject: str

    def prefixed(self, prefix: str) -> MemoryPublication:
        return msgspec.structs.replace(self, subject=prefix + self.subject)

    @property
    def destination(self) -> str:
        return self.subject


class MemoryPublish(PublishCommand):
    """One message to the memory broker.

    Fields:
        message: the body.
        subject: where it goes.
    """

    message: Any = None
    subject: str = ""

    @property
    def destination(self) -> str:
        return self.subject

    @destination.setter
    def destination(self, value: str) -> None:
        self.subject = value


class MemoryRequest(MemoryPublish, kw_only=True):
    """One request.

    Fields:
        response_model: the type of the answer's body; the whole message without one.
    """

    response_model: Any = None


class MemoryDriver:
    """Topics in this process.

    A subclass gives them the address rules and the raw objects of another broker, by the
    class's attributes and by ``source``, ``raw`` and ``reply_envelope``.

    Args:
        bus: the topics; its own by default.
        clock: what all delays and deadlines go by.
    """

    name: ClassVar[str] = "memory"
    syntax: ClassVar[AddressSyntax] = AddressSyntax()
    command: ClassVar[type[PublishCommand]] = MemoryPublish
    control_headers: ClassVar[str | tuple[str, ...]] = ""
    #: Bytes of the largest body and its headers; 0 is no limit.
    max_payload: int = 0

    def __init__(self, bus: MemoryBus | None = None, *, clock: Clock | None = None) -> None:
        self.bus = bus if bus is not None else MemoryBus()
        self.clock: Clock = clock if clock is not None else LoopClock()
        self.notify: Callable[[str, str], None] = lambda event, reason: None
        #: Called with each message for each of its takers, before they get it.
        self.routed: Callable[[Entry], None] = lambda entry: None
        self.connected = False
        self._intakes: list[MemoryIntake] = []

    # What another broker's double overrides

    def source(self, spec: Any) -> Source:
        """Where a subscription takes its messages from."""
        return Source(
            patterns=(spec.destination,),
            group=spec.queue,
            durable=spec.durable or "",
            ack_wait=spec.ack_deadline,
        )

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        """The object that the message class wraps; ``source`` is None for a reply."""
        return delivery

    def reply_envelope(self) -> type[Message[Any]]:
        return MemoryMessage

    # The driver

    def compile(self, source: Source) -> list[Address]:
        return [self.syntax.compile(pattern) for pattern in source.patterns]

    def describe(self) -> str:
        return f"{self.name} (in memory)" if self.name != "memory" else "memory"

    async def connect(self) -> None:
        self.connected = True

    async def close(self) -> None:
        self.connected = False
        for intake in self._intakes:
            await intake.close()
        self._intakes.clear()

    async def ping(self, timeout: float) -> bool:
        return self.connected

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            if isinstance(spec, SubscriptionSpec):
                source = self.source(spec)
                addresses = self.compile(source)
                if source.kept:
                    self.bus.keep(source.kept, addresses)
                if source.durable and not source.temporary:
                    self.bus.store(source, addresses)

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> MemoryIntake:
        self._check_connected()
        intake = MemoryIntake(self, spec, sink, lost)
        self._intakes = [i for i in self._intakes if not i.task.done()]
        self._intakes.append(intake)
        return intake

    async def publish(self, command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        await self._send(command, command.destination, data, headers, command.reply_to)
        return None

    async def request(
        self, command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        inbox = f"_INBOX.{new_id()}"
        future = asyncio.get_running_loop().create_future()
        self.bus.inboxes[inbox] = future
        late = RequestTimeout(f"no reply from {command.destination!r} within {timeout:g} s")
        timer = self.clock.call_later(timeout, _expire, future, late)
        try:
            if not await self._send(command, command.destination, data, headers, inbox):
                raise NoResponders(f"nobody listens at {command.destination!r}")
            return self.raw(Delivery(Entry(await future)), None)
        finally:
            timer.cancel()
            del self.bus.inboxes[inbox]

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        address = name or f"{_literal(spec.destination, self.syntax)}.dlq"
        if declare:
            self.bus.keep(f"dead letters: {address}", [self.syntax.compile(address)])
        return address

    def letters(self, address: str) -> MemoryLetters:
        return MemoryLetters(self, address)

    # Sending

    def _check_connected(self) -> None:
        if not self.connected:
            raise NotConnected(
                f"the {self.name} broker is not connected: start it, or `await broker.connect()`",
                state="closed",
                wanted="connected",
            )

    async def _send(
        self,
        command: PublishCommand,
        destination: str,
        data: bytes,
        headers: dict[str, str] | None,
        reply_to: str,
    ) -> int:
        """Send a message and return how many takers it has."""
        self._check_connected()
        self._check_address(destination)
        if self.max_payload:
            size = len(data) + sum(len(k) + len(v) + 4 for k, v in (headers or {}).items())
            if size > self.max_payload:
                raise MessageTooLarge(
                    f"{size} bytes to {destination!r}: the broker takes {self.max_payload} at most"
                )
        await self._wait_for_room(destination, command.timeout)
        bus = self.bus
        bus.sequence += 1
        record = Record(
            destination, data, dict(headers or {}), reply_to, bus.sequence, self.clock.wall()
        )
        inbox = bus.inboxes.get(destination)
        if inbox is not None:
            if not inbox.done():
                inbox.set_result(record)
            return 1
        for log in bus.logs.values():
            if _match(log.addresses, destination):
                log.records.append(record)
        intakes, stores = bus.takers(destination)
        for intake in intakes:
            entry = Entry(record)
            self.routed(entry)
            intake.take(entry)
        for store in stores:
            entry = Entry(record, store)
            self.routed(entry)
            store.put(entry)
        return len(intakes) + len(stores)

    def _check_address(self, destination: str) -> None:
        segments = destination.split(self.syntax.separator)
        if not destination or self.syntax.one in segments or self.syntax.rest in segments:
            raise AddressError(
                f"a message cannot be sent to {destination!r}",
                fix="give an address without wildcards",
            )

    async def _wait_for_room(self, destination: str, timeout: float | None) -> None:
        """Wait while a plain subscription is too far behind."""
        patience = _PATIENCE if timeout is None else timeout
        end = self.clock.now() + patience
        while full := [i for i in self.bus.plain if i.full and _match(i.addresses, destination)]:
            left = end - self.clock.now()
            if left <= 0:
                raise PublishTimeout(
                    f"{len(full[0].fetched)} messages wait for {full[0].spec.destination!r}, and "
                    f"there was no room for another one within {patience:g} s"
                )
            room = asyncio.get_running_loop().create_future()
            self.bus.waiting.append(room)
            timer = self.clock.call_later(left, _wake, room)
            try:
                await room
            finally:
                timer.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _expire(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _literal(template: str, syntax: AddressSyntax) -> str:
    """An address that messages can be sent to, made from a pattern."""
    words = {syntax.one: "any", syntax.rest: "all"}
    segments = template.split(syntax.separator)
    return syntax.separator.join(words.get(s, s.strip("{}")) for s in segments)


class MemoryEndpoints(Endpoints):
    """What a memory broker and its routers can declare."""

    subscriber = declares(MemorySubscription)
    publisher = produces(MemoryPublication)


class MemoryRouter(MemoryEndpoints, Router):
    """Declarations to be included in a :class:`MemoryBroker` or another router."""


class MemoryBroker(MemoryEndpoints, Broker):
    """A broker inside this process.

    Args:
        bus: the topics; brokers that are given the same bus talk to each other, others
            share nothing.
        options: the options of every broker.
    """

    publish = sends(MemoryPublish)
    request = asks(MemoryRequest)

    def __init__(self, bus: MemoryBus | None = None, **options: Unpack[BrokerOptions]) -> None:
        super().__init__(MemoryDriver(bus), **options)
