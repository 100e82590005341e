"""A subscription as it runs: from a raw message to its settlement."""

from __future__ import annotations

import asyncio
import enum
import operator
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import msgspec

from . import killpoints
from .ack import Settlement
from .delivery import Delivery
from .driver import Capability, Intake, Sink, SubscriptionSpec
from .endpoints import Scope
from .errors import SetupError
from .failure import Failures
from .lanes import Lanes
from .log import log_error, log_line
from .message import Link, Message
from .plan import Plan
from .retry import Exponential
from .subscriber import Subscriber

if TYPE_CHECKING:
    from .broker import Broker

#: How a subscription that was lost comes back.
_RECOVERY = Exponential(0.2, cap=15.0, jitter=0.5)


class SubscriptionState(enum.Enum):
    """Where a subscription is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    RETRYING = "retrying"
    PAUSED = "paused"
    FAILED = "failed"
    STOPPED = "stopped"


class _NotYet:
    """Stands for the intake until the driver returned it: a message may be faster."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ready = asyncio.Event()

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        await self.ready.wait()
        assert self.link.intake is not None
        await self.link.intake.settle(raw, how, delay, **options)

    async def touch(self, raw: Any, /) -> None:
        await self.ready.wait()
        assert self.link.intake is not None
        await self.link.intake.touch(raw)

    async def pause(self) -> int:
        return 0

    async def close(self) -> None:
        return None


class Subscription:
    """One subscription of a broker, its plan, its lanes and its counters."""

    def __init__(self, subscriber: Subscriber, scope: Scope, broker: Broker) -> None:
        self.subscriber, self.scope, self.broker = subscriber, scope, broker
        spec = subscriber.spec
        self.spec: SubscriptionSpec = spec.prefixed(scope.prefix) if scope.prefix else spec
        handlers = subscriber.handlers
        self.name = handlers[0].name if handlers else "(no handler)"
        self.where = handlers[0].where if handlers else ""
        self.state = SubscriptionState.STOPPED
        #: Why it is in this state, where that is not plain.
        self.note = ""
        self.in_flight = 0
        self.handled = 0
        #: Clock time of the last message's end; 0 if there was none.
        self.last_message = 0.0
        self.finished = self.returned = 0
        self.plans: list[Plan] = []
        self.include_in_schema = self.spec.include_in_schema and scope.include_in_schema
        self.failing = Failures(self)
        self._intake: Intake | None = None
        self._lanes: Lanes | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.running: set[Message[Any]] = set()
        self.idle: asyncio.Event | None = None
        self._limit: asyncio.Timeout | None = None
        self._now = False

    # Compile

    def compile(self) -> None:
        """Make the plan.

        Raises:
            SetupError: something about the declaration is wrong.
        """
        try:
            self.spec.check()
            self._check()
            self._take(Delivery(self))
        except SetupError as error:
            error.where = error.where or f"{self.name} ({self.where})"
            raise

    def _check(self) -> None:
        if self.spec.lanes < 1:
            raise SetupError(f"concurrency={self.spec.lanes}", code="MS127", fix="1 or more")
        if self.spec.ordered_by is not None and self.spec.batch is not None:
            raise SetupError("ordered_by and batch exclude each other", code="MS128")
        self.failing.check()

    def _take(self, delivery: Delivery) -> None:
        """Use a compiled delivery from the next message on."""
        self.link, self.plans, self.deliver = delivery.link, delivery.plans, delivery.deliver
        self._replaceable = delivery.has_dependencies
        if self.broker.probe is not None:
            self.deliver = self.broker.probe.around(self.deliver)
        if self._replaceable:
            self.deliver = self._watching_overrides(self.deliver)

    def _watching_overrides(self, deliver: Sink) -> Sink:
        """Compile anew when a test replaces a dependency."""
        overrides = self.broker.dependency_overrides
        seen = dict(overrides)

        async def watching(raw: Any) -> None:
            if overrides == seen:
                await deliver(raw)
                return
            intake = self.link.intake
            self._take(Delivery(self))
            self.link.intake = intake
            await self.broker.values.open(self.broker.stack)
            await self.deliver(raw)

        return watching

    # Life

    async def start(self) -> None:
        """Subscribe and begin to handle messages."""
        spec = self.spec
        self.state = SubscriptionState.STARTING
        sink: Sink = self.deliver
        if spec.lanes > 1 or spec.batch is not None or spec.ordered_by is not None:
            size = spec.batch.size if spec.batch is not None else 1
            self._lanes = Lanes(
                self._deliver_now,
                spec.lanes,
                limit=max(2 * size, 2),
                clock=self.broker.clock,
                key=self._key(),
                batch=spec.batch,
                name=self.name,
            )
            sink = self._lanes.submit
        elif self._replaceable:
            sink = self._deliver_now
        await self._subscribe(sink)
        if spec.ack_wait is not None and Capability.TOUCH in spec.capabilities:
            self._keeper = asyncio.create_task(
                self._keep(spec.ack_wait / 2), name=f"{self.name}-keeper"
            )

    async def _deliver_now(self, raw: Any) -> None:
        await self.deliver(raw)

    async def _subscribe(self, sink: Sink) -> None:
        waiting = _NotYet(self.link)
        self.link.intake = waiting
        self._sink = sink
        self._intake = await self.broker.driver.subscribe(self.spec, sink, self._lost)
        if killpoints.armed():
            self._intake.settle = killpoints.around("settle", self._intake.settle)  # type: ignore[method-assign]
        self.link.intake = self._intake
        waiting.ready.set()
        self.state = SubscriptionState.RUNNING

    def _key(self) -> Callable[[Any], Hashable] | None:
        """The function from a raw message to the key whose order is kept."""
        by = self.spec.ordered_by
        if by is None:
            return None
        envelope, link = self.spec.envelope, self.link
        if callable(by):
            return lambda raw: by(envelope(raw, link))
        if by.startswith("header:"):
            header = by.removeprefix("header:")
            return lambda raw: envelope(raw, link).headers.get(header)
        if link.address is not None and by in link.address.places:
            return lambda raw: envelope(raw, link).path[by]
        codec = self.spec.codec or self.scope.codec
        read = codec.decoder(msgspec.defstruct("Key", [(by, Any, None)]))
        field = operator.attrgetter(by)

        def key(raw: Any) -> Hashable:
            try:
                value = field(read(envelope(raw, link).body))
            except Exception:  # a poison body: any lane may find out
                return None
            return value if isinstance(value, Hashable) else repr(value)

        return key

    def _lost(self, error: Exception) -> None:
        """The driver gave the subscription up: build it anew, again and again."""
        if self.state in (SubscriptionState.RUNNING, SubscriptionState.STARTING):
            self.state = SubscriptionState.RETRYING
            log_line(
                self.broker.logger,
                "warning",
                f"{self.name}: lost {self.spec.destination}: {error}; subscribing anew",
            )
            self._recovery = asyncio.create_task(self._recover(), name=f"{self.name}-recovery")

    async def _recover(self) -> None:
        attempt = 0
        while self.state is SubscriptionState.RETRYING:
            attempt += 1
            await self.broker.clock.sleep(_RECOVERY(attempt))
            try:
                if self._intake is not None:
                    await self._intake.close()
                    self._intake = None
                await self.broker.driver.declare([self.spec])
                await self._subscribe(self._sink)
            except Exception as error:
                if attempt == 1:
                    log_line(self.broker.logger, "warning", f"{self.name}: not back yet: {error}")
                continue
            log_line(self.broker.logger, "info", f"{self.name}: back on {self.spec.destination}")

    async def _keep(self, interval: float) -> None:
        """Push back the ack deadlines of what runs, or waits, longer than half of them."""
        seen: set[Message[Any]] = set()
        while True:
            await self.broker.clock.sleep(interval / 2)
            try:
                for message in list(self.running):
                    if message in seen and message.settled is None:
                        await message.in_progress()
                for raw in self._lanes.items() if self._lanes is not None else ():
                    await self.link.intake.touch(raw)  # type: ignore[union-attr]
            except Exception as error:
                text = f"{self.name}: cannot extend a deadline: {error}"
                log_line(self.broker.logger, "warning", text)
            seen = set(self.running)

    async def pause(self, reason: str = "asked for") -> None:
        """Stop taking messages; those that wait are handed back, those that run finish."""
        if self.state is SubscriptionState.RUNNING:
            self.state, self.note = SubscriptionState.PAUSED, reason
            await self._stop_intake()
            if self._intake is not None:
                await self._idle_before(self.broker.clock.now() + self.broker.graceful_timeout)
                await self._intake.close()
                self._intake = None

    async def resume(self) -> None:
        """Take messages again."""
        if self.state is SubscriptionState.PAUSED:
            self.state, self.note = SubscriptionState.STARTING, ""
            await self._subscribe(self._sink)

    async def _stop_intake(self) -> None:
        """No new message after this; what waits goes back where the source can take it back."""
        if self._intake is not None:
            self.returned += await self._intake.pause()
        if self._lanes is not None and Capability.NACK in self.spec.capabilities:
            while back := self._lanes.take_back():
                for raw in back:
                    await self.link.intake.settle(raw, Settlement.NACK, 0.0)  # type: ignore[union-attr]
                    self.returned += 1
                await asyncio.sleep(0)  # what waited for room in the lanes is in them now

    async def end_with(self, message: Message[Any], *, stop: bool) -> None:
        """Take no further messages, then hand this one back: it must not come here again."""
        await self._stop_intake()
        if Capability.NACK in self.spec.capabilities:
            await message.settle(Settlement.NACK, 0.0)
        if stop:
            await self.stop(self.broker.clock.now() + self.broker.graceful_timeout)

    async def _idle_before(self, deadline: float) -> None:
        """Wait until nothing runs, or the deadline (clock time) is there."""
        clock = self.broker.clock
        self.idle = asyncio.Event()
        timer = clock.call_later(max(deadline - clock.now(), 0.0), self.idle.set)
        try:
            while self.in_flight or (self._lanes is not None and not self._lanes.idle):
                if self._now or clock.now() >= deadline:
                    return
                self.idle.clear()
                await self.idle.wait()
                await asyncio.sleep(0)  # the lane that just finished takes its next item
        finally:
            timer.cancel()
            self.idle = None

    def hurry(self) -> None:
        """End a running drain now."""
        self._now = True
        if self.idle is not None:
            self.idle.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def stop(self, deadline: float) -> None:
        """Drain: stop the intake, hand back, finish what runs until the deadline, close."""
        if self.state is SubscriptionState.STOPPED:
            return
        self.state = SubscriptionState.STOPPED
        if self._recovery is not None:
            self._recovery.cancel()
        handled = self.handled
        try:
            async with asyncio.timeout(None) as self._limit:
                timer = self.broker.clock.call_later(
                    max(deadline - self.broker.clock.now(), 0.0), self.hurry
                )
                if self._now:  # hurried before the drain began
                    self.hurry()
                try:
                    await self._stop_intake()
                finally:
                    timer.cancel()
                    self._limit = None
        except TimeoutError:
            pass  # what still runs is cancelled below
        except Exception as error:
            log_error(self.broker.logger, f"{self.name}: cannot hand back: {error}", error)
        await self._idle_before(deadline)
        if self._lanes is not None:
            await self._lanes.close()
            self._lanes = None
        if self._intake is not None:
            await self._intake.close()
        if self._keeper is not None:
            self._keeper.cancel()
        self._intake = None
        self.finished += self.handled - handled

    def health(self) -> dict[str, Any]:
        """State and progress, for people and probes."""
        now = self.broker.clock.now()
        return {
            "source": self.spec.destination,
            "handler": self.name,
            "state": self.state.value + (f" ({self.note})" if self.note else ""),
            "in_flight": self.in_flight,
            "handled": self.handled,
            "failed": self.failing.count,
            "dead_lettered": self.failing.dead_lettered,
            "seconds_since_last_message": round(now - self.last_message, 3)
            if self.last_message
            else None,
        }
