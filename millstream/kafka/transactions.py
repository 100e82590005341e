"""Exactly-once: what handlers publish, and the offsets of what they handled, all at once.

Nothing is sent while a handler runs: what it publishes waits with its message, a failed attempt's
is dropped, and messages that are done without a gap before them go out together, many in one
transaction. So a transaction is open for milliseconds, no handler waits for one, and one that is
aborted is sent again without any handler having to run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from ..ack import AckPolicy, Settlement
from ..errors import Fenced, SetupError
from ..message import apart
from .client import Broken, Client
from .flow import Flow
from .message import Record
from .offsets import Commit, Partition, Place
from .plan import Plan
from .transactor import Refused, Transactor
from .units import Taking, TransactionalPartition, Unit, gone, publishing_into, take

if TYPE_CHECKING:
    from ..driver import Sink
    from ..subscription import Subscription
    from .driver import KafkaDriver
    from .options import KafkaSubscription

log = logging.getLogger("millstream.kafka")

#: Messages that are done after a transaction before the next one has to end.
BACKLOG = 8000
#: Seconds between two tries of a transaction that was aborted, at first and at most.
AGAIN, AGAIN_MOST = 0.1, 2.0


class Transactional(msgspec.Struct, frozen=True):
    """What a broker says of its transactions.

    Fields:
        id: what the names of its transactional producers begin with.
        timeout_ms: how long one may be open before the cluster aborts it.
    """

    id: str
    timeout_ms: int


class TransactionalFlow(Flow):
    """A subscription whose messages are handled exactly once, as far as Kafka can see."""

    partition = TransactionalPartition

    def __init__(
        self,
        driver: KafkaDriver,
        spec: KafkaSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
        plan: Plan,
    ) -> None:
        super().__init__(driver, spec, sink, lost, plan)
        assert driver.transactional is not None
        base = f"{driver.transactional.id}.{plan.group}.{spec.destination}"
        taken: set[str] = {
            flow.name for flow in driver.flows if isinstance(flow, TransactionalFlow)
        }
        names = itertools.chain([base], (f"{base}.{n}" for n in itertools.count(2)))
        #: The producer's transactional id: the same after a restart.
        self.name: str = next(name for name in names if name not in taken)
        assert isinstance(driver.client, Client)  # the other library has no transactions
        self.transactor = Transactor(driver.client, self.name)
        self._committing = asyncio.Lock()
        self._cut = asyncio.Event()
        self._finished = 0
        #: Messages done since the last transaction; beyond a limit no more are begun before one.
        self._backlog = 0
        self._taken = asyncio.Event()
        self._give, self.sink = sink, self._paced
        # Those of the running transaction, and as many behind them, are no reason to pause: what
        # the client has fetched of a paused partition it throws away.
        self.window += 2 * BACKLOG
        self._noted = 0.0
        #: Another process has our name: nothing is committed any more.
        self._dead = False
        self._failures = 0

    async def start(self) -> None:
        # First of all: what the last owner of this name left open is ended by this.
        await self.transactor.open()
        await super().start()

    def _paced(self, record: Record) -> Awaitable[None]:
        if self._backlog >= BACKLOG and not self.halted:
            return self._give_later(record)
        return self._give(record)

    async def _give_later(self, record: Record) -> None:
        while self._backlog >= BACKLOG and not self.halted:
            self._taken.clear()
            await self._taken.wait()
        await self._give(record)

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        record: Record = raw
        unit: Unit | None = record.unit
        part = record.part
        if part is not None and part.fenced:
            part.running -= 1  # its next owner handles it, and publishes
            self._freed.set()
            if unit is not None:
                self._ended(unit)
            return
        if how is Settlement.NACK and options.get("attempt") is None:
            if unit is not None:
                unit.records.remove(record)
                record.unit = None
                self._ended(unit)
            await super().settle(record, how, delay, **options)
            return
        if how is Settlement.NACK:  # its copy in a retry topic goes out with its offset
            unit = record.unit = unit or Unit(None, [record])
            with publishing_into(self.driver, unit):
                await super().settle(record, how, delay, **options)
        else:
            await super().settle(record, how, delay, **options)
        unit = record.unit
        if unit is not None:
            unit.kept = len(unit.sends)
            self._ended(unit)
        self._finished += record.size
        self._backlog += record.size
        if self._finished >= self.spec.transaction_size:
            self._cut.set()

    def _ended(self, unit: Unit) -> None:
        """Look whether all of a unit has been handled, and whether it can still go out."""
        if not all(record.done or gone(record) for record in reversed(unit.records)):
            return
        unit.owner = None  # its message, and all that hangs on it
        if any(map(gone, unit.records)):  # of a batch; the others are handled again
            for record in reversed(unit.end()):
                if not gone(record):
                    self._give_again(record)

    def undo(self, raw: Any) -> None:
        """An attempt failed: what it published is dropped."""
        records: list[Record] = raw if isinstance(raw, list) else [raw]
        unit: Unit | None = records[0].unit if records else None
        if unit is not None and (isinstance(raw, list) or len(unit.records) == 1):
            unit.drop()

    async def begun(self, raw: Any, /) -> bool:
        # A commit within a transaction's would stand although it is the older one.
        async with self._committing:
            return await super().begun(raw)

    async def _ask(self) -> None:
        async with self._committing:
            await super()._ask()

    # Committing

    async def _commit_now_and_then(self) -> None:
        interval, size = self.spec.transaction_interval_ms / 1000, self.spec.transaction_size
        while not self._dead:
            self._cut.clear()
            if self._finished < size:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await self._cut.wait()
            if not self._dirty:
                continue
            if not await self.transact():
                self._failures += 1
                await asyncio.sleep(min(AGAIN * 2 ** min(self._failures, 10), AGAIN_MOST))
            else:
                self._failures = 0

    async def commit(self) -> None:
        """Tell the group what is done."""
        await self.transact()

    async def transact(self) -> bool:
        """Send what is ready in a transaction; False if that has to be tried again."""
        try:
            return await self._transact()
        finally:  # what could not go waits for something that has to be begun first
            self._backlog = 0
            self._taken.set()

    async def _transact(self) -> bool:
        async with self._committing:
            if self._dead:
                return True
            self._dirty, self._finished = False, 0
            taking = take(self.parts.values())  # type: ignore[arg-type]
            sends = [unit.sends for unit in taking.units]
            if not any(sends) and not (taking.counts and self.plan.partitions):
                await self._commit_plainly(taking)
                self._look_for_more(taking)
                return True
            member = self.reader.member
            commits = [p.commit(base=p.behind(n)) for p, n in taking.counts.items()]
            try:
                await self.transactor.run(sends, commits, member)
            except Broken as error:
                self._dirty = True
                return await self._aborted(error, taking)
            self._advance(taking)
            for commit in commits:
                part = self.parts.get(Place(commit.topic, commit.partition))
                if part is not None:  # not gone meanwhile
                    part.committed = commit
            self._look_for_more(taking)
            return True

    def _look_for_more(self, taking: Taking) -> None:
        """Go on at once where something that is done had to wait for this transaction."""
        if any(part.open and part.open[0].done for part in self.parts.values()):
            self._dirty = True
            if taking.counts:
                self._finished = self.spec.transaction_size

    def _advance(self, taking: Taking) -> None:
        for part, count in taking.counts.items():
            part.advance(count)
            if part.paused and self._held(part.open) < self.window // 2:
                part.paused = False
                if not part.fenced:
                    self.reader.halt(part.place, False)
        for unit in taking.units:
            unit.end()

    async def _commit_plainly(self, taking: Taking) -> None:
        """Nothing is to be published: the group's own commit is cheaper."""
        self._advance(taking)
        now = asyncio.get_running_loop().time()
        if taking.counts or now > self._noted + self.spec.auto_commit_interval_ms / 1000:
            self._noted = now
            await super().commit()
        else:
            self._dirty = True

    async def _aborted(self, error: Broken, taking: Taking) -> bool:
        """Nothing of a transaction is visible; what now?"""
        if error.code == "_FENCED":
            self._dead = True
            self._lose(
                Fenced(
                    f"{self.spec.destination}: another process has the transactional id "
                    f"{self.name!r}; each process needs a transactional_id= of its own"
                )
            )
            return True
        if error.fatal:
            self._dead = True
            self._lose(error)
            return True
        log.debug("%s: transaction aborted: %s", self.spec.destination, error)
        if isinstance(error, Refused):
            self._blame(error, taking)
            return True
        self.driver.notify("error", f"{self.spec.destination}: transaction aborted: {error}")
        with contextlib.suppress(Broken, TimeoutError):
            async with asyncio.timeout(2.0):
                await self.reader.refresh()
        return False

    def _blame(self, error: Refused, taking: Taking) -> None:
        """Find whose messages the cluster refused; those are handled again, and told why."""
        for unit in (taking.units[number] for number in error.which):
            if not unit.alone:  # others of the same request are refused with it
                unit.alone = True
                continue
            for record in reversed(unit.end()):
                for single in self._give_again(record):
                    fresh = single.unit = Unit(None, [single])
                    fresh.refusal = error

    def _give_again(self, record: Record) -> list[Record]:
        """Have messages handled once more that were done already."""
        record.done = record.given = False
        singles: list[Record] = apart([record])
        for single in reversed(singles):
            single.count, single.tries = max(single.count, single.tries) + 1, 0
            single.unusual = True
            self._again(single)
        return singles

    # Partitions that go

    async def losing(self, places: Sequence[Place], *, gone: bool) -> list[Commit]:
        parts = [self.parts[place] for place in places if place in self.parts]
        commits = await super().losing(places, gone=gone)
        lost = (record.unit for part in parts for record in part.open)
        for unit in {id(unit): unit for unit in lost if unit is not None}.values():
            self._ended(unit)
        self._taken.set()
        return commits

    async def pause(self) -> int:
        self._taken.set()
        return await super().pause()

    async def _finish(self, parts: list[Partition]) -> bool:
        """Let what runs end, and bring what is done over the line."""
        await super()._finish(parts)
        if self._dead:
            return False
        return await self.transact() and not self._dead

    async def seek(self, where: int | str | datetime, only: Sequence[Place] = ()) -> None:
        await self.transact()  # what is done stays done
        await super().seek(where, only)

    async def close(self) -> None:
        await super().close()
        await self.transactor.close()


def check(subscription: Subscription) -> None:
    """Raise a :class:`SetupError` for what cannot be exactly once."""
    spec: Any = subscription.spec
    if spec.group_id is None:
        return
    policy = subscription.failing.policy
    if policy in (AckPolicy.MANUAL, AckPolicy.ACK_FIRST):
        raise SetupError(
            f"ack_policy={policy} in a transaction, which begins with the handler's first "
            "publication and ends with its acknowledgement",
            where=subscription.where,
            fix="leave ack_policy out, or use a broker without transactional_id=",
        )
    if spec.isolation_level != "read_committed":
        raise SetupError(
            f"isolation_level={spec.isolation_level!r} in a transaction, whose offsets might be "
            "those of one that is aborted yet",
            where=subscription.where,
            fix="leave isolation_level out",
        )
    if spec.transaction_size < 1 or spec.transaction_interval_ms <= 0:
        raise SetupError(
            f"transaction_size={spec.transaction_size}, "
            f"transaction_interval_ms={spec.transaction_interval_ms}",
            where=subscription.where,
            fix="both are above 0",
        )
    for handler in subscription.subscriber.handlers:
        for publisher in handler.publishers:
            target = publisher.publication(subscription.scope.chain).broker
            if target is not subscription.broker:
                raise SetupError(
                    f"{publisher.spec.destination!r} belongs to {target.driver.describe()}, "
                    "which the transaction does not reach",
                    where=subscription.where,
                    fix="use a publisher of this broker, or a broker without transactional_id= "
                    "where a message may be published twice",
                )
