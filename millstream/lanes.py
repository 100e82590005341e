"""Lanes: a fixed number of workers that handle messages at once, in order per key if asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from .clock import Clock, wake
from .driver import CANCELLED, Batch, Sink


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
        #: What any worker may take: items, with a key pairs of key and item.
        self._items: deque[Any] = deque()
        #: Each key that runs or is about to, and what waits behind it.
        self._chains: dict[Hashable, deque[Any] | None] = {}
        #: How much waits, behind keys included.
        self._count = 0
        #: Workers that wait for an item, and callers of ``submit`` that wait for room.
        self._wake: deque[asyncio.Future[None]] = deque()
        self._room: deque[asyncio.Future[None]] = deque()
        #: What those callers want to submit.
        self._outside: list[Any] = []
        self._tasks = [
            asyncio.create_task(self._work(), name=f"{name}-lane-{i}") for i in range(workers)
        ]
        self.busy = 0
        self._closed = False

    async def submit(self, item: Any) -> None:
        """Queue an item; returns when there was room for it."""
        if self._count >= self._limit:
            await self._wait_for_room(item)
        if self._key is not None:
            key, chains = self._key(item), self._chains
            if key in chains:
                chain = chains[key]
                if chain is None:
                    chains[key] = deque((item,))
                else:
                    chain.append(item)
                self._count += 1
                return
            chains[key] = None
            item = key, item
        self._count += 1
        self._items.append(item)
        if self._wake:
            _release(self._wake)

    async def _wait_for_room(self, item: Any) -> None:
        self._outside.append(item)
        try:
            while self._count >= self._limit:
                future = asyncio.get_running_loop().create_future()
                self._room.append(future)
                await future
        finally:
            self._outside.remove(item)

    async def _work(self) -> None:
        deliver, items, chains, keyed = self._deliver, self._items, self._chains, self._key
        while not self._closed:  # a handler may have swallowed the cancellation
            while not items:
                await self._wait()
            item = key = items.popleft()
            if keyed is not None:
                key, item = item
            self._count -= 1
            if self._room:
                _release(self._room)
            self.busy += 1
            try:
                await deliver(item)
            finally:
                self.busy -= 1
                if keyed is not None:
                    chain = chains[key]
                    if chain:  # behind what others wait for, so that no key takes a worker for good
                        items.append((key, chain.popleft()))
                    else:
                        del chains[key]

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._wake.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                _release(self._wake)  # the wake-up was ours: pass it on
            raise

    def take_back(self) -> list[Any]:
        """Remove and return everything that waits."""
        items, chains = self._waiting(), self._chains
        if self._key is not None:
            for key, _ in self._items:
                del chains[key]
            for key in chains:
                chains[key] = None  # one of it runs
        self._items.clear()
        self._count = 0
        while self._room:
            _release(self._room)
        return items

    def _waiting(self) -> list[Any]:
        if self._key is None:
            return list(self._items)
        behind = (item for chain in self._chains.values() for item in chain or ())
        return [*(item for _, item in self._items), *behind]

    def items(self) -> list[Any]:
        """Everything that waits; it stays where it is."""
        return self._waiting() + self._outside

    @property
    def waiting(self) -> int:
        """Messages that no worker has begun."""
        return self._count + sum(map(_count, self._outside))

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
        super().__init__(deliver, workers, limit=max(2 * batch.size, 2), clock=clock, name=name)

    async def submit(self, item: Any) -> None:
        if self._count >= self._limit:
            await self._wait_for_room(item)
        self._items.append(item)
        self._count += _count(item)
        if self._wake:
            _release(self._wake)

    async def _work(self) -> None:
        while not self._closed:
            while not self._items:
                await self._wait()
            found = await self._collect()
            if not found:
                continue
            if self._room:
                _release(self._room)
            self.busy += 1
            try:
                await self._deliver(found)
            finally:
                self.busy -= 1

    async def _collect(self) -> list[Any]:
        """Take up to ``size`` messages; wait at most ``wait`` seconds after the first."""
        size = self._batch.size
        if self._count < size:
            full = asyncio.get_running_loop().create_future()
            timer = self._clock.call_later(self._batch.wait, wake, full)
            try:
                while self._count < size and not full.done():
                    _release(self._room)
                    more: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._wake.append(more)
                    await asyncio.wait((more, full), return_when=asyncio.FIRST_COMPLETED)
                    more.cancel()
            finally:
                timer.cancel()
        items, found, room = self._items, list[Any](), size
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


def _count(item: Any) -> int:
    return len(item) if hasattr(item, "apart") else 1
