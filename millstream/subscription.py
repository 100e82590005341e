"""A subscription as it runs: from a raw message to its settlement."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import operator
from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, Any

import msgspec

from . import killpoints
from .ack import Settlement
from .delivery import Delivery
from .driver import Capability, Intake, Lending, Sink, SubscriptionSpec
from .endpoints import Scope
from .errors import Fenced, SetupError
from .failure import Failures
from .lanes import Batches, Lanes
from .log import log_error, log_line
from .message import Link, Message, apart
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
        #: Why the subscription was lost before the driver returned it.
        self.lost: Exception | None = None

    async def _real(self) -> Intake:
        await self.ready.wait()
        assert self.link.intake is not None
        return self.link.intake

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        await (await self._real()).settle(raw, how, delay, **options)

    async def touch(self, raw: Any, /) -> None:
        await (await self._real()).touch(raw)

    async def begun(self, raw: Any, /) -> bool:
        return await (await self._real()).begun(raw)

    async def lag(self) -> int | None:
        return None

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
        # Drivers see what holds.
        if self.spec.retry is None and scope.retry is not None:
            self.spec = msgspec.structs.replace(self.spec, retry=scope.retry)
        if self.spec.dead_letter is msgspec.UNSET and scope.dead_letter is not msgspec.UNSET:
            self.spec = msgspec.structs.replace(self.spec, dead_letter=scope.dead_letter)
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
        #: Asked of what waited, where the source may have given it to another process meanwhile.
        self.ours: Callable[[list[Any]], Awaitable[list[Any]]] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.running: set[Message[Any]] = set()
        self._since: dict[Message[Any], float] = {}
        #: Messages that wait at the broker, when that was asked last; None if it does not tell.
        self.lag: int | None = None
        self.idle: asyncio.Event | None = None
        self._limit: asyncio.Timeout | None = None
        self._now = False
        #: Paused by its user, until its user resumes it.
        self.held = False
        #: Held by whoever pauses, resumes or recovers: one at a time. A stop waits for none.
        self._changing = asyncio.Lock()
        self._draining = 0

    def say(self, level: str, text: str) -> None:
        """Write a log line that begins with the handler's name."""
        log_line(self.broker.logger, level, f"{self.name}: {text}")

    def report(self, what: str, error: BaseException) -> None:
        """Write an error line with its traceback."""
        log_error(self.broker.logger, f"{self.name}: {what}: {error}", error)

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
        limit = self.spec.handler_timeout
        if limit is not None and limit <= 0:
            raise SetupError(f"handler_timeout={limit}", code="MS143", fix="in seconds, above 0")
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
        clock, name = self.broker.clock, self.name
        if spec.batch is not None:
            self._lanes = Batches(self._deliver_now, spec.lanes, spec.batch, clock=clock, name=name)
            sink = self._lanes.submit
        elif spec.lanes > 1 or spec.ordered_by is not None:
            self._lanes = Lanes(
                self._deliver_now, spec.lanes, limit=2, clock=clock, key=self._key(), name=name
            )
            sink = self._lanes.submit
        elif self._replaceable:
            sink = self._deliver_now
        wait = spec.ack_wait if Capability.TOUCH in spec.capabilities else None
        if wait is not None:  # before there is a message: a stop may overtake what follows
            self._keeper = asyncio.create_task(self._keep(wait / 2), name=f"{self.name}-keeper")
        try:
            async with self._changing:
                await self._subscribe(sink)
        except BaseException:
            if self._keeper is not None:
                self._keeper.cancel()
            raise

    async def _deliver_now(self, raw: Any) -> None:
        if self.ours is not None:
            batch = self.spec.batch is not None
            left = await self.ours(raw if batch else [raw])
            if not left:
                return
            if batch:
                raw = left
        await self.deliver(raw)

    async def _subscribe(self, sink: Sink) -> None:
        before, waiting = self.link.intake, _NotYet(self.link)
        self.link.intake = waiting
        self._sink = sink

        def lost(error: Exception) -> None:
            if waiting.ready.is_set():
                self._lost(error)
            else:
                waiting.lost = error

        try:
            intake = await self.broker.driver.subscribe(self.spec, sink, lost)
        except BaseException:
            # What still runs may have begun to settle.
            self.link.intake = before
            waiting.ready.set()
            raise
        if killpoints.armed():
            intake.settle = killpoints.around("settle", intake.settle)  # type: ignore[method-assign]
        self.link.intake = intake
        self.ours = intake.ours if isinstance(intake, Lending) else None
        waiting.ready.set()
        if self.state is SubscriptionState.STOPPED:  # while the driver was at it
            await intake.close()
            return
        self._intake = intake
        self.state = SubscriptionState.RUNNING
        if waiting.lost is not None:
            self._lost(waiting.lost)

    def _key(self) -> Callable[[Any], Hashable] | None:
        """The function from a raw message to the key whose order is kept."""
        by = self.spec.ordered_by
        if by is None:
            return None
        envelope, link = self.spec.envelope, self.link
        if callable(by):
            find = by
        elif by.startswith("header:"):
            header = by.removeprefix("header:")
            return lambda raw: envelope(raw, link).headers.get(header)
        elif link.address is not None and by in link.address.places:
            return lambda raw: envelope(raw, link).path[by]
        else:
            codec = self.spec.codec or self.scope.codec
            read = codec.decoder(msgspec.defstruct("Key", [(by, Any, None)]))
            field = operator.attrgetter(by)

            def find(message: Message[Any], /) -> Any:
                return field(read(message.body))

        def key(raw: Any) -> Hashable:
            message = envelope(raw, link)
            try:
                value = find(message)
            except Exception as error:  # a poison body, perhaps: the handler finds out
                if callable(by):
                    self.failing.log(message, error, "ordered_by failed, so it has no order")
                return None
            try:
                hash(value)
            except TypeError:
                return repr(value)
            return value

        return key

    def _lost(self, error: Exception) -> None:
        """The driver gave the subscription up: build it anew, again and again."""
        if isinstance(error, Fenced):
            self._failed(error)
        elif self.state in (SubscriptionState.RUNNING, SubscriptionState.STARTING):
            self.state = SubscriptionState.RETRYING
            self.say("warning", f"lost {self.spec.destination}: {error}; subscribing anew")
            self._recovery = asyncio.create_task(self._recover(), name=f"{self.name}-recovery")

    def _failed(self, error: Exception) -> None:
        """The end of it, while the rest of the broker goes on."""
        if self.state in (SubscriptionState.STOPPED, SubscriptionState.FAILED):
            return
        self.state, self.note = SubscriptionState.FAILED, str(error)
        self.say("error", f"stopped for good: {error}")
        intake, self._intake = self._intake, None
        if intake is not None:
            self.broker.spawn(intake.close())

    def _is(self, state: SubscriptionState) -> bool:
        """Asked anew after each wait: others change the state meanwhile."""
        return self.state is state

    async def _recover(self) -> None:
        attempt = 0
        while self._is(SubscriptionState.RETRYING):
            attempt += 1
            await self.broker.clock.sleep(_RECOVERY(attempt))
            async with self._changing:
                if not self._is(SubscriptionState.RETRYING):
                    return
                try:
                    if self._intake is not None:
                        await self._intake.close()
                        self._intake = None
                    await self.broker.driver.declare([self.spec])
                    await self._subscribe(self._sink)
                except Exception as error:
                    if attempt == 1:
                        self.say("warning", f"not back yet: {error}")
                    continue
            self.say("info", f"back on {self.spec.destination}")

    async def _keep(self, interval: float) -> None:
        """Push back the ack deadlines of what runs, or waits, longer than half of them."""
        while True:
            seen = set(self._looked_at())
            await self.broker.clock.sleep(interval / 2)
            try:
                for message in list(self.running):
                    if message in seen and message.settled is None:
                        await message.in_progress()
                for raw in self._lanes.items() if self._lanes is not None else ():
                    await self.link.intake.touch(raw)  # type: ignore[union-attr]
            except Exception as error:
                self.say("warning", f"cannot extend a deadline: {error}")

    def _looked_at(self) -> dict[Message[Any], float]:
        """The messages that run, and since when at least: it is looked at now and then, so
        that no message has to pay for it."""
        now = self.broker.clock.now()
        self._since = {message: self._since.get(message, now) for message in self.running}
        return self._since

    @property
    def paused(self) -> bool:
        """Whether it takes nothing because somebody said so: its user, or a breaker."""
        return self.state is SubscriptionState.PAUSED

    async def pause(self, reason: str = "asked for") -> None:
        """Stop taking messages; those that wait are handed back, those that run finish."""
        self.held = True
        await self.halt(reason)
        if self.paused:
            self.note = reason

    async def resume(self) -> None:
        """Take messages again; where the broker is away, as soon as it is back."""
        self.held = False
        await self.go_on()

    async def halt(self, reason: str) -> None:
        """A pause that does not outlast one that was asked for, nor end it."""
        async with self._changing:
            if self.state not in (SubscriptionState.RUNNING, SubscriptionState.RETRYING):
                return
            if self._recovery is not None:
                self._recovery.cancel()
            self.state, self.note = SubscriptionState.PAUSED, reason
            try:
                await self.take_no_more()
            except Exception as error:  # it comes back by its deadline
                self.report("cannot hand back", error)
            await self._idle_before(self.broker.clock.now() + self.broker.graceful_timeout)
            intake, self._intake = self._intake, None
            if intake is not None:
                await intake.close()

    async def go_on(self) -> None:
        """End a pause, unless one that was asked for goes on."""
        async with self._changing:
            if self.paused and not self.held:
                self.state, self.note = SubscriptionState.STARTING, ""
                try:
                    await self._subscribe(self._sink)
                except Exception as error:
                    self._lost(error)

    async def take_no_more(self) -> None:
        """No new message after this; what waits goes back where the source can take it back."""
        if self._intake is not None:
            self.returned += await self._intake.pause()
        lanes = self._lanes
        if lanes is not None and Capability.NACK in self.spec.capabilities:
            while lanes.waiting:
                for raw in reversed(apart(lanes.take_back())):  # each goes before those there
                    try:
                        await self.link.intake.settle(  # type: ignore[union-attr]
                            raw, Settlement.NACK, 0.0, unbegun=True
                        )
                        self.returned += 1
                    except Exception as error:  # it comes back by its deadline
                        self.report("cannot hand back", error)
                await asyncio.sleep(0)  # what waited for room in the lanes is in them now

    async def end_with(self, message: Message[Any], *, stop: bool) -> None:
        """Hand this message back, once no other is taken: it must not come here again."""
        if Capability.NACK in self.spec.capabilities:
            await message.settle(Settlement.NACK, 0.0)
        if stop:
            await self.stop(self.broker.clock.now() + self.broker.graceful_timeout)

    async def _idle_before(self, deadline: float) -> None:
        """Wait until nothing runs, or the deadline (clock time) is there."""
        clock = self.broker.clock
        idle = self.idle = self.idle or asyncio.Event()
        self._draining += 1
        over = deadline <= clock.now()

        def end() -> None:  # a timer may be early by a clock tick, so the time is not asked again
            nonlocal over
            over = True
            idle.set()

        timer = clock.call_later(max(deadline - clock.now(), 0.0), end)
        try:
            while self.in_flight or (self._lanes is not None and not self._lanes.idle):
                if self._now or over:
                    return
                idle.clear()
                await idle.wait()
                await asyncio.sleep(0)  # the lane that just finished takes its next item
        finally:
            timer.cancel()
            self._draining -= 1
            if not self._draining:
                self.idle = None

    def hurry(self) -> None:
        """End a running drain now."""
        self._now = True
        if self.idle is not None:
            self.idle.set()
        if self._limit is not None and not self._limit.expired():
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
                    await self.take_no_more()
                finally:
                    timer.cancel()
                    self._limit = None
        except TimeoutError:
            pass  # what still runs is cancelled below
        except Exception as error:
            self.report("cannot hand back", error)
        await self._idle_before(deadline)
        if self._lanes is not None:
            await self._lanes.close()
            self._lanes = None
        if self._intake is not None:
            await self._intake.close()
        if self.in_flight:
            left = f"{self.in_flight} left behind"
            self.say("error", f"still runs although it was cancelled; {left}")
        if self._keeper is not None:
            self._keeper.cancel()
        self._intake = None
        self.finished += self.handled - handled

    async def ask_lag(self) -> None:
        """Ask the broker how many messages wait there."""
        self.lag = None
        if self._intake is not None:
            with contextlib.suppress(Exception):  # no answer is no lag, and no reason to fail
                self.lag = await self._intake.lag()

    def health(self) -> dict[str, Any]:
        """State and progress, for people and probes; ages are in seconds.

        ``oldest_unsettled`` is known of sources whose ack deadline is kept up, to within a
        quarter of it; ``lag`` is as of the last :meth:`ask_lag`.
        """
        now = self.broker.clock.now()
        open_ = [since for m, since in self._looked_at().items() if m.settled is None]
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
            "oldest_unsettled": round(now - min(open_), 3) if open_ else None,
            "lag": self.lag,
        }
