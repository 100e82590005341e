"""The service under test and all around it: processes, the bus, what goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, copy_context
from typing import Any
from unittest import mock

import msgspec

from millstream import (
    Batch,
    BatchFailed,
    Breaker,
    Dedup,
    Exponential,
    MemoryDedup,
    Message,
    NackMessage,
    Retry,
    Settlement,
)
from millstream.broker import Broker, State
from millstream.driver import Spec, SubscriptionSpec
from millstream.endpoints import sends
from millstream.errors import NotConnected
from millstream.memory import MemoryBus, MemoryDriver, MemoryEndpoints, MemoryPublish
from millstream.memory.bus import Delivery, MemoryIntake, Source, Store
from millstream.message import current_message
from millstream.subscription import Subscription, SubscriptionState
from tests.simulation.ledger import Attempt, Ledger
from tests.simulation.loop import OWNER, Owner, SimLoop, Spinning, Stuck
from tests.simulation.plan import ACK_WAIT, Event, Fate, Item, Plan

#: Seconds after the last fault in which everything is handled: backoffs, leases, pauses.
PATIENCE = 400.0
LEASE = 15.0
LETTERS = "in.dlq"


class Body(msgspec.Struct):
    id: int


class Ordered(dict[Any, None]):
    """A set whose order does not hang on addresses in memory."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)


class SimSubscription(Subscription):
    """The real one; only what would make two runs of a seed differ is replaced."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.running = Ordered()  # type: ignore[assignment]


class Trouble(NotConnected):
    """What a call to the broker raises while it is broken."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is broken", state="reconnecting", wanted="connected")


class SimIntake(MemoryIntake):
    """Settles over a network that can fail."""

    driver: SimDriver

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        world, process = self.driver.world, self.driver.process
        world.ledger.settling(raw)
        broken = await world.reach(process, "settle")
        if broken:
            world.ledger.excuse(world.ledger.id_of(raw), "settle is broken", settling=True)
        if broken != "before":
            world.ledger.settled(process, raw, how.value)
            await super().settle(raw, how, delay, **options)
        await world.lag()
        if broken:
            raise Trouble("settle")

    async def touch(self, raw: Any, /) -> None:
        world, process = self.driver.world, self.driver.process
        if await world.reach(process, "touch"):
            process.touched = True
            raise Trouble("touch")
        await super().touch(raw)

    async def close(self) -> None:
        ledger = self.driver.world.ledger
        ledger.excuse_open(self.driver.process, "its intake closed")
        if self.at_hand is not None and self.at_hand.current is not None:
            ledger.settling(self.at_hand.current)
        await super().close()


class SimDriver(MemoryDriver):
    """The memory driver of one process, over a network that can fail."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__(world.bus, clock=world.clock)
        self.world, self.process = world, process

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        if source is not None:
            self.world.ledger.given(self.process, delivery)
        return delivery

    async def declare(self, specs: Sequence[Spec]) -> None:
        if await self.world.reach(self.process, "subscribe"):
            raise Trouble("subscribe")
        await super().declare(specs)

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Any, lost: Callable[[Exception], None]
    ) -> MemoryIntake:
        if await self.world.reach(self.process, "subscribe"):
            raise Trouble("subscribe")
        self._check_connected()
        intake = SimIntake(self, spec, sink, lost)
        self._intakes.append(intake)
        await self.world.lag()
        return intake

    async def publish(self, command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        world, letter = self.world, command.destination == LETTERS
        id = int((headers or {}).get("id", 0)) or world.id_of_current()
        what = "dead_letter" if letter else "publish"
        broken = await world.reach(self.process, what)
        if broken:
            world.ledger.excuse(id, f"{what} is broken")
        if broken != "before":
            await super().publish(command, data, headers)
            world.ledger.published(id, letter=letter)
        await world.lag()
        if broken:
            raise Trouble(what)


class SimBroker(MemoryEndpoints, Broker):
    """A broker on the simulated driver."""

    publish = sends(MemoryPublish)


class Process(Owner):
    """One incarnation of a worker process."""

    def __init__(self, world: World, slot: int, boot: int) -> None:
        self.world, self.slot, self.boot = world, slot, boot
        #: Whether a deadline may have passed because it could not be extended.
        self.touched = False
        #: What its user asked for; whether a pause has come into force.
        self.paused = self.stopping = self.stopped = self.quiet = False
        self.calls: list[asyncio.Task[Any]] = []
        self._begun: asyncio.Future[None] | None = None
        self.context = copy_context()
        self.context.run(OWNER.set, self)
        self.driver = SimDriver(world, self)
        self.broker = self.context.run(self._build)

    def __str__(self) -> str:
        return f"p{self.slot}.{self.boot}"

    @property
    def subscription(self) -> Subscription | None:
        return next(iter(self.broker.subscriptions), None)

    def _build(self) -> SimBroker:
        world, plan = self.world, self.world.plan
        broker = SimBroker(
            self.driver,
            clock=world.clock,
            logger=None,
            watchdog=None,
            graceful_timeout=plan.graceful,
            retry=Retry(
                attempts=plan.attempts,
                delay=Exponential(plan.base, cap=4.0, jitter=0.1),
                where=plan.where,
            ),
        )
        broker._tasks = Ordered()  # type: ignore[assignment]
        options: dict[str, Any] = {}
        if plan.ordered:
            options["ordered_by"] = lambda message: int(message.headers["key"])
        if plan.dedup:
            store = world.dedup if plan.dedup == "shared" else None
            options["deduplicate"] = Dedup(key="id", store=store, lease=LEASE)
        if plan.breaker:
            options["breaker"] = Breaker(minimum=3, window=5.0, pause=1.0, longest=4.0)
        if plan.batch:
            options["batch"] = Batch(plan.batch, 0.1)
        subscriber = broker.subscriber(
            "in",
            durable="work",
            ack_deadline=ACK_WAIT,
            concurrency=plan.concurrency,
            handler_timeout=plan.timeout,
            **options,
        )
        if plan.batch:
            subscriber(self._handle_many)
        elif plan.publishes:
            subscriber(broker.publisher("out")(self._handle_and_tell))
        else:
            subscriber(self._handle)
        return broker

    async def _handle(self, body: Body, message: Message[Any]) -> None:
        self.world.ledger.effect(await self.world.work(self, message.raw))

    async def _handle_and_tell(self, body: Body, message: Message[Any]) -> Body:
        self.world.ledger.effect(await self.world.work(self, message.raw))
        return body

    async def _handle_many(self, bodies: list[Body], message: Message[Any]) -> None:
        errors: dict[int, Exception] = {}
        good: list[Attempt] = []
        for index, delivery in enumerate(message.raw):
            try:
                good.append(await self.world.work(self, delivery))
            except Exception as error:
                errors[index] = error
        for attempt in good:  # all or nothing, as in one transaction
            self.world.ledger.effect(attempt)
        if errors:
            raise BatchFailed(errors)

    def spawn(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Call the engine, as its user does: calls begin in their order and run side by side."""
        loop = self.world.loop
        before, begun = self._begun, loop.create_future()
        self._begun = begun

        async def call() -> None:
            if before is not None:
                await before
            begun.set_result(None)
            await work(*args)

        self.calls.append(loop.create_task(call(), context=self.context))

    @property
    def calling(self) -> bool:
        """Whether one of the user's calls has not returned."""
        return not all(task.done() for task in self.calls)


class World:
    """A run of a plan; ``finish`` heals everything and gives the violations."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.rng = random.Random(f"run {seed}")
        self.loop = SimLoop(random.Random(f"loop {seed}"), plan.fifo)
        self.clock = self.loop.clock
        self.ledger = Ledger(plan, self.clock.now)
        self.bus = MemoryBus()
        self.dedup = MemoryDedup(self.clock)
        self.items = {item.id: item for item in plan.items}
        self.broken: dict[str, asyncio.Future[None]] = {}
        self.healed = False
        #: Whether calls never returned, and a stop may leave tasks that end a little later.
        self.unruly = False
        self.unpublished = 0
        self.processes: list[Process] = []
        self._boots = 0
        self._jitter = random.getstate()
        random.seed(seed)
        self._patch = mock.patch("millstream.broker.Subscription", SimSubscription)
        self._patch.start()
        self._sender = MemoryDriver(self.bus, clock=self.clock)
        self._sender.connected = True
        for slot in range(plan.processes):
            self._start(slot)

    def close(self) -> None:
        self.loop.close()
        self._patch.stop()
        random.setstate(self._jitter)

    def later(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        """Make a call in some seconds, whatever becomes of the process that asks for it."""
        Context().run(self.clock.call_later, delay, call, *args)

    @property
    def store(self) -> Store | None:
        return self.bus.stores.get("work")

    def _any(self, fate: Fate) -> bool:
        return any(fate in item.fates for item in self.items.values())

    # What the service calls

    def id_of_current(self) -> int:
        message = current_message()
        assert message is not None
        return int(message.headers["id"])

    async def lag(self) -> None:
        if self.plan.latency:
            await self.clock.sleep(self.rng.random() * self.plan.latency)

    async def reach(self, process: Process, what: str) -> str:
        """Reach the broker: "" if all is well, else whether the call fails before it acts."""
        await self.lag()
        if what in ("settle", "touch") and "mute" in self.broken:
            await asyncio.shield(self.broken["mute"])
            return "before"
        if what not in self.broken:
            return ""
        return "before" if what == "touch" or self.rng.random() < 0.6 else "after"

    async def work(self, process: Process, delivery: Delivery) -> Attempt:
        """What a handler does before its effect."""
        attempt = self.ledger.begin(process, delivery)
        item = self.items[attempt.id]
        tried = len(self.ledger.books[item.id].attempts)
        fate = item.fate(tried)
        if self.healed and fate in ("deaf", "abort"):
            fate = "ok"
        task = asyncio.current_task()
        if fate == "hang" and task is not None and task.cancelling():
            fate = "ok"  # one of the batch ignored the cancellation, and no other comes
        outcome = "cancelled"
        try:
            if item.work:
                await self._try(fate, item.work)
            if fate in ("raise", "never"):
                outcome = "raise"
                raise ValueError("the handler failed")
            if fate == "nack":
                outcome = "nack"
                raise NackMessage
            if fate == "abort":
                self.kill(process)
                self.later(0.5, self.apply, Event(0, "start", process.slot))
                await self.loop.create_future()
            if fate == "slow":
                await self.clock.sleep(3 * ACK_WAIT)
            while fate in ("hang", "deaf"):
                await self._try(fate, 1e6)
            outcome = "ok"
            return attempt
        finally:
            self.ledger.end(attempt, outcome)

    async def _try(self, fate: str, seconds: float) -> None:
        """Work on; the stubborn and the deaf do so when they are cancelled."""
        try:
            await self.clock.sleep(seconds)
        except asyncio.CancelledError:
            if fate not in ("stubborn", "deaf"):
                raise
            await asyncio.sleep(0)
            if fate == "stubborn":
                await self.clock.sleep(0.2)

    # What happens to it

    def _start(self, slot: int) -> None:
        self._boots += 1
        process = Process(self, slot, self._boots)
        process.touched = not self.broken.keys().isdisjoint(("touch", "mute"))
        self.processes.append(process)
        self.ledger.note(f"{process} starts")
        process.spawn(self._run, process)

    async def _run(self, process: Process) -> None:
        while not process.stopping:
            try:
                await process.broker.start()
                return
            except NotConnected:
                await self.clock.sleep(0.5)

    def alive(self, slot: int) -> Process | None:
        return next((p for p in self.processes if p.slot == slot and p.alive), None)

    def kill(self, process: Process) -> None:
        """The process is gone; the server gives away what it had only been sent."""
        self.ledger.note(f"{process} dies")
        self.ledger.excuse_open(process, "killed")
        self.loop.drop(process)
        store = self.store
        for intake in process.driver._intakes:
            if store is not None:
                if intake in store.members:
                    store.members.remove(intake)
                back = list(intake.waiting)
                intake.waiting.clear()
                store.unsettled.difference_update(back)
                store.put_back(back)

    async def _stop(self, process: Process) -> None:
        begin, limit = self.clock.now(), self.plan.graceful + 1.5
        soon = self.plan.graceful - 0.1

        def late() -> None:
            if process.alive and not process.stopped:
                self.ledger.excuse_open(process, "its drain ended")

        self.later(soon, late)
        self.later(limit, self._overdue, process)
        await process.broker.stop()
        process.stopped = True
        self.ledger.note(f"{process} stopped after {self.clock.now() - begin:.3f} s")
        patience = self.clock.now() + 1.0
        self.loop.soon_between(200, lambda: self._exit(process, patience))

    def _overdue(self, process: Process) -> None:
        if process.alive and not process.stopped:
            self.ledger.wrong(f"I5 {process} does not stop in time")

    def _exit(self, process: Process, patience: float, late: bool = False) -> None:
        """The process ends; only what refuses to end may be left."""
        # The user's own calls may take a while, a message that is just handed back an instant.
        busy = process.calling or (self.loop.tasks_of(process) and not late)
        if process.alive and busy and self.clock.now() < patience:
            self.later(0.1, self._exit, process, patience, True)
            return
        if not process.alive:
            return
        if not (self.unruly or self._any("deaf") or self._any("stubborn")):
            left = [task.get_name() for task in self.loop.tasks_of(process)]
            left += [repr(t.call) for t in self.clock.left() if self._is_own(t, process)]
            self.ledger.expect(not left, f"I7 {process} left behind: {left}")
        members = [] if self.store is None else self.store.members
        self.ledger.expect(
            all(m.driver is not process.driver for m in members),
            f"I7 {process} stopped and is still subscribed",
        )
        self.kill(process)

    def _is_own(self, timer: Any, process: Process) -> bool:
        """Whether a process has to cancel a timer itself; those of the store are the server's."""
        server = getattr(timer.call, "__self__", None)
        return timer.owner is process and not isinstance(server, Store)

    def apply(self, event: Event) -> None:
        """Something happens, now."""
        what, _, which = event.what.partition(" ")
        process = self.alive(event.process)
        self.ledger.note(f"* {event.what}" + ("" if which else f" p{event.process}"))
        if what == "break":
            self.broken.setdefault(which, self.loop.create_future())
            self.unruly |= which == "mute"
            if which in ("touch", "mute"):
                for other in self.processes:
                    other.touched = True
        elif what == "heal":
            self._heal(which)
        elif what == "start":
            if process is None:
                self._start(event.process)
        elif process is None:
            return
        elif what == "kill":
            self.kill(process)
        elif what == "stop":
            if not process.stopping:
                process.stopping = True
                process.spawn(self._stop, process)
        elif what == "hurry":
            if process.stopping:
                self.ledger.excuse_open(process, "hurried")
                self.later(1.5, self._overdue, process)
                process.context.run(process.broker.hurry)
        elif process.subscription is None or process.stopping:
            return
        elif what == "pause":
            process.paused = True
            process.spawn(self._pause, process)
        elif what == "resume":
            process.paused = process.quiet = False
            process.spawn(self._resume, process)
        elif what == "lost":
            self._lose(process)

    async def _pause(self, process: Process) -> None:
        subscription = process.subscription
        assert subscription is not None
        started = subscription.state is not SubscriptionState.STOPPED
        await subscription.pause()
        process.quiet = started and process.paused

    async def _resume(self, process: Process) -> None:
        """As a user would: again, until it works."""
        assert process.subscription is not None
        while not process.paused and not process.stopping:
            try:
                await process.subscription.resume()
                return
            except Trouble:
                await self.clock.sleep(0.5)

    def _heal(self, which: str) -> None:
        broken = self.broken.pop(which, None)
        if broken is not None and not broken.done():
            broken.set_result(None)

    def _lose(self, process: Process) -> None:
        """The server ends a subscription, as the memory driver itself would tell it."""
        for intake in process.driver._intakes:
            if self.store is not None and intake in self.store.members:
                self.ledger.excuse_open(process, "subscription lost")
                self.ledger.forget_open(process)
                intake._leave()
                process.context.run(intake.lost, ConnectionError("consumer deleted"))
                return

    def send(self, item: Item) -> None:
        """Publish a message."""
        self.items[item.id] = item
        self.ledger._keys[item.id] = item.key
        self.unpublished += 1
        self.loop.create_task(self._send(item))

    async def _send(self, item: Item) -> None:
        while self.store is None:
            await self.clock.sleep(0.05)
        body = b"{" if item.poison else msgspec.json.encode(Body(item.id))
        headers = {"id": str(item.id), "key": str(item.key)}
        self.unpublished -= 1
        self.ledger.books[item.id].confirmed = True
        self.ledger.note(f"published {item.id} (key {item.key})")
        await self._sender.publish(MemoryPublish(None, subject="in"), body, headers)

    # The run

    def run(self) -> list[str]:
        """Run the whole plan."""
        for item in self.plan.items:
            self.clock.call_later(item.at, self.send, item)
        for event in self.plan.events:
            self.clock.call_later(
                event.at, self.loop.soon_between, event.steps, lambda e=event: self.apply(e)
            )
        last = max([0.0, *(x.at for x in self.plan.items), *(e.at for e in self.plan.events)])
        self.advance(last + 0.01)
        return self.finish()

    def happen(self, event: Event) -> None:
        """Apply an event from outside the loop."""

        async def apply() -> None:
            self.apply(event)

        self._do(apply())

    def advance(self, seconds: float) -> None:
        self._do(self.clock.sleep(seconds))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        if self.ledger.violations:
            work.close()
            return
        try:
            self.loop.run_until_complete(work)
        except (Spinning, Stuck) as error:
            self.ledger.wrong(f"I8 {type(error).__name__}")

    def finish(self) -> list[str]:
        """Heal everything, wait until all is handled, stop, and give the violations."""
        self._do(self._wind_up())
        if not self.ledger.violations:
            self.ledger.close()
            self._unseen_errors()
        return self.ledger.violations

    async def _wind_up(self) -> None:
        self.ledger.note("* all faults end")
        self.healed = True
        for which in list(self.broken):
            self._heal(which)
        for slot in range(self.plan.processes):
            process = self.alive(slot)
            if process is not None and process.paused:
                self.apply(Event(0, "resume", slot))
        if self.plan.breaker:
            # A circuit that is half open waits for a message.
            self.send(Item(1000, 0, 0.0))
        if self._any("deaf"):  # only the end of its process ends such a handler
            await self.clock.sleep(5)
            await self._stop_all()
        if not any(p.alive and not p.stopping for p in self.processes):
            self._start(0)
        end = self.clock.now() + PATIENCE
        while not self._quiet():
            if self.clock.now() > end or self.ledger.violations:
                self.ledger.expect(bool(self.ledger.violations), f"I4 stalled: {self._state()}")
                return
            await self.clock.sleep(1.0)
        await self._stop_all()

    async def _stop_all(self) -> None:
        for process in self.processes:
            if process.alive and not process.stopping:
                self.apply(Event(0, "stop", process.slot))
        await self.clock.sleep(self.plan.graceful + 2.0)
        for process in self.processes:
            if process.alive:
                self.kill(process)

    def _quiet(self) -> bool:
        store = self.store
        if self.unpublished or store is None or store.unsettled:
            return False
        if any(not entry.done for entry in store.ready):
            return False
        return all(
            p.broker.state is State.RUNNING
            and p.subscription is not None
            and p.subscription.state is SubscriptionState.RUNNING
            and not p.subscription.in_flight
            for p in self.processes
            if p.alive and not p.stopping
        )

    def _state(self) -> str:
        open_ = sorted({Ledger.id_of(d) for d in self.ledger.open})
        states = [
            f"{p} {p.broker.state.value}/{p.subscription and p.subscription.health()['state']}"
            for p in self.processes
            if p.alive
        ]
        return f"open {open_}, {', '.join(states)}"

    def _unseen_errors(self) -> None:
        for task in self.loop.tasks:
            if task.done() and not task.cancelled() and task._log_traceback:
                self.ledger.wrong(f"I8 {task.get_name()} failed unseen: {task.exception()!r}")
                task._log_traceback = False
        for error in self.loop.errors:
            self.ledger.wrong(f"I8 {error}")
