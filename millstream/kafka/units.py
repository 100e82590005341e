"""What is published while messages are handled, and which of it can go out together."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from ..driver import Driver
from ..errors import MessageTooLarge, PublishError, StateError
from ..message import BatchMessage, Message, current
from .client import Broken
from .message import Record, RecordMetadata, Send
from .offsets import Partition


class Transacting(Driver, Protocol):
    """A driver that can publish several messages at once, or none of them."""

    async def transact(self, sends: Sequence[Any]) -> None: ...


class Unit:
    """Messages that are handled together, mostly one, and what was published meanwhile.

    Args:
        owner: the message, or the batch, that its handler has; None once that is done.
        records: what is done when this may go out, bundles as such; none for an explicit
            transaction.
    """

    __slots__ = ("alone", "kept", "owner", "records", "refusal", "sends")

    def __init__(self, owner: Any, records: list[Record]) -> None:
        self.owner, self.records = owner, records
        self.sends: list[Any] = []
        #: How many of them a later failure does not take back.
        self.kept = 0
        #: It goes out in a transaction of its own, since one with others was refused.
        self.alone = False
        #: Why the cluster did not take what the last attempt published.
        self.refusal: Broken | None = None

    def end(self) -> list[Record]:
        """Let go of the records, which know it as well, and are no garbage collector's."""
        records, self.records = self.records, []
        for record in records:
            if record.unit is self:
                record.unit = None
        return records

    def drop(self) -> None:
        """Forget what was published since the last success."""
        del self.sends[self.kept :]

    def add(self, send: Send, largest: int) -> RecordMetadata:
        """Have a message wait.

        Raises:
            MessageTooLarge: it is larger than the producer takes.
            PublishError: the cluster refused what the last attempt published.
        """
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            kind = MessageTooLarge if "TOO_LARGE" in refusal.code else PublishError
            raise kind(f"{send.topic!r} was not published: {refusal}")
        size = len(send.value or b"") + len(send.key or b"")
        if send.pairs:
            size += sum(len(name) + len(value) for name, value in send.pairs)
        if size > largest:
            raise MessageTooLarge(f"{send.topic!r}: {size} bytes, at most {largest} are taken")
        self.sends.append(send)
        return RecordMetadata(send.topic, send.partition, -1)


#: The explicit transaction that the running task is in.
_opened: ContextVar[tuple[Transacting, Unit] | None] = ContextVar("kafka_transaction", default=None)


@contextlib.contextmanager
def publishing_into(driver: Transacting, unit: Unit) -> Iterator[None]:
    """What the block publishes waits there."""
    token = _opened.set((driver, unit))
    try:
        yield
    finally:
        _opened.reset(token)


def unit_of(driver: Transacting) -> Unit | None:
    """Where a publication of the running task is to wait; None where it goes out at once."""
    opened = _opened.get()
    if opened is not None and opened[0] is driver:
        return opened[1]
    message = current.get()
    if message is None or message.settled is not None or message.link.driver is not driver:
        return None
    # All of a batch are looked at once, not for each publication.
    first: Any = next(_records(message), None)
    if not isinstance(getattr(first, "part", None), TransactionalPartition):
        return None
    unit: Unit | None = first.unit
    if unit is None or unit.owner is not message:
        records = list(_records(message))
        known: Iterable[Unit | None] = (record.unit for record in records)
        refusal = next((u.refusal for u in known if u is not None and u.refusal), None)
        unit = Unit(message, records)
        unit.refusal = refusal
        for record in records:
            record.unit = unit
    return unit


def _records(message: Message[Any]) -> Iterator[Record]:
    if not isinstance(message, BatchMessage):
        return iter((message.raw,))
    bundles: Any = message.bundles
    return iter(bundles) if bundles is not None else (one.raw for one in message.messages)


def gone(record: Record) -> bool:
    """Whether a message is somebody else's by now."""
    return record.part is None or record.part.fenced


class TransactionalPartition(Partition):
    """A partition whose messages stay until their transaction is committed."""

    __slots__ = ()
    notes_done = False

    def finish(self, record: Record) -> None:
        record.done = True

    def replace(self, bundle: Record, others: Sequence[Record]) -> None:
        super().replace(bundle, others)
        unit: Unit | None = bundle.unit
        if unit is not None:
            at = unit.records.index(bundle)
            unit.records[at : at + 1] = others
            for record in others:
                record.unit = unit

    def forget(self) -> None:
        for record in self.open:
            if record.unit is not None:
                record.unit.end()
        super().forget()

    def ready(self) -> int:
        """How many records are done without a gap."""
        count = 0
        for record in self.open:
            if not record.done:
                break
            count += 1
        return count

    def behind(self, count: int) -> int:
        """The offset behind the first records."""
        return self.open[count - 1].offset + 1 if count else self.committable

    def advance(self, count: int) -> None:
        """The first records are done, and the group knows."""
        for _ in range(count):
            self.committable = self.open.popleft().offset + 1
        if self.crashes and self.committable >= self.suspects:
            self.crashes = 0


class Taking(NamedTuple):
    """What goes into one transaction: the units, and how many records of each partition."""

    units: list[Unit]
    counts: dict[TransactionalPartition, int]


def take(parts: Iterable[TransactionalPartition]) -> Taking:
    """What can go out now: units of which everything is done, and nothing before it is missing."""
    parts = [part for part in parts if not part.fenced and part.open]
    lone = _lone(parts)
    if lone is not None:
        return lone
    counts = {part: part.ready() for part in parts}
    changed = True
    units: dict[Unit, bool] = {}
    while changed:  # a unit that has to wait keeps back what is behind it
        changed = False
        units.clear()
        for part, count in counts.items():
            for index, record in enumerate(itertools.islice(part.open, count)):
                unit = record.unit
                if unit is None:
                    continue
                if unit not in units:
                    units[unit] = not unit.alone and _covered(unit, counts)
                if not units[unit]:
                    counts[part], changed = index, True
                    break
    return Taking(list(units), {part: n for part, n in counts.items() if n})


def _lone(parts: list[TransactionalPartition]) -> Taking | None:
    """A unit that goes by itself, where it is the first of all its partitions."""
    for part in parts:
        unit: Unit | None = part.open[0].unit
        if unit is None or not unit.alone or not all(r.done for r in unit.records):
            continue
        counts: dict[TransactionalPartition, int] = {}
        for record in unit.records:
            assert isinstance(record.part, TransactionalPartition)
            counts[record.part] = counts.get(record.part, 0) + 1
        firsts = (r for p, n in counts.items() for r in itertools.islice(p.open, n))
        if all(record.unit is unit for record in firsts):
            return Taking([unit], counts)
    return None


def _covered(unit: Unit, counts: dict[TransactionalPartition, int]) -> bool:
    """Whether all messages of a unit are among those that are taken."""
    if len(unit.records) == 1:
        return True
    for record in unit.records:
        part = record.part
        assert isinstance(part, TransactionalPartition)
        if not record.done or record.offset >= part.behind(counts.get(part, 0)):
            return False
    return True


@contextlib.asynccontextmanager
async def opened(driver: Transacting) -> AsyncIterator[None]:
    """What the block publishes becomes visible at its end, all at once; see the broker.

    Raises:
        StateError: the task is in a transaction already.
        Fenced: another process has the same transactional id.
        PublishError: the transaction was aborted.
    """
    if _opened.get() is not None or unit_of(driver) is not None:
        raise StateError("a transaction within another", wanted="outside of a transaction")
    unit = Unit(None, [])
    with publishing_into(driver, unit):
        yield
    if unit.sends:
        await driver.transact(unit.sends)
