"""How messages get from the client's parser to the sink."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_BYTES_LIMIT, DEFAULT_SUB_PENDING_MSGS_LIMIT
from nats.aio.subscription import Subscription as ClientSubscription

from ..base import Feed
from ..driver import Sink

if TYPE_CHECKING:
    from .driver import NatsDriver
    from .options import NatsSubscription

log = logging.getLogger("millstream.nats")

#: Seconds that the server may take to know of a subscription, or to refuse it.
KNOWN = 5.0
#: Seconds that the server may take to confirm that it sends no more.
LEAVE = 2.0


class Tap(asyncio.Future[Any]):
    """Takes each message of a subscription inside the client's parser.

    nats-py hands every message of ``subscribe(..., future=...)`` to ``set_result``. Its other
    way, a callback, costs a queue and a task more for each subscription and cannot be paused
    without losing what waits in that queue.
    """

    def __init__(self, take: Callable[[Msg], None]) -> None:
        super().__init__()
        self._take = take

    def cancelled(self) -> bool:
        return False

    def set_result(self, result: Any) -> None:
        self._take(result)


class Flow(Feed):
    """One subscription: a queue, and one task that gives its messages to the sink in order."""

    def __init__(
        self,
        driver: NatsDriver,
        spec: NatsSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
    ) -> None:
        super().__init__(spec.destination, sink, log)
        self.driver, self.spec, self.lost = driver, spec, lost
        self._sub: ClientSubscription | None = None

    async def start(self) -> None:
        """Begin; raises what cannot heal."""
        raise NotImplementedError

    async def attach(self) -> None:
        """Subscribe on the driver's present connection."""
        raise NotImplementedError

    def reconnected(self) -> None:
        """The connection came back; the client has subscribed again by itself."""

    async def pause(self) -> int:
        raise NotImplementedError

    async def _leave(self) -> None:
        """Unsubscribe, and wait for what the server sent before it knew."""
        sub, self._sub = self._sub, None
        if sub is not None:
            # Never cancelled: nats-py's reader dies of the PONG to a cancelled flush.
            leaving = asyncio.ensure_future(sub.drain())  # type: ignore[no-untyped-call]
            leaving.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.wait([leaving], timeout=LEAVE)

    async def close(self) -> None:
        self.paused = True
        self.driver.flows.discard(self)
        await self._leave()
        await self.cut_off()


class CoreFlow(Flow):
    """A subscription of core NATS.

    The server does not wait for anybody: what comes in faster than the sink takes it waits
    here, up to the limits, and is dropped beyond them with an error report.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        spec = self.spec
        self._deliver, self.sink = self.sink, self._counted
        self._most = spec.pending_msgs_limit or DEFAULT_SUB_PENDING_MSGS_LIMIT
        self._most_bytes = spec.pending_bytes_limit or DEFAULT_SUB_PENDING_BYTES_LIMIT
        self._bytes = 0
        #: Why the server does not permit the subscription.
        self.denied: Exception | None = None
        self.live = False
        self._dropped = 0

    async def start(self) -> None:
        await self.attach()
        await self.driver.flush(KNOWN)
        if self.denied is not None:
            raise self.denied
        self.live = True

    async def attach(self) -> None:
        spec = self.spec
        self._sub = await self.driver.client.subscribe(
            spec.pattern, queue=spec.queue, future=Tap(self._arrived), max_msgs=spec.max_msgs
        )
        if spec.max_msgs:
            await self._sub.unsubscribe(limit=spec.max_msgs)

    def deny(self, error: Exception) -> None:
        """The server refuses: an error of ``subscribe``, or the end of one that ran."""
        self.denied = error
        if self.live:
            self.lost(error)

    def _arrived(self, msg: Msg) -> None:
        size = len(msg.data)
        if len(self.waiting) >= self._most or self._bytes + size > self._most_bytes:
            if not self._dropped:
                self.driver.notify("error", f"{self.where!r} is too slow: messages are dropped")
            self._dropped += 1
            return
        self._bytes += size
        self.put(msg)

    async def _counted(self, raw: Msg) -> None:
        self._bytes -= len(raw.data)
        if self._dropped and len(self.waiting) < self._most // 2:
            self.driver.notify("error", f"{self.where!r} caught up; dropped {self._dropped}")
            self._dropped = 0
        await self._deliver(raw)

    def ended(self) -> bool:
        return not self.waiting

    async def pause(self) -> int:
        await self._leave()
        await self.finish()
        return 0
