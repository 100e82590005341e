"""Sources that keep a message until it is settled: a stream's group, and a list.

Both work alike. A reader takes from the source into a short queue, a worker gives to the sink
from there, and a ticker says every second that this process lives, and takes what is due again
and what dead processes left. Acknowledgements of one turn of the event loop leave as one command.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from ..ack import Settlement
from ..base import Window, reconnect_delay
from ..driver import CANCELLED
from ..errors import MillstreamError
from .flow import MOST, PAUSE, Flow, gone, log
from .message import Entry
from .options import sibling
from .wire import BROKEN, Lost, cut, reason_of

#: Seconds between two signs of life, at most.
BEAT = 1.0
#: Seconds that the server may take to end a read that waits.
LEAVE = 0.5
#: Seconds for which the note is kept that a message's last attempt began.
NOTES = 7 * 86_400
#: What an answer that does not come is called.
FAILED = (*BROKEN, RedisError, Lost, MillstreamError)


class Kept(Flow):
    """What a group and a list have in common.

    Args:
        member: the name of this process in the group, or among those that read the list.
        ack_wait: seconds without a sign of life after which a process counts as dead.
        parts: what stands before the last part of the names of the source's siblings.
    """

    #: The command that acknowledges the ids behind it.
    ack: tuple[str, ...]

    def __init__(self, *args: Any, member: str, ack_wait: float, parts: tuple[str, ...]) -> None:
        super().__init__(*args)
        self.me, self.ack_wait, self.parts = member, ack_wait, parts
        spec = self.spec
        self.waiting: deque[Entry] = deque()
        #: What was taken and not settled.
        self.open: set[bytes] = set()
        #: What was settled, and where Redis was told but has not answered.
        self.acks: list[bytes] = []
        self.flying: set[bytes] = set()
        self.noted: set[bytes] = set()
        #: When Redis got a sign of life last.
        self.beaten = 0.0
        self.more = False
        self._due, self._missed = -1.0, 0
        self._flushing = False
        self._news, self._room, self._tick_now = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._room.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._client = 0
        #: Messages that the handlers have at once.
        self.at_once = at_once = spec.lanes * (spec.batch.size if spec.batch else 1)
        stream = spec.stream_sub
        fixed = spec.batch is not None or (stream is not None and stream.max_records is not None)
        least = spec.prefetch
        self.window = Window(at_once, least, least if fixed else max(least, MOST))

    def key(self, what: str) -> str:
        """The name of a sibling of the source."""
        return sibling(self.name, *self.parts, what)

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
        self._client = await self.ask(connection, "CLIENT", "ID")
        self._missed = 2  # what was on its way when the connection before this one broke

    async def _read(self, connection: AbstractConnection) -> None:
        while not self.paused:
            try:
                if self._missed > 1:
                    await self._recover()
                if len(self.waiting) > self.window.target // 2:
                    self._room.clear()
                    await self._room.wait()
                    continue
                self.window.adapt(asyncio.get_running_loop().time(), self.given)
                self._put(await self.take(connection, self.window.target))
            except ResponseError as error:
                if not gone(error):
                    raise
                await self.rebuild()

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        """Wait for something new, and take up to ``count`` of it."""
        raise NotImplementedError

    def _put(self, entries: list[Entry]) -> None:
        if entries:
            self.open.update([entry.id for entry in entries])
            self.waiting.extend(entries)
            self._news.set()

    async def _work(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self.waiting
        while not self.paused:
            if not self._room.is_set() and len(waiting) <= self.window.target // 2:
                self._room.set()
                await asyncio.sleep(0)  # more is on its way while we work
                continue
            if not waiting:
                if self.more:
                    self._tick_now.set()
                self._news.clear()
                await self._news.wait()
                continue
            if loop.time() - self.beaten > self.ack_wait:
                await self._stale()
                continue
            await self.give(waiting.popleft())

    async def _stale(self) -> None:
        """Nothing was heard of us for too long: what waits may be somebody else's by now."""
        self.open.difference_update([entry.id for entry in self.waiting])
        self.waiting.clear()
        try:
            await self.tick()
        except FAILED as error:
            log.debug("%s: %s", self.where, reason_of(error))
            await asyncio.sleep(PAUSE)
        self._missed = 2  # the reader takes up what is still ours
        if self._room.is_set():  # it waits for something new
            cut(self.connection)
        self._room.set()

    async def _recover(self) -> None:
        """Take up what is ours at the server, and what this process does not know of.

        Called while nothing is being read, or what is on its way to us would come twice.
        """
        self._missed = 0
        await self.flush()
        before = self.known()
        held = await self.held()
        if missing := [id for id in held if id not in before and id not in self.known()]:
            self._put([e for e in await self.fetch(missing) if e.id not in self.open])

    async def held(self) -> list[bytes]:
        """The ids of what Redis thinks that we have."""
        raise NotImplementedError

    async def fetch(self, ids: list[bytes]) -> list[Entry]:
        """What is ours of them, once more; it counts as the same delivery."""
        raise NotImplementedError

    def known(self) -> set[bytes]:
        """What this process has, or has settled and Redis may not know of it yet."""
        return self.open.union(self.acks, self.flying)

    async def rebuild(self) -> None:
        """What is read from is gone: make it again."""
        raise NotImplementedError

    # Signs of life

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait = min(BEAT, self.ack_wait / 4)
            if self._due >= 0:
                wait = min(wait, max(self._due - loop.time(), 0.0) + 0.002)
            timer = loop.call_later(wait, self._tick_now.set)
            await self._tick_now.wait()
            timer.cancel()
            self._tick_now.clear()
            try:
                try:
                    await self.tick()
                except ResponseError as error:
                    if not gone(error):
                        raise
                    await self.rebuild()
            except FAILED as error:
                log.debug("%s: %s", self.where, reason_of(error))

    async def tick(self) -> None:
        """Say that we live; take what is due, and what the dead left."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        self._send_acks()
        room = 0 if self.paused else max(self.window.target - len(self.waiting), 0)
        careful = min(room, max(self.at_once - len(self.waiting), 0))
        found, self.more, due, there = await self.claim(room, careful)
        if self.open and begin - self.beaten > self.ack_wait:
            await self._give_up()
        self.beaten = begin
        # Once it may be on its way to us; twice, a connection that broke has swallowed it.
        missing = there > len(self.known().union(entry.id for entry in found))
        self._missed = self._missed + 1 if missing else 0
        self._due = begin + due / 1000 if due >= 0 and room else -1.0
        if self.paused:
            await self.put_back(found)
        else:
            self._put(found)
            if self._missed > 1 and not self.reads:
                await self._recover()

    async def _give_up(self) -> None:
        """Forget what others took over while nothing was heard of us."""
        known = set(self.open)
        lost = known.difference(await self.held())
        self.open -= lost
        if any(entry.id in lost for entry in self.waiting):
            left = [entry for entry in self.waiting if entry.id not in lost]
            self.waiting.clear()
            self.waiting.extend(left)

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
            self.open.discard(id)
            self.acks.append(id)
            if not self._flushing:
                self._flushing = True
                asyncio.get_running_loop().call_soon(self._send_acks)
        elif how is Settlement.NACK:
            await self.put_back([raw], delay or 0.0, fresh=bool(options.get("unbegun")))

    def _send_acks(self) -> None:
        self._flushing = False
        if not self.acks:
            return
        ids, self.acks = self.acks, []
        self.flying.update(ids)
        sent = self.driver.send_now(self.name, *self.ack, *ids)
        sent.add_done_callback(lambda future: self._acked(ids, future))
        if self.noted and (over := self.noted.intersection(ids)):
            self.noted -= over
            self.driver.tell(self.name, "HDEL", self.key("begun"), *over)

    def _acked(self, ids: list[bytes], future: asyncio.Future[Any]) -> None:
        self.flying.difference_update(ids)
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self.acks.extend(ids)  # the ticker tries again
            if isinstance(error, ResponseError):
                self.driver.notify("error", f"{self.where}: cannot settle: {error}")

    async def flush(self) -> None:
        """Wait until Redis knows what was settled; raises if it cannot be told."""
        self._send_acks()
        if self.flying:
            await self.driver.call(self.name, "PING")

    async def put_back(
        self, entries: list[Entry], delay: float = 0.0, *, fresh: bool = True
    ) -> None:
        """Have messages delivered again; without a connection, as soon as there is one.

        Args:
            entries: they are ours until Redis was told.
            delay: in seconds.
            fresh: they were never begun, and this delivery does not count.
        """
        if entries:
            task = self.driver.spawn(self._put_back(entries, delay, fresh))
            await asyncio.wait([task], timeout=self.driver.publish_timeout)

    async def _put_back(self, entries: list[Entry], delay: float, fresh: bool) -> None:
        loop, ids = asyncio.get_running_loop(), [entry.id for entry in entries]
        due = loop.time() + delay
        for attempt in itertools.count(1):
            try:
                await self.nack(ids, max(int((due - loop.time()) * 1000), 0), int(fresh))
                break
            except FAILED as error:
                log.debug("%s: not returned yet: %s", self.where, reason_of(error))
                await asyncio.sleep(reconnect_delay(attempt, self.driver.cap))
        self.open.difference_update(ids)
        if self._due < 0 or due < self._due:
            self._due = due
            loop.call_later(max(due - loop.time(), 0.0) + 0.001, self._tick_now.set)

    async def nack(self, ids: list[bytes], ms: int, fresh: int) -> None:
        """Have messages delivered again so many milliseconds later."""
        raise NotImplementedError

    async def ours(self, raws: list[Any], /) -> list[Any]:
        while asyncio.get_running_loop().time() - self.beaten > self.ack_wait:
            try:
                await self.tick()
            except FAILED as error:
                log.debug("%s: %s", self.where, reason_of(error))
                await asyncio.sleep(PAUSE)
        return [raw for raw in raws if raw.id in self.open]

    async def begun(self, raw: Any, /) -> bool:
        key = self.key("begun")
        try:
            fresh = await self.driver.call(self.name, "HSETNX", key, raw.id, 1)
            self.driver.tell(self.name, "EXPIRE", key, NOTES)
        except FAILED as error:
            log.debug("%s: cannot note: %s", self.where, reason_of(error))
            return False
        self.noted.add(raw.id)
        return not fresh

    # The end

    async def pause(self) -> int:
        if self.paused:
            return 0
        self.paused = True
        self._news.set()
        self._room.set()
        await self._interrupt()
        back = list(self.waiting)
        self.waiting.clear()
        await self.put_back(back)
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
        if others := [task for task in self._tasks if task is not asyncio.current_task()]:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=CANCELLED)
        await super().close()
        try:
            async with asyncio.timeout(LEAVE):
                await self.flush()
                await self.leave()
        except FAILED as error:
            log.debug("%s: cannot leave: %s", self.where, reason_of(error))

    async def leave(self) -> None:
        """Say that this member is gone, so that nobody waits for its next sign of life."""
        raise NotImplementedError
