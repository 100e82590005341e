"""Lanes: a fixed number of workers that handle messages at once, in order per key if asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from .clock import Clock
from .driver import CANCELLED, Batch, Sink


class _Lane:
    """One queue and whoever waits for it to fill or to drain."""

    __slots__ = ("items", "room", "wake")

    def __init__(self) -> None:
        self.items: deque[Any] = deque()
        self.wake: deque[asyncio.Future[None]] = deque()
        self.room: deque[asyncio.Future[None]] = deque()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _release(waiting: deque[asyncio.Future[None]]) -> None:
    while waiting:
        future = waiting.popleft()
        if not future.done():
            future.set_result(None)
            return


class Lanes:
    """Hands items from a driver's sink to ``workers`` tasks made once.

    Any free worker takes the next item. With ``key`` an item waits while another one of its key
    runs or waits before it: order is kept per key, and a slow key takes one worker at most.
    ``limit`` items wait at most, with a key for each worker; beyond that ``submit`` does not
    return, which is what stops the driver.
    """

    def __init__(
        self,
        deliver: Sink,
        workers: int,
        *,
        limit: int,
        clock: Clock,
        key: Callable[[Any], Hashable] | None = None,
        name: str = "",
    ) -> None:
        self._deliver = deliver
        self._limit = limit if key is None else limit * workers
        self._clock = clock
        self._key = key
        self._lane = _Lane()
        #: Each key that runs or is about to, and what waits behind it.
        self._chains: dict[Hashable, deque[Any] | None] = {}
        self._chained = 0
        work = self._work if key is None else self._work_keyed
        self._tasks = [
            asyncio.create_task(work(self._lane), name=f"{name}-lane-{i}") for i in range(workers)
        ]
        self.busy = 0
        self._closed = False
        #: Items that wait for room.
        self._outside: list[Any] = []

    @property
    def _full(self) -> bool:
        return len(self._lane.items) + self._chained >= self._limit

    async def submit(self, item: Any) -> None:
        """Queue an item; returns when there was room for it."""
        lane = self._lane
        if len(lane.items) + self._chained >= self._limit:
            await self._room(lane, item)
        if self._key is not None:
            key, chains = self._key(item), self._chains
            if key in chains:
                chain = chains[key]
                if chain is None:
                    chains[key] = deque((item,))
                else:
                    chain.append(item)
                self._chained += 1
                return
            chains[key] = None
            item = key, item
        lane.items.append(item)
        if lane.wake:
            _release(lane.wake)

    async def _room(self, lane: _Lane, item: Any) -> None:
        self._outside.append(item)
        try:
            while self._full:
                future = asyncio.get_running_loop().create_future()
                lane.room.append(future)
                await future
        finally:
            self._outside.remove(item)

    async def _work_keyed(self, lane: _Lane) -> None:
        deliver, chains = self._deliver, self._chains
        while not self._closed:
            while not lane.items:
                await self._wait(lane)
            key, item = lane.items.popleft()
            if lane.room:
                _release(lane.room)
            self.busy += 1
            try:
                await deliver(item)
            finally:
                self.busy -= 1
                chain = chains[key]
                if chain:  # behind what others wait for, so that no key takes a worker for good
                    lane.items.append((key, chain.popleft()))
                    self._chained -= 1
                else:
                    del chains[key]

    async def _work(self, lane: _Lane) -> None:
        deliver = self._deliver
        while not self._closed:  # a handler may have swallowed the cancellation
            while not lane.items:
                await self._wait(lane)
            item = lane.items.popleft()
            if lane.room:
                _release(lane.room)
            self.busy += 1
            try:
                await deliver(item)
            finally:
                self.busy -= 1

    async def _wait(self, lane: _Lane) -> None:
        future = asyncio.get_running_loop().create_future()
        lane.wake.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                _release(lane.wake)  # the wake-up was ours: pass it on
            raise

    def take_back(self) -> list[Any]:
        """Remove and return everything that waits."""
        lane, chains = self._lane, self._chains
        items = self._waiting()
        if self._key is not None:
            for key, _ in lane.items:
                del chains[key]
            for key in chains:
                chains[key] = None  # one of it runs
            self._chained = 0
        lane.items.clear()
        while lane.room:
            _release(lane.room)
        return items

    def _waiting(self) -> list[Any]:
        if self._key is None:
            return list(self._lane.items)
        behind = (item for chain in self._chains.values() for item in chain or ())
        return [*(item for _, item in self._lane.items), *behind]

    def items(self) -> list[Any]:
        """Everything that waits; it stays where it is."""
        return self._waiting() + self._outside

    @property
    def waiting(self) -> int:
        """Items that no worker has begun."""
        return len(self._lane.items) + self._chained + len(self._outside)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.busy and not self.waiting

    async def close(self) -> None:
        """Cancel what still runs and end the workers."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=CANCELLED)


class Batches(Lanes):
    """The same for handlers of lists: a worker collects one before it delivers it.

    An item may be a bundle of messages; it is split where a list would become too long. What
    waits is counted in messages.
    """

    def __init__(
        self, deliver: Sink, workers: int, batch: Batch, *, clock: Clock, name: str = ""
    ) -> None:
        self._batch = batch
        self._count = 0
        super().__init__(deliver, workers, limit=max(2 * batch.size, 2), clock=clock, name=name)

    @property
    def _full(self) -> bool:
        return self._count >= self._limit

    async def submit(self, item: Any) -> None:
        lane = self._lane
        if self._count >= self._limit:
            await self._room(lane, item)
        lane.items.append(item)
        self._count += _count(item)
        if lane.wake:
            _release(lane.wake)

    async def _work(self, lane: _Lane) -> None:
        deliver = self._deliver
        while not self._closed:
            while not lane.items:
                await self._wait(lane)
            items = await self._collect(lane)
            if not items:
                continue
            if lane.room:
                _release(lane.room)
            self.busy += 1
            try:
                await deliver(items)
            finally:
                self.busy -= 1

    async def _collect(self, lane: _Lane) -> list[Any]:
        """Take up to ``size`` messages; wait at most ``wait`` seconds after the first."""
        size = self._batch.size
        if self._count < size:
            full = asyncio.get_running_loop().create_future()
            timer = self._clock.call_later(self._batch.wait, _set, full)
            try:
                while self._count < size and not full.done():
                    _release(lane.room)
                    wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    lane.wake.append(wake)
                    await asyncio.wait((wake, full), return_when=asyncio.FIRST_COMPLETED)
                    wake.cancel()
            finally:
                timer.cancel()
        items, found, room = lane.items, list[Any](), size
        while items and room:
            item = items.popleft()
            count = _count(item)
            if count > room:
                items.appendleft(item.split(room))
                count = room
            found.append(item)
            room -= count
        self._count -= size - room
        return found

    def take_back(self) -> list[Any]:
        self._count = 0
        return super().take_back()

    @property
    def waiting(self) -> int:
        return self._count + sum(map(_count, self._outside))


def _count(item: Any) -> int:
    return len(item) if hasattr(item, "apart") else 1
