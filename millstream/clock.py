"""Time, as the engine sees it: the event loop's, or a test's own."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol


class Timer(Protocol):
    """A call that waits for its time."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What the engine asks of time; delays, deadlines and backoffs all go through it."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> Timer:
        """Run ``call(*args)`` in ``delay`` seconds."""
        ...

    async def sleep(self, delay: float) -> None:
        """Wait ``delay`` seconds."""


class LoopClock:
    """The real time of the running event loop."""

    # The functions themselves: they are called for every message.
    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> Timer:
        return asyncio.get_running_loop().call_later(delay, call, *args)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay)


class _VirtualTimer:
    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., Any] | None = call
        self.args = args

    def cancel(self) -> None:
        self.call, self.args = None, ()


def wake(future: asyncio.Future[None]) -> None:
    """Let whoever awaits a future go on."""
    if not future.done():
        future.set_result(None)


class VirtualClock:
    """Time that stands still until a test moves it.

    ``await clock.advance(60)`` runs every timer of the next minute in order, and lets the
    tasks each of them wakes run until they wait again.
    """

    #: Turns of the event loop given to woken tasks after each timer.
    TURNS = 50

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._heap: list[tuple[float, int, _VirtualTimer]] = []
        self._order = itertools.count()
        #: Tasks that wait in ``sleep``.
        self.sleeping: set[asyncio.Task[Any] | None] = set()
        #: Awaited by ``settle``: where a test broker waits for handlers in threads.
        self.quiet: Callable[[], Awaitable[None]] | None = None

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> Timer:
        timer = _VirtualTimer(call, args)
        heapq.heappush(self._heap, (self._now + max(delay, 0.0), next(self._order), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        future = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay, wake, future)
        task = asyncio.current_task()
        self.sleeping.add(task)
        try:
            await future
        finally:
            self.sleeping.discard(task)
            timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Move time on by ``seconds``."""
        until = self._now + seconds
        await self.settle()
        while self._heap and self._heap[0][0] <= until:
            due, _, timer = heapq.heappop(self._heap)
            self._now = max(self._now, due)
            if timer.call is not None:
                timer.call(*timer.args)
                await self.settle()
        self._now = until

    async def settle(self) -> None:
        """Let every task that is ready run."""
        for _ in range(self.TURNS):
            await asyncio.sleep(0)
        if self.quiet is not None:
            await self.quiet()
