"""Tests without a server: the real lifecycle and the real plans on a bus in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    TypeVar,
    TypeVarTuple,
    cast,
    overload,
)

from .body import reader
from .broker import Broker, State
from .clock import VirtualClock
from .codec import Codec
from .driver import Driver, Sink
from .endpoints import Endpoints
from .errors import DecodeError, RequestTimeout, SetupError, StateError
from .memory import MemoryDriver
from .memory.bus import Delivery, Entry, MemoryBus
from .message import Message
from .middleware import Call, Middleware, Send
from .params import MISSING
from .publisher import Publisher
from .recorder import Recorder, decoded
from .spy import Spied

if TYPE_CHECKING:
    from .app import Millstream
    from .plan import Site

B = TypeVar("B", bound=Broker)
Bs = TypeVarTuple("Bs")

#: Turns of the event loop after which what has not moved waits for something else.
_TURNS = 200
#: Seconds of real time that moving the clock gives to handlers that still run.
_PATIENCE = 0.5


class _Spy(Middleware):
    """Records what reaches the handlers."""

    def __init__(self, probe: _Probe) -> None:
        self.probe = probe

    def consume(self, call_next: Call, site: Site) -> Call:
        recorder = self.probe.recorder(site.handler, site.name)
        # What was on the wire, not what the handler's annotation makes of it: tests compare
        # with what they published.
        read = reader(site, Any, MISSING) if site.decoder is None else None

        async def call(message: Message[Any]) -> Any:
            try:
                result = await call_next(message)
            except DecodeError:
                raise
            except Exception:
                await _record(recorder, message, read)
                raise
            await _record(recorder, message, read)
            return result

        return call


async def _record(
    recorder: Recorder, message: Message[Any], read: Callable[[Message[Any]], Any] | None
) -> None:
    recorder.record(
        await message.decode() if read is None else read(message),
        headers=dict(message.headers),
        path=message.path,
        destination=message.destination,
        reply_to=message.reply_to,
        correlation_id=message.known_correlation_id,
        content_type=message.content_type,
        key=message.key,
    )


# What a publish caused


class _Trace:
    """The deliveries that one publish (or request) caused, directly or by others."""

    def __init__(self, parent: _Trace | None) -> None:
        self.parent = parent
        self.pending: set[Entry] = set()
        self.error: BaseException | None = None

    def add(self, entry: Entry) -> None:
        self.pending.add(entry)
        if self.parent is not None:
            self.parent.add(entry)

    def remove(self, entry: Entry) -> None:
        self.pending.discard(entry)
        if self.parent is not None:
            self.parent.remove(entry)

    def failed(self, error: BaseException) -> None:
        self.error = self.error or error
        if self.parent is not None:
            self.parent.failed(error)


_trace: ContextVar[_Trace | None] = ContextVar("millstream_trace", default=None)


class _Probe:
    """Watches the deliveries of a test's brokers, and keeps the recorders."""

    def __init__(self, clock: VirtualClock | None) -> None:
        self.clock = clock
        self.running: dict[Entry, asyncio.Task[Any] | None] = {}
        #: Entries that time was given to in vain.
        self.stuck: set[Entry] = set()
        #: Deliveries begun and ended.
        self.moves = 0
        self.spied: list[Spied] = []

    # Asked by the core

    def around(self, deliver: Sink, /) -> Sink:
        async def traced(raw: Any) -> None:
            entries = [e for e in map(_entry, raw if isinstance(raw, list) else [raw]) if e]
            if not entries or entries[0] in self.running:
                await deliver(raw)
                return
            token = _trace.set(entries[0].cause)
            task = asyncio.current_task()
            self.running.update((entry, task) for entry in entries)
            self.moves += 1
            try:
                await deliver(raw)
            finally:
                _trace.reset(token)
                self.moves += 1
                for entry in entries:
                    self.running.pop(entry, None)
                    self.stuck.discard(entry)
                    if isinstance(entry.cause, _Trace) and not entry.waiting:
                        entry.cause.remove(entry)

        return traced

    def failed(self, error: BaseException, /) -> None:
        trace = _trace.get()
        if trace is not None:
            trace.failed(error)

    def sending(self, publisher: Publisher, codec: Codec, send: Send, /) -> Send:
        recorder = self.recorder(publisher, f"publisher of {publisher.spec.destination}")

        async def recorded(command: Any) -> Any:
            recorder.record(
                decoded(codec, command.message),
                headers=dict(command.headers or {}),
                destination=command.destination,
                reply_to=command.reply_to,
                correlation_id=command.correlation_id,
                content_type=command.content_type,
                key=getattr(command, "key", None),
            )
            return await send(command)

        return recorded

    # Recorders

    def recorder(self, spied: Spied, name: str) -> Recorder:
        recorder = spied.spy
        if not isinstance(recorder, Recorder):
            recorder = spied.spy = Recorder(name)
            self.spied.append(spied)
        return recorder

    def install(self, endpoints: Endpoints) -> None:
        for inside in endpoints.tree():
            for publisher in inside.publishers:
                self.recorder(publisher, f"publisher of {publisher.spec.destination}")
            for subscriber in inside.subscribers:
                for handler in subscriber.handlers:
                    self.recorder(handler, handler.name)

    def remove(self) -> None:
        for spied in self.spied:
            spied.spy = None
        self.spied.clear()

    # Waiting

    def watch(self, driver: MemoryDriver) -> None:
        """Have a driver's publications wait for what they cause."""
        publish, request = driver.publish, driver.request
        driver.routed = self._routed

        async def waiting_publish(command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
            if _trace.get() is not None:  # inside a delivery: the outermost publisher waits
                return await publish(command, data, headers)
            trace = _Trace(None)
            receipt = await self._inside(trace, publish(command, data, headers))
            await self._finished(trace)
            if trace.error is not None:
                raise trace.error
            return receipt

        async def waiting_request(
            command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
        ) -> Any:
            trace = _Trace(_trace.get())
            asking = self._inside(trace, request(command, data, headers, timeout))
            turn = idle = 0
            while not asking.done():
                turn, idle = turn + 1, 0 if trace.pending else idle + 1
                if idle > _TURNS:
                    asking.cancel()
                    raise RequestTimeout(
                        f"no reply from {command.destination!r}, and nothing is left to send it"
                    )
                await asyncio.sleep(0 if idle or turn < _TURNS else 0.0005)
            return await asking

        driver.publish = waiting_publish  # type: ignore[method-assign]
        driver.request = waiting_request  # type: ignore[method-assign]

    def _inside(self, trace: _Trace, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        token = _trace.set(trace)
        try:
            return asyncio.get_running_loop().create_task(work)
        finally:
            _trace.reset(token)

    def _routed(self, entry: Entry) -> None:
        entry.cause = _trace.get()
        if entry.cause is not None and (entry.store is None or entry.store.members):
            entry.cause.add(entry)

    async def _finished(self, trace: _Trace) -> None:
        """Wait until all deliveries of a trace are over, or wait for the clock."""
        turn, idle, moves = 0, 0, self.moves
        while trace.pending:
            moved, moves = moves != self.moves, self.moves
            turn, idle = turn + 1, 0 if moved or self._active() else idle + 1
            if idle > _TURNS:
                return
            await asyncio.sleep(0 if idle or turn < _TURNS else 0.0005)

    def _active(self, besides: set[Entry] = frozenset()) -> bool:  # type: ignore[assignment]
        """Whether a delivery runs that does not wait for the clock."""
        assert self.clock is not None
        asleep = self.clock.sleeping
        return any(task not in asleep for e, task in self.running.items() if e not in besides)

    async def quiet(self) -> None:
        """Give real time to handlers that need it (threads, for one), but not forever."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _PATIENCE
        while self._active(self.stuck):
            if loop.time() > end:
                self.stuck.update(self.running)
                return
            await asyncio.sleep(0.0005)


def _entry(raw: Any) -> Entry | None:
    delivery = getattr(raw, "delivery", raw)
    return delivery.entry if isinstance(delivery, Delivery) else None


# Brokers and applications under test


class TestBroker(Generic[*Bs]):
    """Runs brokers in memory: ``async with TestBroker(broker) as broker:``.

    Each broker gets a driver with its own address rules and capabilities in place of its
    connection, and is started; at the end it is stopped and gets its own driver back. All
    else is what runs in production. Several brokers (a tuple comes back) are connected with
    each other, as if they had one server.

    ``publish`` returns when everything that it caused is done or waits for the clock, and
    raises the first error that a handler ended with. Time stands still; delayed
    redeliveries, backoffs, deadlines and the waits of batches are due when
    ``await test.clock.advance(seconds)`` moves it.

    Args:
        brokers: not started yet.
        with_real: keep the real connection and the real time; recording is all that is added.
        connect_only: do not start the subscribers; a :class:`TestApp` or the test will.
        clock: the virtual clock to use; a new one by default.
        wait: False to have ``publish`` return at once and raise no handler's errors, as on a
            server.

    Raises:
        SetupError: a broker is of a kind that another test broker is for.
        StateError: a broker runs already.
    """

    __test__ = False
    #: The driver in memory, and the one that it stands in for.
    memory: ClassVar[type[MemoryDriver]] = MemoryDriver

    def __init__(
        self,
        *brokers: *Bs,
        with_real: bool = False,
        connect_only: bool | None = None,
        clock: VirtualClock | None = None,
        wait: bool = True,
    ) -> None:
        if not brokers:
            raise SetupError("a test broker without a broker", fix="give it the broker to test")
        if with_real and clock is not None:
            raise SetupError(
                "with_real=True and clock= exclude each other", fix="a server has its own time"
            )
        self.brokers = cast("tuple[Broker, ...]", brokers)
        self.with_real, self.connect_only, self.wait = with_real, bool(connect_only), wait
        self._clock = None if with_real else clock or VirtualClock()
        self._probe = _Probe(self._clock)
        self._stack = AsyncExitStack()

    @property
    def clock(self) -> VirtualClock:
        """The brokers' time: ``await test.clock.advance(60)``."""
        if self._clock is None:
            raise StateError("with_real=True runs in real time, which cannot be moved")
        return self._clock

    @overload
    async def __aenter__(self: TestBroker[B]) -> B: ...  # type: ignore[overload-overlap]
    @overload
    async def __aenter__(self) -> tuple[*Bs]: ...
    async def __aenter__(self) -> Any:
        for broker in self.brokers:
            if broker.state not in (State.NEW, State.STOPPED, State.FAILED):
                raise StateError(
                    f"the broker runs already ({broker.state.value}): enter the test broker first",
                    state=broker.state.value,
                    wanted="new",
                )
        bus = self.memory.bus_class()
        async with AsyncExitStack() as stack:
            stack.callback(self._probe.remove)
            for broker in self.brokers:
                self._swap(broker, bus, stack)
            for broker in self.brokers:
                stack.push_async_callback(self._stop, broker)
                await broker.connect()
            if not self.connect_only:
                for broker in self.brokers:
                    await broker.start()
            self._stack = stack.pop_all()
        first, *others = self.brokers
        return self.brokers if others else first

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def _swap(self, broker: Broker, bus: MemoryBus, stack: AsyncExitStack) -> None:
        driver, clock = broker.driver, broker.clock
        spies, probe = broker.test_middlewares, broker.probe

        def back() -> None:
            broker.driver, broker.clock = driver, clock
            broker.test_middlewares, broker.probe = spies, probe

        stack.callback(back)
        self._probe.install(broker)
        broker.probe = self._probe
        broker.test_middlewares = [*spies, _Spy(self._probe)]
        if self._clock is not None:
            broker.driver = self._memory_driver(driver, bus)
            broker.clock = self._clock
            if self.wait:
                self._probe.watch(broker.driver)
                self._clock.quiet = self._probe.quiet

    def _memory_driver(self, real: Driver, bus: MemoryBus) -> MemoryDriver:
        if real.name != self.memory.name:
            raise SetupError(
                f"{type(self).__name__} is not for brokers of {real.name}",
                fix=f"use the one of millstream.{real.name}",
            )
        return self.memory(bus, clock=self._clock)

    async def _stop(self, broker: Broker) -> None:
        """Stop a broker; a handler that does not end is cut off, its grace period skipped."""
        stopping = asyncio.ensure_future(broker.stop())
        while not (await asyncio.wait([stopping], timeout=1.0))[0]:
            if self._clock is not None:
                await self._clock.advance(broker.graceful_timeout)
        await stopping


class TestApp:
    """Runs an application's lifespan and hooks: ``async with TestApp(app):``.

    Brokers that a test broker started before are started anew by the application, inside its
    lifespan, as in production.

    Args:
        app: the application.
        run_extra_options: what the command line would pass to the hooks.
    """

    __test__ = False

    def __init__(self, app: Millstream, run_extra_options: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self.extra = dict(run_extra_options or {})

    async def __aenter__(self) -> Millstream:
        for broker in self.app.brokers:
            if broker.probe is not None:
                await broker.stop()
        await self.app.start(**self.extra)
        return self.app

    async def __aexit__(self, *exc: object) -> None:
        await self.app.stop()
