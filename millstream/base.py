"""What every driver is built on, written once.

Nothing here knows a broker: an intake gives messages to its sink, a window follows the handler's
speed, questions wait for their answers, and tasks run beside all that until their owner ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from .ack import Settlement
from .clock import Clock, LoopClock
from .driver import CANCELLED, Sink
from .errors import NotConnected, RequestTimeout

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

#: Messages given to the sink in one go before other tasks get a turn.
TURN = 128
#: Reading more within FAST seconds doubles what is held ready, after SLOW seconds halves it: a
#: fast handler is never kept waiting, a slow one hoards no more than a moment's work.
FAST, SLOW = 0.02, 0.2


class BaseIntake:
    """An intake whose source knows no acknowledgement; others say what theirs does.

    One that has to do something around each message puts a function of its own in the sink's place.

    Args:
        where: what is read, for people.
        sink: takes the messages.
        log: of the broker.
    """

    def __init__(self, where: str, sink: Sink, log: logging.Logger) -> None:
        self.where, self.sink, self.log = where, sink, log
        #: Whether no more is to be taken.
        self.paused = False
        #: Messages that the sink took.
        self.given = 0

    async def give(self, raw: Any) -> None:
        """Give one message to the sink, and now and then a turn to other tasks."""
        try:
            await self.sink(raw)
        except Exception:
            self.log.exception("the sink of %r failed", self.where)
        self.given += 1
        if self.given % TURN == 0:  # handlers that never wait must not stop all else
            await asyncio.sleep(0)

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        """Nothing to tell: this source knows no acknowledgement."""

    async def touch(self, raw: Any, /) -> None:
        """No deadline to push back."""

    async def begun(self, raw: Any, /) -> bool:
        """This source counts no deliveries."""
        return True

    async def lag(self) -> int | None:
        """Messages that wait at the server, where it can tell."""
        return None


class Feed(BaseIntake):
    """An intake with a queue, and one task that gives what waits there to the sink in order."""

    def __init__(self, where: str, sink: Sink, log: logging.Logger) -> None:
        super().__init__(where, sink, log)
        self.waiting: deque[Any] = deque()
        self._idle: asyncio.Future[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._work())

    def put(self, raw: Any) -> None:
        """Take what arrived."""
        self.waiting.append(raw)
        if self._idle is not None:
            self.wake()

    def wake(self) -> None:
        """Let the task look again what there is to do."""
        idle, self._idle = self._idle, None
        if idle is not None and not idle.done():
            idle.set_result(None)

    async def _work(self) -> None:
        waiting = self.waiting
        while not (self.paused and self.ended()):
            if not waiting:
                self.emptied()
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
                continue
            await self.give(waiting.popleft())

    def ended(self) -> bool:
        """Whether a paused intake gives its sink nothing more; what waits was handed back."""
        return True

    def emptied(self) -> None:
        """Nothing waits any more."""

    async def finish(self) -> None:
        """Let the task end by itself; the sink's present call may be the caller."""
        self.paused = True
        self.wake()
        if asyncio.current_task() is not self._task:
            await asyncio.wait([self._task])

    async def cut_off(self) -> None:
        """Cancel the sink's present call, and leave one behind that does not end."""
        self.paused = True
        if asyncio.current_task() is not self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCELLED)


class Window:
    """How many messages are held ready, by how fast the sink takes them.

    Args:
        first: at the beginning. If what is begun ends this process, nothing counts as delivered
            that was only fetched beside it.
        least: for a slow handler.
        most: for a fast one.
    """

    def __init__(self, first: int, least: int, most: int) -> None:
        self.least, self.most = min(least, most), most
        self.target = min(first, self.least)
        self._at, self._given = 0.0, 0

    def adapt(self, now: float, given: int) -> None:
        """Called before more is fetched, with the time and how many the sink took so far."""
        if self._at:
            target, since = self.target, now - self._at
            if since < FAST and given > self._given:
                target *= 2
            elif since > SLOW:
                target //= 2
            self.target = min(max(target, self.least), self.most)
        self._at, self._given = now, given


class Questions(Generic[K, T]):
    """Requests that wait for their answers, by what an answer carries."""

    def __init__(self) -> None:
        self._waiting: dict[K, asyncio.Future[T]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, key: K, where: str, timeout: float, end: float | None = None) -> _Question[K, T]:
        """``with ask(...) as answer``: send the question, and await the answer.

        The future raises :class:`RequestTimeout` after ``timeout`` seconds, which end at the
        loop's time ``end`` where some of them have passed already.
        """
        return _Question(self._waiting, key, where, timeout, end)

    def answer(self, key: K, raw: T) -> None:
        """An answer came; a late one is dropped."""
        future = self._waiting.get(key)
        if future is not None and not future.done():
            future.set_result(raw)


class _Question(Generic[K, T]):
    __slots__ = ("_end", "_key", "_timeout", "_timer", "_waiting", "_where")
    _timer: asyncio.TimerHandle

    def __init__(
        self,
        waiting: dict[K, asyncio.Future[T]],
        key: K,
        where: str,
        timeout: float,
        end: float | None,
    ) -> None:
        self._waiting, self._key, self._where = waiting, key, where
        self._timeout, self._end = timeout, end

    def __enter__(self) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting[self._key] = future
        end = self._end if self._end is not None else loop.time() + self._timeout
        self._timer = loop.call_at(end, self._expire, future)
        return future

    def _expire(self, future: asyncio.Future[T]) -> None:
        if not future.done():
            text = f"no reply from {self._where!r} within {self._timeout:g} s"
            future.set_exception(RequestTimeout(text))
            future.exception()  # it may be that the question could not even be sent

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        self._waiting.pop(self._key, None)


class Tasks:
    """What runs beside its owner, until it is done or the owner ends."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something on the side."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.debug("on the side: %r", error)

    def cancel(self) -> None:
        """End all of it."""
        for task in list(self._running):
            task.cancel()


class BaseDriver:
    """What a driver has, whatever its broker.

    Args:
        log: of the broker.
        publish_timeout: seconds that a publication waits for a lost connection and for its
            confirmation, where the command does not say it.
        clock: the time that waits go by.
    """

    def __init__(
        self, log: logging.Logger, *, publish_timeout: float = 5.0, clock: Clock | None = None
    ) -> None:
        self.publish_timeout = publish_timeout
        self.clock: Clock = clock or LoopClock()
        self.notify: Callable[[str, str], None] = lambda event, reason: None
        #: The live subscriptions; each leaves by itself when it is closed.
        self.flows: set[Any] = set()
        self._tasks = Tasks(log)
        #: Runs something on the side until it is done or the driver closes.
        self.spawn = self._tasks.spawn

    async def begin(self, flow: Any) -> None:
        """Start a subscription; one that cannot be started is closed."""
        self.flows.add(flow)
        try:
            await flow.start()
        except BaseException:
            await flow.close()
            raise

    async def end(self) -> None:
        """Close all subscriptions, and end what runs on the side."""
        for flow in list(self.flows):
            await flow.close()
        self._tasks.cancel()


def reconnect_delay(attempt: int, most: float) -> float:
    """Seconds before attempt ``attempt`` to connect, counted from 0.

    At once, then after 0.1, 0.2, 0.4 … seconds, at most ``most``; each shortened by up to a half
    at random, so that the clients of a restarted server do not come all at once.
    """
    if attempt == 0:
        return 0.0
    return min(0.1 * 2.0 ** min(attempt - 1, 32), most) * random.uniform(0.5, 1.0)


def not_yet_connected(where: str) -> NotConnected:
    """The error of whoever uses a broker that is not connected."""
    return NotConnected(
        f"not connected to {where}: `await broker.connect()` comes first",
        state="not connected",
        wanted="connected",
    )


def disconnected(where: str, reason: str = "", timeout: float | None = None) -> NotConnected:
    """The error of whoever waited in vain for a connection to come back."""
    text = f"{where} is not connected" + (f" for {timeout:g} s" if timeout is not None else "")
    return NotConnected(
        f"{text}: {reason}" if reason else text, state="disconnected", wanted="connected"
    )
