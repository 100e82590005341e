"""How messages get from Kafka to the sink, and what the group is told of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from ..ack import Settlement
from ..driver import CANCELLED, Batch, Capability, Sink
from ..errors import SetupError
from ..message import new_id
from .client import Broken
from .message import Record
from .offsets import Commit, Partition, Place, Start
from .plan import Plan

if TYPE_CHECKING:
    from .driver import KafkaDriver
    from .options import KafkaSubscription

log = logging.getLogger("millstream.kafka")

#: Messages given to the sink in one go before other tasks get a turn.
TURN = 128
#: Messages that wait here before the reader reads no more, and before it reads again.
FULL, ROOM = 3000, 1000
#: Seconds between two commits, and for how long, of a partition whose last owner vanished: what
#: kills a process is found sooner when less is done twice before it.
CAREFUL, CAREFUL_FOR = 0.05, 30.0
#: Seconds that a start waits for its place in the group.
JOINED = 5.0
#: Seconds that it takes longer if it is refused meanwhile.
REFUSED = 1.0
_RIGHTS = "grant the user to read the topic and the group (docs/kafka.md, Security)"
#: Errors that no retry heals, and what does.
_DENIED = {
    "TOPIC_AUTHORIZATION_FAILED": _RIGHTS,
    "GROUP_AUTHORIZATION_FAILED": _RIGHTS,
    "INVALID_SESSION_TIMEOUT": "a session_timeout_ms between the cluster's "
    "group.min.session.timeout.ms and group.max.session.timeout.ms",
}
_MISSING = ("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "UNKNOWN_TOPIC_ID")


class Flow:
    """One subscription: what was read waits here, and is given to the sink one after another."""

    partition: ClassVar[type[Partition]] = Partition
    #: Whether messages for batches may be kept account of in bundles.
    bundles: ClassVar[bool] = True

    def __init__(
        self,
        driver: KafkaDriver,
        spec: KafkaSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
        plan: Plan,
    ) -> None:
        self.driver, self.spec, self.sink, self.lost, self.plan = driver, spec, sink, lost, plan
        self.settles = Capability.ACK in spec.capabilities
        self.parts: dict[Place, Partition] = {}
        #: Partitions that went, with what we know of them, in case that they come back.
        self._left: dict[Place, Partition] = {}
        #: What our notes are signed with.
        self._name = new_id()[-8:]
        self._confirming = asyncio.Lock()
        #: What was read and not given to the sink.
        self.buffer: deque[Record] = deque()
        self.halted = False
        #: Messages of a partition that are not done before no more of it is read.
        self.window = spec.window
        #: How many messages a bundle has at most; 0 for no bundles.
        self.bundle = 0
        bundling = self.bundles and driver.client.bundles is not None
        if isinstance(spec.batch, Batch) and self.settles and bundling:
            self.bundle = spec.batch.size
        #: The topic of all messages, where there is but one.
        self._only = plan.topics[0] if len(plan.topics) == 1 and not spec.wild else None
        self.reader = driver.client.reader(plan, self)
        self._full = False
        self._given: Record | None = None
        self._wake: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pumping: asyncio.Task[Any] | None = None
        #: Records that come again later, each with its timer.
        self._later: dict[int, tuple[Record, asyncio.TimerHandle]] = {}
        self._freed = asyncio.Event()
        #: How many wait for that event.
        self._awaited = 0
        self._dirty = False
        self._careful_until = 0.0
        #: Set when partitions came for the first time, or none will.
        self._assigned = asyncio.Event()
        self._told: set[str] = set()

    async def start(self) -> None:
        """Begin to read; a member of a group may have to wait for its partitions."""
        self._pumping = self._spawn(self._pump())
        if self.settles:
            self._spawn(self._commit_now_and_then())
        if self.spec.group_protocol == "consumer":
            self._spawn(self._watch([t for t in self.plan.topics if not t.startswith("^")]))
        await self.reader.start()
        try:
            async with asyncio.timeout(JOINED):
                await self._assigned.wait()
        except TimeoutError:  # no reason not to start
            log.info(
                "%s: waits for partitions; the group %r is being shared out, which takes up to "
                "session_timeout_ms if a member vanished",
                self.spec.destination,
                self.plan.group,
            )
        if self.halted:  # refused; what begins anew is no storm
            await asyncio.sleep(REFUSED)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("on the side: %r", error)
            if not self.halted:
                self.lost(error if isinstance(error, Exception) else RuntimeError(str(error)))

    # What the reader tells

    def arrived(self, messages: list[Any]) -> None:
        if self.halted:
            return
        client = self.driver.client
        if self.bundle and client.bundles is not None:
            self.buffer.extend(client.bundles(messages, self.parts, self.bundle, self._only))
        else:
            self.buffer.extend(client.records(messages, self.parts))
        for part in self.parts.values():
            if not self.settles:
                part.open.clear()
            elif not part.paused and self._held(part.open) >= self.window:
                part.paused = True
                self.reader.halt(part.place, True)
        if not self._full and self._held(self.buffer) > FULL:
            self._full = True
        self.reader.hold(self._full)
        self._wake_up()

    def _held(self, records: Collection[Record]) -> int:
        """How many messages those are."""
        return sum(record.size for record in records) if self.bundle else len(records)

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def gained(self, starts: Sequence[Start]) -> list[Start]:
        known: dict[Place, Partition] = {}
        for start in starts:
            left = self._left.pop(Place(start.topic, start.partition), None)
            if left is not None and left.signed(start.note):
                known[left.place] = left
            elif left is not None:
                left.forget()
        await self._end(list(known.values()))
        begin: list[Start] = []
        for start in starts:
            place = Place(start.topic, start.partition)
            left = known.get(place)
            part = left.again() if left is not None else self._part(start)
            if left is not None:
                left.forget()
            self.parts[place] = part
            begin.append(start._replace(offset=part.next))
            if part.crashes:
                self._careful_until = asyncio.get_running_loop().time() + CAREFUL_FOR
        self._assigned.set()
        if self.settles and not self.halted:
            self._spawn(self.commit())
        await self._call(("on_assign", "on_partitions_assigned"), starts)
        return begin

    def _part(self, start: Start) -> Partition:
        place = Place(start.topic, start.partition)
        return self.partition(place, start.offset, start.note, self._name)

    async def losing(self, places: Sequence[Place], *, gone: bool) -> list[Commit]:
        parts = [self.parts[p] for p in places if p in self.parts]
        # What was read but not begun belongs to the next owner.
        self.buffer = deque(r for r in self.buffer if r.part not in parts)
        self._look_for_room()
        orderly = self.settles and not gone
        if orderly:
            await self._call(("on_revoke", "on_partitions_revoked"), places)
            orderly = await self._finish(parts)
        commits = [part.commit(leaving=True) for part in parts]
        for part in parts:
            part.leave()
            self._left[part.place] = part
            self.parts.pop(part.place, None)
        for key, (record, timer) in list(self._later.items()):
            if record.part is not None and record.part.fenced:
                timer.cancel()
                del self._later[key]
        if gone and parts:
            await self._call(("on_lost",), places)
            log.warning(
                "%s: %d partitions went to another member without notice; what runs of them "
                "will run there again",
                self.spec.destination,
                len(parts),
            )
        return commits if orderly else []

    def fence(self, places: Sequence[Place]) -> None:
        for place in places:
            part = self.parts.get(place)
            if part is not None:
                part.fenced = True

    async def _finish(self, parts: list[Partition]) -> bool:
        """Let what runs of some partitions end, within the time for that.

        Returns whether what is done of them may be committed.
        """
        await self._end(parts)
        return True

    async def _end(self, parts: list[Partition]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.spec.revoke_timeout_ms / 1000):
                self._awaited += 1
                try:
                    while any(part.running for part in parts) and not self.halted:
                        self._freed.clear()
                        await self._freed.wait()
                finally:
                    self._awaited -= 1

    async def _call(self, names: tuple[str, ...], places: Sequence[Any]) -> None:
        """Call the user's own functions with the partitions."""
        function = getattr(self.spec, names[0])
        if function is None and self.spec.listener is not None:
            function = getattr(self.spec.listener, names[-1], None)
        if function is None:
            return
        from .options import TopicPartition

        try:
            result = function([TopicPartition(p[0], p[1]) for p in places])
            if hasattr(result, "__await__"):
                await result
        except Exception:
            log.exception("%s of %s failed", names[0], self.spec.destination)

    def failed(self, error: Broken) -> None:
        if self.halted:
            return
        if error.code in _DENIED:
            fault = SetupError(f"{self.spec.destination}: {error}", fix=_DENIED[error.code])
            self._lose(fault)
        elif error.fatal:
            self._lose(error)
        elif error.code in _MISSING:
            self._spawn(self._made_again())
        elif error.code not in self._told:
            self._told.add(error.code)
            self.driver.notify("error", f"{self.spec.destination}: {error}")

    def _lose(self, error: Exception) -> None:
        self.halted = True
        self._assigned.set()  # a start waits for nothing any more
        self.lost(error)

    async def _made_again(self) -> None:
        """A topic that was deleted is made again."""
        before = dict(self.parts)
        made = await self.driver.ensure([self.spec])
        if made:
            log.warning("%s was gone and is made again", ", ".join(made))
            self._replaced(made, before)

    def _replaced(self, topics: Collection[str], before: Mapping[Place, Partition]) -> bool:
        """Begin anew if we still have partitions of topics that are others now."""
        # The group may have noticed, and have given us the new ones.
        old = [p for at, p in before.items() if at.topic in topics and self.parts.get(at) is p]
        for part in old:  # nothing is to be committed of what was there before
            part.fenced = True
            del self.parts[part.place]
        if old:
            self._lose(Broken(f"{', '.join(topics)} was deleted and is another topic now"))
        return bool(old)

    async def _watch(self, topics: list[str]) -> None:
        """Look whether topics are deleted and made again.

        With this protocol the library does not tell, and reads nothing of them any more.
        """
        known: dict[str, str] = {}
        held: dict[Place, Partition] = {}  # of those that were there when we looked
        while topics:
            now = dict(self.parts)
            try:
                found = await self.driver.client.ids(topics)
                if known.keys() - found.keys():
                    await self._made_again()
            except Broken as error:
                log.debug("%s: not looked after: %s", self.spec.destination, error)
                found = {}
            other = {name for name in found if known.get(name, found[name]) != found[name]}
            if self._replaced(other, held):
                return
            if not other:
                held = now
            known |= found
            await asyncio.sleep(self.plan.refresh)

    # To the sink

    async def _pump(self) -> None:
        count, sink, settles = 0, self.sink, self.settles
        loop, reader, now = asyncio.get_running_loop(), self.reader, time.monotonic
        while True:
            buffer = self.buffer
            if not buffer or self.halted:
                self._wake = loop.create_future()
                await self._wake
                continue
            if now() > reader.trusted:
                await self._confirm()
                continue
            record = buffer.popleft()
            if self._full and len(buffer) < ROOM:
                self._look_for_room()
            part = record.part
            if part is None or part.fenced or record.done:
                continue
            if record.pairs is not None and self._aside(record):
                continue
            if settles:
                part.running += 1
                record.given = self._dirty = True
                if record.offset >= part.given:
                    part.given = record.offset + 1
            await sink(record)
            count += 1
            if count % TURN == 0:  # handlers that never wait must not stop all else
                await asyncio.sleep(0)

    async def _confirm(self) -> None:
        """Begin nothing before the group has said that we are still in it.

        We stood still, or it does not answer: what waits here may be somebody else's by now, and
        the library does not know yet. A commit is the question that only a member is answered.
        """
        async with self._confirming:
            while time.monotonic() > self.reader.trusted and not self.halted:
                try:
                    await self._ask()
                except Broken as error:
                    log.debug("%s: not confirmed: %s", self.spec.destination, error)
                    if error.code not in (*_DENIED, *_MISSING):  # those are said to members only
                        await asyncio.sleep(CAREFUL)
                        continue
                self.reader.trust()

    async def _ask(self) -> None:
        if commits := [part.commit() for part in self.parts.values()]:
            await self.reader.commit(commits)

    async def ours(self, raws: list[Any], /) -> list[Any]:
        if time.monotonic() > self.reader.trusted:
            await self._confirm()
        left = []
        for raw in raws:
            part: Partition | None = raw.part
            if part is None or not part.fenced:
                left.append(raw)
            else:
                self._back(raw, part, 0.0, unbegun=True)
        return left

    def _look_for_room(self) -> None:
        if self._full and self._held(self.buffer) < ROOM:
            self._full = False
            self.reader.hold(False)

    def _aside(self, record: Record) -> bool:
        """Whether a message of a retry topic is not due yet; it waits here then."""
        return self.driver.retries.opened(record) and self._wait(record, record.due)

    def _wait(self, record: Record, due: float) -> bool:
        delay = due - self.driver.clock.wall()
        if delay <= 0:
            return False
        self._call_later(record, delay)
        return True

    def _call_later(self, record: Record, delay: float) -> None:
        timer = asyncio.get_running_loop().call_later(delay, self._again, record)
        self._later[id(record)] = record, timer

    def _again(self, record: Record) -> None:
        self._later.pop(id(record), None)
        if record.part is not None and not record.part.fenced and not self.halted:
            self.buffer.appendleft(record)
            self._wake_up()

    # Settling

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        part: Partition | None = raw.part
        if part is None or raw.done or not self.settles:
            return
        if how is Settlement.NACK:
            attempt = options.get("attempt")
            if attempt is not None and not part.fenced:
                await self.driver.retries.put(self.spec, raw, attempt, delay or 0.0)
            else:
                self._back(raw, part, delay or 0.0, bool(options.get("unbegun")))
                return
        part.running -= 1
        part.finish(raw)
        self._dirty = True
        if part.paused and self._held(part.open) < self.window // 2:
            part.paused = False
            if not part.fenced:
                self.reader.halt(part.place, False)
        if self._awaited:
            self._freed.set()
        if part.begun and raw.offset in part.begun:
            await self.commit()  # if we die now, nobody is to think that it killed us

    def _back(self, raw: Record, part: Partition, delay: float, unbegun: bool) -> None:
        """A message that failed: again after a while, here or wherever its partition is then."""
        part.running -= 1
        self._freed.set()
        raw.given = False
        if not unbegun:
            raw.count, raw.tries = max(raw.count, raw.tries) + 1, 0
            raw.unusual = True
        if self.halted or part.fenced:
            return
        if delay > 0:
            self._call_later(raw, delay)
        else:
            self._again(raw)

    async def touch(self, raw: Any, /) -> None:
        """No deadline to push back: the reader stays in the group by itself."""

    async def begun(self, raw: Any, /) -> bool:
        part: Partition | None = raw.part
        if part is None:
            return True
        if raw.offset in part.begun:
            return True
        if part.fenced:
            return False  # its next owner's notes are not ours to write
        part.begun.add(raw.offset)
        try:
            await self.reader.commit([part.commit()])
        except Broken as error:  # a later one says it; or the partition is not ours any more
            log.debug("%s: not noted: %s", self.spec.destination, error)
        return False

    # Seeking

    async def seek(self, where: int | str | datetime, only: Sequence[Place] = ()) -> None:
        """Read our partitions from another place; see the subscriber.

        Raises:
            Broken: a partition is not ours any more, or the cluster is away.
        """
        places = [place for place in self.parts if not only or place in only]
        if isinstance(where, int):
            found = dict.fromkeys(places, where)
        elif isinstance(where, datetime):
            found = await self.driver.client.times(places, int(where.timestamp() * 1000))
            if late := [place for place, offset in found.items() if offset < 0]:
                found |= await self.driver.client.ends(late)
        elif where == "beginning":
            found = await self.driver.client.begins(places)
        else:
            found = await self.driver.client.ends(places)
        for place, offset in found.items():
            part = self.parts.get(place)
            if part is not None:
                part.fenced = True  # what was read before counts no more
                await self.reader.seek(place, offset)
                if part.paused:
                    self.reader.halt(place, False)
        if self.settles:
            await self.commit()

    def moved(self, start: Start) -> None:
        place = Place(start.topic, start.partition)
        if place in self.parts:
            self.parts[place] = self._part(start)

    # Committing

    async def _commit_now_and_then(self) -> None:
        loop, interval = asyncio.get_running_loop(), self.spec.auto_commit_interval_ms / 1000
        while True:
            careful = loop.time() < self._careful_until
            await asyncio.sleep(min(CAREFUL, interval) if careful else interval)
            if self._dirty:
                await self.commit()

    async def commit(self) -> None:
        """Tell the group what is done."""
        self._dirty = False
        commits: list[Commit] = []
        parts: list[Partition] = []
        for part in self.parts.values():
            commit = part.commit()
            if commit != part.committed:
                commits.append(commit)
                parts.append(part)
        if not commits:
            return
        try:
            await self.reader.commit(commits)
        except Broken as error:
            log.debug("%s: not committed: %s", self.spec.destination, error)
            self._dirty = True
            if error.code in _DENIED:
                self.failed(error)
            return
        for part, commit in zip(parts, commits, strict=True):
            part.committed = commit

    # Life

    async def pause(self) -> int:
        self.halted = True
        self.reader.hold(True)
        waiting = self._held(self.buffer) + len(self._later) if self.settles else 0
        self.buffer.clear()
        for _, timer in self._later.values():
            timer.cancel()
        self._later.clear()
        return waiting

    async def close(self) -> None:
        await self.pause()
        self.driver.flows.discard(self)
        current = asyncio.current_task()
        if self._pumping is not None and self._pumping is not current:
            self._pumping.cancel()  # a handler that does not end is waited for meanwhile
        begin = asyncio.get_running_loop().time()
        await self.reader.close()
        tasks = [t for t in self._tasks if t is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            left = begin + CANCELLED - asyncio.get_running_loop().time()
            await asyncio.wait(tasks, timeout=max(left, 0.05))
        for part in (*self.parts.values(), *self._left.values()):
            part.forget()

    async def lag(self) -> int | None:
        if not self.settles:
            return None
        places = list(self.parts)
        ends = await self.driver.client.ends(places)
        done = {place: part.committable for place, part in self.parts.items()}
        return sum(max(ends[p] - done.get(p, ends[p]), 0) for p in places if p in ends)
