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

    Without ``key`` any free worker takes the next item. With it each worker has its own
    queue and items of one key always go to the same: order is kept per key, and a slow key
    does not stop the others. ``limit`` items wait per queue at most; beyond that ``submit``
    does not return, which is what stops the driver. With ``batch`` a worker collects a list
    before it delivers.
    """

    def __init__(
        self,
        deliver: Sink,
        workers: int,
        *,
        limit: int,
        clock: Clock,
        key: Callable[[Any], Hashable] | None = None,
        batch: Batch | None = None,
        name: str = "",
    ) -> None:
        self._deliver = deliver
        self._limit = limit
        self._clock = clock
        self._key = key
        self._batch = batch
        self._lanes = [_Lane() for _ in range(workers if key is not None else 1)]
        self._tasks = [
            asyncio.create_task(
                self._work(self._lanes[i % len(self._lanes)]), name=f"{name}-lane-{i}"
            )
            for i in range(workers)
        ]
        self.busy = 0
        self._closed = False
        #: Items that wait for room.
        self._outside: list[Any] = []

    async def submit(self, item: Any) -> None:
        """Queue an item; returns when there was room for it."""
        lanes, key = self._lanes, self._key
        lane = lanes[0] if key is None else lanes[hash(key(item)) % len(lanes)]
        if len(lane.items) >= self._limit:
            await self._room(lane, item)
        lane.items.append(item)
        if lane.wake:
            _release(lane.wake)

    async def _room(self, lane: _Lane, item: Any) -> None:
        self._outside.append(item)
        try:
            while len(lane.items) >= self._limit:
                future = asyncio.get_running_loop().create_future()
                lane.room.append(future)
                await future
        finally:
            self._outside.remove(item)

    async def _work(self, lane: _Lane) -> None:
        deliver, batch = self._deliver, self._batch
        while not self._closed:  # a handler may have swallowed the cancellation
            while not lane.items:
                await self._wait(lane)
            if batch is None:
                item = lane.items.popleft()
            else:
                item = await self._collect(lane, batch)
                if not item:
                    continue
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

    async def _collect(self, lane: _Lane, batch: Batch) -> list[Any]:
        """Take up to ``size`` items; wait at most ``wait`` seconds after the first."""
        if len(lane.items) < batch.size:
            full = asyncio.get_running_loop().create_future()
            timer = self._clock.call_later(batch.wait, _set, full)
            try:
                while len(lane.items) < batch.size and not full.done():
                    _release(lane.room)
                    wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    lane.wake.append(wake)
                    await asyncio.wait((wake, full), return_when=asyncio.FIRST_COMPLETED)
                    wake.cancel()
            finally:
                timer.cancel()
        return [lane.items.popleft() for _ in range(min(batch.size, len(lane.items)))]

    def take_back(self) -> list[Any]:
        """Remove and return everything that waits."""
        items: list[Any] = []
        for lane in self._lanes:
            items.extend(lane.items)
            lane.items.clear()
            while lane.room:
                _release(lane.room)
        return items

    def items(self) -> list[Any]:
        """Everything that waits; it stays where it is."""
        return [item for lane in self._lanes for item in lane.items] + self._outside

    @property
    def waiting(self) -> int:
        """Items that no worker has begun."""
        return sum(len(lane.items) for lane in self._lanes) + len(self._outside)

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
