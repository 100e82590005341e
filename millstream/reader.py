"""Reading a subscription message by message, without a handler."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from .ack import Settlement
from .body import any_reader
from .driver import Capability
from .message import Link, Message
from .subscription import Subscription, SubscriptionState

if TYPE_CHECKING:
    from .broker import Broker
    from .endpoints import Scope
    from .subscriber import Subscriber


class Reader(Subscription):
    """A subscription whose messages are taken one by one (``get_one``, iteration).

    One message waits at most; the driver's own prefetch holds the rest.
    """

    def __init__(self, subscriber: Subscriber, scope: Scope, broker: Broker) -> None:
        super().__init__(subscriber, scope, broker)
        self._waiting: deque[Message[Any]] = deque()
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()

    def compile(self) -> None:
        """Nothing but the options can be wrong: there is no handler."""
        self.spec.check()
        self.link = Link(self.broker.driver, self.spec, self.name)
        self.link.decode = any_reader(self.spec.codec or self.scope.codec)

    async def start(self) -> None:
        """Subscribe."""
        self.state = SubscriptionState.STARTING
        await self._subscribe(self._hold)

    async def _hold(self, raw: Any) -> None:
        while self._waiting and self.open:
            self._taken.clear()
            await self._taken.wait()
        self._waiting.append(self.spec.envelope(raw, self.link))
        self._arrived.set()

    @property
    def open(self) -> bool:
        """Whether it takes messages."""
        return self.state is not SubscriptionState.STOPPED

    async def take(self, timeout: float | None) -> Message[Any] | None:
        """The next message, or None when the time is over or the subscription stopped."""
        over = False

        def expire() -> None:
            nonlocal over
            over = True
            self._arrived.set()

        timer = self.broker.clock.call_later(timeout, expire) if timeout is not None else None
        try:
            while not self._waiting:
                if over or not self.open:
                    return None
                self._arrived.clear()
                await self._arrived.wait()
            message = self._waiting.popleft()
            self._taken.set()
            return message
        finally:
            if timer is not None:
                timer.cancel()

    async def stop(self, deadline: float) -> None:
        """Hand back what nobody took, and close."""
        if not self.open:
            return
        self.state = SubscriptionState.STOPPED
        self._taken.set()
        await asyncio.sleep(0)
        while self._waiting:
            message = self._waiting.popleft()
            if Capability.NACK in self.spec.capabilities:
                await message.settle(Settlement.NACK, 0.0)
                self.returned += 1
        self._arrived.set()
        if self._intake is not None:
            self.returned += await self._intake.pause()
            await self._intake.close()
            self._intake = None
