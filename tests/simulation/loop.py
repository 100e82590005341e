"""An event loop without a world outside: a seed decides what runs next, time is a clock's.

What is permuted: callbacks that are ready at the same time run in any order, as they do when
answers come from a network. What is kept, because code may rely on it:

- the callbacks of one future run in the order in which they were added;
- plain ``call_soon`` callbacks run in the order of the calls;
- ``await asyncio.sleep(0)`` comes back after all that was ready before it.

Timers run in the order of their times, ties in any order, and sometimes a little late: up to
``SLACK`` seconds can pass while callbacks are ready.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any

from millstream import VirtualClock

#: Seconds that can pass while something is ready to run.
SLACK = 0.02
#: Callbacks at one instant after which the engine counts as spinning.
SPIN = 20_000


class Owner:
    """Whoever's callbacks stop when it dies: a process."""

    alive = True


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)


class Spinning(Exception):
    """Callbacks run on and on, and no time passes."""


class Stuck(Exception):
    """Nothing is ready and no timer is left, but the run is not over."""


class SimTimer:
    """A timer, and the process that made it."""

    __slots__ = ("args", "call", "owner")

    def __init__(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., Any] | None = call
        self.args = args
        self.owner = OWNER.get()

    def cancel(self) -> None:
        self.call = None


class SimClock(VirtualClock):
    """A virtual clock that the loop moves; timers of one time run in any order."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._timers: list[tuple[float, float, SimTimer]] = []

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> SimTimer:
        timer = SimTimer(call, args)
        item = (self._now + max(delay, 0.0), self._rng.random(), timer)
        heapq.heappush(self._timers, item)
        return timer

    def due(self) -> float | None:
        """The time of the next timer."""
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def run_next(self) -> bool:
        """Move on to the next timer and run it; False if there is none."""
        if self.due() is None:
            return False
        self._now, _, timer = heapq.heappop(self._timers)
        assert timer.call is not None
        timer.call(*timer.args)
        return True

    def left(self) -> list[SimTimer]:
        """The timers that wait."""
        return [timer for _, _, timer in self._timers if timer.call is not None]


class Ready(asyncio.Handle):
    """A callback that is ready to run."""

    __slots__ = ("order", "owner", "yields")

    def __init__(
        self, callback: Any, args: tuple[Any, ...], loop: SimLoop, context: Context | None
    ) -> None:
        super().__init__(callback, args, loop, context)
        self.owner: Owner | None = self._context.get(OWNER)  # type: ignore[attr-defined]
        #: Callbacks of one order keep it: those of one future, steps of one task, all others.
        self.order: Any = None
        #: The running task let the others run.
        self.yields = False
        if args:
            if asyncio.isfuture(args[0]):
                self.order = args[0]
        else:
            task = getattr(callback, "__self__", None)
            if isinstance(task, asyncio.Task):
                self.order = task
                self.yields = task is asyncio.current_task(loop)


class Later(asyncio.TimerHandle):
    """A callback that waits for its time."""

    __slots__ = ("timer",)
    timer: SimTimer

    def run(self) -> None:
        owner = self._context.get(OWNER)  # type: ignore[attr-defined]
        if owner is None or owner.alive:
            self._run()


class SimLoop(asyncio.BaseEventLoop):
    """The loop; ``fifo`` is the share of choices that take what was ready first."""

    def __init__(self, rng: random.Random, fifo: float) -> None:
        super().__init__()
        self.clock = SimClock(rng)
        self._rng, self._fifo = rng, fifo
        self.ready: list[Ready] = []
        #: Callbacks run so far.
        self.steps = 0
        self._instant = (0.0, 0)
        #: Calls to be made between two callbacks: when (a count of steps), what.
        self.between: list[tuple[int, Callable[[], None]]] = []
        self.tasks: dict[asyncio.Task[Any], Context] = {}
        self.errors: list[str] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self.clock.now()

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Ready:
        handle = Ready(callback, args, self, context)
        if handle.owner is None or handle.owner.alive:
            self.ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Later:
        handle = Later(when, callback, args, self, context)
        handle.timer = self.clock.call_later(when - self.clock.now(), handle.run)
        return handle

    def _timer_handle_cancelled(self, handle: Any) -> None:
        handle.timer.cancel()

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Later:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        raise RuntimeError("there are no threads in a simulation")

    def _make_task(
        self, loop: Any, coro: Any, context: Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        context = context or copy_context()
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, context=context, **options)
        self.tasks[task] = context
        return task

    def _failed(self, loop: Any, details: dict[str, Any]) -> None:
        self.errors.append(f"{details.get('message')}: {details.get('exception')!r}")

    def drop(self, owner: Owner) -> None:
        """A process dies: nothing of it ever runs again."""
        owner.alive = False
        self.ready = [handle for handle in self.ready if handle.owner is not owner]

    def tasks_of(self, owner: Owner) -> list[asyncio.Task[Any]]:
        """The tasks of a process that are not done."""
        return [t for t, c in self.tasks.items() if c.get(OWNER) is owner and not t.done()]

    def _run_once(self) -> None:
        ready, clock, rng = self.ready, self.clock, self._rng
        while self.between and (self.between[0][0] <= self.steps or not ready):
            self.between.pop(0)[1]()
            ready = self.ready
        if not ready:
            if not clock.run_next():
                raise Stuck
            return
        if rng.random() < 0.02:
            due = clock.due()
            if due is not None and due < clock.now() + SLACK:
                clock.run_next()
                return
        index = 0
        if len(ready) > 1 and rng.random() >= self._fifo:
            index = int(rng.random() * len(ready))
            while index and not self._free(index):
                index = int(rng.random() * index)
        handle = ready.pop(index)
        if not handle.cancelled():
            self.steps += 1
            now, since = self._instant
            if now != clock.now():
                self._instant = (clock.now(), self.steps)
            elif self.steps - since > SPIN:
                raise Spinning
            handle._run()

    def _free(self, index: int) -> bool:
        """Whether a callback may run before those that were ready earlier."""
        handle = self.ready[index]
        if handle.yields:
            return False
        order = handle.order
        return all(self.ready[i].order is not order for i in range(index))

    def soon_between(self, steps: int, call: Callable[[], None]) -> None:
        """Make a call between two callbacks, ``steps`` from now or when nothing is ready."""
        self.between.append((self.steps + steps, call))
        self.between.sort(key=lambda item: item[0])

    def close(self) -> None:
        """End the coroutines of dead processes, each in its own context, and forget them."""
        ended: set[asyncio.Task[Any]] = set()
        asyncio._set_running_loop(self)  # what they do about it may ask for one
        try:
            while left := [t for t in self.tasks if not t.done() and t not in ended]:
                for task in left:
                    self._end(task)
                ended.update(left)
        finally:
            asyncio._set_running_loop(None)
        self.ready.clear()
        self.tasks.clear()
        super().close()

    def _end(self, task: asyncio.Task[Any]) -> None:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        coro = task.get_coro()
        for _ in range(20):  # it may await where it handles exceptions
            with suppress(BaseException):
                self.tasks[task].run(coro.close)
                return
