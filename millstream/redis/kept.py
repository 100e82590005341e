"""Sources that keep a message until it is settled: a stream's group, and a list.

Both work alike. A reader takes from the source into a short queue, a worker gives to the sink
from there, and a ticker says every second that this process lives, and takes what is due again
and what dead processes left. Acknowledgements of one turn of the event loop leave as one command.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from ..ack import Settlement
from ..driver import CANCELLED
from ..errors import MillstreamError
from .flow import MOST, Flow, gone, ids, log
from .message import Entry, is_plain, open_fields, open_value
from .options import sibling
from .scripts import (
    LIST_ACK,
    LIST_LEAVE,
    LIST_NACK,
    LIST_TAKE,
    LIST_TICK,
    STREAM_LEAVE,
    STREAM_MINE,
    STREAM_NACK,
    STREAM_TICK,
    unwrap,
)
from .wire import BROKEN, Lost, cut, reason_of

#: Reading more within FAST seconds doubles what is held ready, after SLOW seconds halves it: a
#: fast handler is never kept waiting, a slow one hoards no more than a moment's work.
FAST, SLOW = 0.02, 0.2
#: Seconds between two signs of life, at most.
BEAT = 1.0
#: Seconds that the server may take to end a read that waits.
LEAVE = 0.5
#: Milliseconds after which an entry is taken over from a consumer that is not Millstream's.
FOREIGN = 60_000
#: Seconds for which the note is kept that a message's last attempt began.
NOTES = 7 * 86_400
#: What an answer that does not come is called.
FAILED = (*BROKEN, RedisError, Lost, MillstreamError)


class Kept(Flow):
    """What a group and a list have in common."""

    def __init__(self, *args: Any, member: str, ack_wait: float) -> None:
        super().__init__(*args)
        self.me, self.ack_wait = member, ack_wait
        spec = self.spec
        self.waiting: deque[Entry] = deque()
        #: Ids of what was taken and not settled, and how often; elements of a list may be equal.
        self.open: dict[bytes, int] = {}
        self.acks: list[bytes] = []
        #: Acknowledgements that are on their way.
        self.flying: set[tuple[bytes, ...]] = set()
        #: Returned messages that Redis does not know of yet: entry, when it is due, was it begun.
        self.unsent: list[tuple[Entry, float, bool]] = []
        self.noted: set[bytes] = set()
        #: When Redis got a sign of life last.
        self.beaten = 0.0
        self.more = False
        self._due, self._missed = -1.0, 0
        self._flushing = self._closed = False
        self._idle: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._tick_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._client = 0
        at_once = spec.lanes * (spec.batch.size if spec.batch else 1)
        stream = spec.stream_sub
        fixed = spec.batch is not None or (stream is not None and stream.max_records is not None)
        self.least = spec.prefetch
        self.most = self.least if fixed else max(self.least, MOST)
        #: How many are held ready. The first is what is begun at once: if that ends this process,
        #: nothing counts as delivered that was only fetched ahead.
        self.target, self.at_once = min(self.least, self.most, at_once), at_once
        self._read_at, self._read_given = 0.0, 0

    # Life

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        await self.ensure()
        await self.tick()
        self._tasks = [loop.create_task(self._work()), loop.create_task(self._beat())]
        if self.reads:
            await super().start()

    @property
    def reads(self) -> bool:
        """Whether anything new is read."""
        return True

    async def ensure(self) -> None:
        """Make what is read from be there."""

    async def _attach(self, connection: AbstractConnection) -> None:
        await connection.send_command("CLIENT", "ID", check_health=False)
        self._client = await self.within(connection, self.driver.patience)
        await self._recover()

    async def _read(self, connection: AbstractConnection) -> None:
        while not self.paused:
            if self._missed > 1:
                await self._recover()
            if len(self.waiting) > self.target // 2:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
                continue
            self._adapt()
            try:
                self._put(await self.take(connection, self.target))
            except ResponseError as error:
                if not gone(error):
                    raise
                await self.rebuild()

    def _adapt(self) -> None:
        now = asyncio.get_running_loop().time()
        since = now - self._read_at
        if since < FAST and self.given > self._read_given:
            self.target = min(self.target * 2, self.most)
        elif since > SLOW:
            self.target = max(self.target // 2, min(self.least, self.most))
        self._read_at, self._read_given = now, self.given

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        """Wait for something new, and take up to ``count`` of it."""
        raise NotImplementedError

    def _put(self, entries: Iterable[Entry]) -> None:
        open = self.open
        for entry in entries:
            open[entry.id] = open.get(entry.id, 0) + 1
            self.waiting.append(entry)
        if self._idle is not None and self.waiting:
            _wake(self._idle)
            self._idle = None

    async def _work(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self.waiting
        while not self.paused:
            if not waiting:
                if self.more:
                    self._tick_now.set()
                self._idle = loop.create_future()
                await self._idle
                continue
            if loop.time() - self.beaten > self.ack_wait:
                await self._stale()
                continue
            entry = waiting.popleft()
            if self._room is not None and len(waiting) <= self.target // 2:
                _wake(self._room)
                self._room = None
            await self.give(entry)

    async def _stale(self) -> None:
        """Nothing was heard of us for too long: what waits may be somebody else's by now."""
        for entry in self.waiting:
            self._release(entry.id)
        self.waiting.clear()
        try:
            await self.tick()
        except FAILED as error:
            log.debug("%s: %s", self.spec.destination, reason_of(error))
            await asyncio.sleep(0.1)
        self._missed = 2  # the reader takes up what is still ours
        if self._room is not None:
            _wake(self._room)
            self._room = None
        else:
            cut(self.connection)

    async def _recover(self) -> None:
        """Take up what is ours at the server, and what this process does not know of.

        Called while nothing is being read, or what is on its way to us would come twice.
        """
        self._missed = 0
        await self.flush()
        self._put(await self.mine())

    async def mine(self) -> list[Entry]:
        """What Redis thinks that we have, and we do not."""
        raise NotImplementedError

    def known(self) -> dict[bytes, int]:
        """What this process has, or has settled and Redis may not know of it yet."""
        known = dict(self.open)
        others = (entry.id for entry, *_ in self.unsent)
        for id in (*self.acks, *(id for some in self.flying for id in some), *others):
            known[id] = known.get(id, 0) + 1
        return known

    async def rebuild(self) -> None:
        """What is read from is gone: make it again."""
        raise NotImplementedError

    # Signs of life

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            wait = min(BEAT, self.ack_wait / 4)
            if self._due >= 0:
                wait = min(wait, max(self._due - loop.time(), 0.0) + 0.002)
            timer = loop.call_later(wait, self._tick_now.set)
            await self._tick_now.wait()
            timer.cancel()
            self._tick_now.clear()
            try:
                await self.tick()
            except ResponseError as error:
                if gone(error):
                    await self._rebuilt()
                else:
                    log.debug("%s: %s", self.spec.destination, error)
            except FAILED as error:
                log.debug("%s: %s", self.spec.destination, reason_of(error))

    async def _rebuilt(self) -> None:
        try:
            await self.rebuild()
        except FAILED as error:
            log.debug("%s: %s", self.spec.destination, reason_of(error))

    async def tick(self) -> None:
        """Say that we live; take what is due, and what the dead left."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await self.flush(wait=False)
        room = 0 if self.paused else max(self.target - len(self.waiting), 0)
        careful = min(room, max(self.at_once - len(self.waiting), 0))
        found, self.more, due, there = await self.claim(room, careful)
        self.beaten = begin
        # Once it may be on its way to us; twice, a connection that broke has swallowed it.
        missing = there > sum(self.known().values()) + len(found)
        self._missed = self._missed + 1 if missing else 0
        self._due = begin + due / 1000 if due >= 0 and room else -1.0
        if self.paused:
            await self._return(found)
        else:
            self._put(found)
            if self._missed > 1 and not self.reads:
                await self._recover()

    async def claim(self, room: int, dead_room: int) -> tuple[list[Entry], bool, float, int]:
        """The sign of life.

        Gives entries, whether the dead left more, ms until something is due, and how many
        unsettled messages Redis thinks that we have.
        """
        raise NotImplementedError

    # Settlement

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        if how is Settlement.ACK or how is Settlement.REJECT:
            id = raw.id
            self._release(id)
            self.acks.append(id)
            if not self._flushing:
                self._flushing = True
                asyncio.get_running_loop().call_soon(self._send_acks)
        elif how is Settlement.NACK:
            await self._again(raw, delay or 0.0, bool(options.get("unbegun")))

    def _release(self, id: bytes) -> None:
        count = self.open.pop(id, 1)
        if count > 1:
            self.open[id] = count - 1

    def _send_acks(self) -> None:
        self._flushing = False
        if not self.acks:
            return
        ids, self.acks = tuple(self.acks), []
        self.flying.add(ids)
        self.acknowledge(ids).add_done_callback(lambda future: self._acked(ids, future))
        if self.noted and (over := self.noted.intersection(ids)):
            self.noted -= over
            self.driver.tell(self.name, "HDEL", self.key("begun"), *map(self.note, over))

    def acknowledge(self, ids: tuple[bytes, ...]) -> asyncio.Future[Any]:
        """Send acknowledgements at once."""
        raise NotImplementedError

    def _acked(self, ids: tuple[bytes, ...], future: asyncio.Future[Any]) -> None:
        self.flying.discard(ids)
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self.acks.extend(ids)  # the ticker tries again
            if isinstance(error, ResponseError):
                self.driver.notify("error", f"{self.spec.destination}: cannot settle: {error}")

    async def flush(self, *, wait: bool = True) -> None:
        """Send what could not be sent before; raises if it still cannot."""
        self._send_acks()
        unsent, self.unsent = self.unsent, []
        if unsent:
            now = asyncio.get_running_loop().time()
            try:
                await self.put_back([(e, max(due - now, 0.0), fresh) for e, due, fresh in unsent])
            except BaseException:
                self.unsent.extend(unsent)
                raise
        if wait and self.flying:
            await self.driver.call(self.name, "PING")

    async def _again(self, entry: Entry, delay: float, fresh: bool) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        try:
            await self.put_back([(entry, delay, fresh)])
        except FAILED as error:
            log.debug("%s: not returned yet: %s", self.spec.destination, reason_of(error))
            self.unsent.append((entry, due, fresh))
        self._release(entry.id)
        if self._due < 0 or due < self._due:
            self._due = due
            loop.call_later(delay + 0.001, self._tick_now.set)

    async def put_back(self, entries: list[tuple[Entry, float, bool]]) -> None:
        """Have messages delivered again: entry, delay in seconds, was it never begun."""
        raise NotImplementedError

    async def _return(self, entries: list[Entry]) -> None:
        """Hand back what was taken and not begun."""
        if entries:
            try:
                await self.put_back([(entry, 0.0, True) for entry in entries])
            except FAILED:
                now = asyncio.get_running_loop().time()
                self.unsent.extend((entry, now, True) for entry in entries)

    async def begun(self, raw: Any, /) -> bool:
        note = self.note(raw.id)
        if not note:
            return False
        try:
            key = self.key("begun")
            fresh = await self.driver.call(self.name, "HSETNX", key, note, 1)
            self.driver.tell(self.name, "EXPIRE", key, NOTES)
        except FAILED as error:
            log.debug("%s: cannot note: %s", self.spec.destination, reason_of(error))
            return False
        self.noted.add(raw.id)
        return not fresh

    def note(self, id: bytes) -> bytes:
        """What tells a message from all others; empty if nothing does."""
        return id

    def key(self, *suffix: str) -> str:
        """The name of a sibling of the source."""
        return sibling(self.name, *suffix)

    # The end

    async def pause(self) -> int:
        if self.paused:
            return 0
        self.paused = True
        if self._idle is not None:
            _wake(self._idle)
        if self._room is not None:
            _wake(self._room)
        await self._interrupt()
        back = list(self.waiting)
        self.waiting.clear()
        for entry in back:
            self._release(entry.id)
        await self._return(back)
        return len(back)

    async def _interrupt(self) -> None:
        """End a read that waits, so that what it still got is known."""
        task = self._task
        if task is None or task.done():
            return
        if self.connection is not None and self._client:
            self.driver.tell(self.name, "CLIENT", "UNBLOCK", self._client)
            await asyncio.wait([task], timeout=LEAVE)
        if not task.done():
            cut(self.connection)
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        await self.pause()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if others := [task for task in self._tasks if task is not asyncio.current_task()]:
            await asyncio.wait(others, timeout=CANCELLED)
        self._closed = True
        await super().close()
        try:
            async with asyncio.timeout(LEAVE):
                await self.flush()
                await self.leave()
        except FAILED as error:
            log.debug("%s: cannot leave: %s", self.spec.destination, reason_of(error))

    async def leave(self) -> None:
        """Say that this member is gone, so that nobody waits for its next sign of life."""
        raise NotImplementedError


class GroupFlow(Kept):
    """A group of a stream."""

    def __init__(self, *args: Any) -> None:
        spec, driver = args[1], args[0]
        sub = spec.stream_sub
        assert sub is not None and sub.group is not None
        super().__init__(*args, member=driver.member(sub.consumer), ack_wait=sub.ack_wait)
        self.sub, self.group = sub, sub.group
        idle = sub.min_idle_time if sub.min_idle_time is not None else sub.claim_min_idle_time
        self.foreign = FOREIGN if idle is None else idle
        #: The last entry that the group is known to have got, and where other members held some,
        #: the first that was not settled then.
        self.last, self.floor = "", b""
        #: What this process had when the group was made again: it comes once more.
        self.had: set[bytes] = set()

    @property
    def reads(self) -> bool:
        return self.sub.min_idle_time is None

    async def ensure(self) -> None:
        await self.driver.groups.ensure(self.sub)

    async def rebuild(self) -> None:
        self.had = set(self.known())
        later = await self.driver.call(self.name, "ZRANGE", self.key(self.group, "later"), 0, -1)
        await self.driver.groups.ensure(
            self.sub,
            again=True,
            last=self.last,
            unsettled=[*self.open, *later, *((self.floor,) if self.floor else ())],
        )

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        await connection.send_command(
            *("XREADGROUP", "GROUP", self.group, self.me, "COUNT", count),
            *("BLOCK", self.driver.block),
            *("STREAMS", self.name, ">"),
            check_health=False,
        )
        found = await self.within(connection, self.driver.longest)
        if not found:
            return []
        name, plain, entries = self.name, self.plain, found[0][1]
        self.last = entries[-1][0].decode()
        out = [
            Entry(name, fields[1], id)
            if plain and is_plain(fields)
            else open_fields(name, id, fields, self.format)
            for id, fields in entries
        ]
        return out if not self.had else [entry for entry in out if self._is_new(entry.id)]

    def _is_new(self, id: bytes) -> bool:
        if id not in self.had:
            return True
        self.had.discard(id)
        if id not in self.open:  # it was settled, and that was lost with the group
            self.acks.append(id)
        return False

    async def put_back(self, entries: list[tuple[Entry, float, bool]]) -> None:
        self.had.difference_update(entry.id for entry, *_ in entries)
        await self._put_back(entries)

    async def claim(self, room: int, dead_room: int) -> tuple[list[Entry], bool, float, int]:
        keys = (self.name, self.key(self.group, "alive"), self.key(self.group, "later"))
        found, more, due, there, last, self.floor = await self.driver.script(
            STREAM_TICK,
            keys,
            *(self.group, self.me, int(self.ack_wait * 1000), room, dead_room, self.foreign),
        )
        if not self.last or ids(last) > ids(self.last):
            self.last = last.decode()
        return self._entries(found), bool(more), due, there

    def _entries(self, found: list[Any]) -> list[Entry]:
        return [
            open_fields(self.name, id, fields, self.format, count) for id, fields, count in found
        ]

    async def mine(self) -> list[Entry]:
        before = self.known()
        pending = await self.driver.call(
            *(self.name, "XPENDING", self.name, self.group, "-", "+", 10_000, self.me)
        )
        after = self.known()
        missing = [id for id, *_ in pending if id not in before and id not in after]
        if not missing:
            return []
        found = await self.driver.script(STREAM_MINE, (self.name,), self.group, self.me, *missing)
        return [entry for entry in self._entries(found) if entry.id not in self.open]

    def acknowledge(self, ids: tuple[bytes, ...]) -> asyncio.Future[Any]:
        return self.driver.send_now(self.name, "XACK", self.name, self.group, *ids)

    async def _put_back(self, entries: list[tuple[Entry, float, bool]]) -> None:
        what = [x for e, delay, fresh in entries for x in (e.id, int(delay * 1000), int(fresh))]
        keys = (self.name, self.key(self.group, "later"))
        await self.driver.script(STREAM_NACK, keys, self.group, self.me, *what)

    async def touch(self, raw: Any, /) -> None:
        """Make an entry look young to consumers that are not ours; ours go by signs of life."""
        if asyncio.get_running_loop().time() - self.beaten < self.ack_wait / 2:
            self.driver.tell(
                *(self.name, "XCLAIM", self.name, self.group, self.me, 0, raw.id, "JUSTID")
            )

    def key(self, *suffix: str) -> str:
        return super().key(*((self.group, "begun") if suffix == ("begun",) else suffix))

    async def leave(self) -> None:
        keys = (self.name, self.key(self.group, "alive"))
        await self.driver.script(STREAM_LEAVE, keys, self.group, self.me)

    async def lag(self) -> int | None:
        later = await self.driver.call(self.name, "ZCARD", self.key(self.group, "later"))
        for info in await self.driver.call(self.name, "XINFO", "GROUPS", self.name):
            group = dict(zip(info[::2], info[1::2], strict=True))
            if group[b"name"] == self.group.encode():
                new = group.get(b"lag")
                return None if new is None else int(new) + later + len(self.waiting)
        return None


class ListFlow(Kept):
    """A list: what is taken lies in a list of this process until it is settled."""

    def __init__(self, *args: Any) -> None:
        spec, driver = args[1], args[0]
        sub = spec.list_sub
        assert sub is not None
        super().__init__(*args, member=driver.member(None), ack_wait=sub.ack_wait)
        self.taken = self.key("taken", self.me)

    async def ensure(self) -> None:
        kind = await self.driver.call(self.name, "TYPE", self.name)
        if kind not in (b"list", b"none"):
            raise self.driver.refusal(self.spec.destination, ResponseError("WRONGTYPE no list"))

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        found = await self.driver.script(LIST_TAKE, (self.name, self.taken), count)
        if not found:
            await connection.send_command(
                *("BLMOVE", self.name, self.taken, "LEFT", "RIGHT", self.driver.block / 1000),
                check_health=False,
            )
            one = await self.within(connection, self.driver.longest)
            found = [] if one is None else [one]
        return self._entries(found)

    def _entries(self, elements: list[bytes]) -> list[Entry]:
        name, plain = self.name, self.plain
        return [
            Entry(name, element, element)
            if plain and element[:1] not in b"\x00\x89"
            else self._open(element)
            for element in elements
        ]

    def _open(self, element: bytes) -> Entry:
        value, count, _ = unwrap(element)
        return open_value(self.name, value, self.format, element, count)

    async def claim(self, room: int, dead_room: int) -> tuple[list[Entry], bool, float, int]:
        keys = (self.name, self.taken, self.key("alive"), self.key("later"))
        found, more, due, there = await self.driver.script(
            LIST_TICK,
            keys,
            *(self.me, int(self.ack_wait * 1000), room, dead_room),
            *(self.key("taken", ""), os.urandom(8)),
        )
        return self._entries(found), bool(more), due, there

    async def mine(self) -> list[Entry]:
        known = self.known()
        there = await self.driver.call(self.name, "LRANGE", self.taken, 0, -1)
        for element, count in self.known().items():
            known[element] = max(known.get(element, 0), count)
        missing = []
        for element in there:
            left = known.get(element, 0)
            if left:
                known[element] = left - 1
            else:
                missing.append(element)
        return self._entries(missing)

    def acknowledge(self, ids: tuple[bytes, ...]) -> asyncio.Future[Any]:
        if len(ids) == 1:
            return self.driver.send_now(self.name, "LREM", self.taken, 1, ids[0])
        return self.driver.script_now(LIST_ACK, (self.taken,), *ids)

    async def put_back(self, entries: list[tuple[Entry, float, bool]]) -> None:
        what: list[Any] = []
        for entry, delay, fresh in reversed(entries):  # each goes before those that are there
            what += (entry.id, int(delay * 1000), int(fresh), os.urandom(8))
        keys = (self.name, self.taken, self.key("later"))
        await self.driver.script(LIST_NACK, keys, *what)

    def note(self, id: bytes) -> bytes:
        return unwrap(id)[2]

    async def leave(self) -> None:
        await self.driver.script(LIST_LEAVE, (self.taken, self.key("alive")), self.me)

    async def lag(self) -> int | None:
        later = await self.driver.call(self.name, "ZCARD", self.key("later"))
        there = await self.driver.call(self.name, "LLEN", self.name)
        return int(later) + int(there) + len(self.waiting)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
