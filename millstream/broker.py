"""The broker: a driver, the declarations, and their common life."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self, Unpack, cast

import msgspec

from .checks import caller, check_type, known_options, not_taken, plain
from .clock import Clock, LoopClock
from .connection import Connection
from .context import ContextRepo
from .driver import Driver, PublishCommand, Spec
from .endpoints import (
    Endpoints,
    EndpointsOptions,
    Scope,
    default_scope,
)
from .errors import NotConnected, SetupError, StateError, raise_all
from .log import default_logger, log_line, silent_logger
from .middleware import Send
from .params import ParameterSource
from .publisher import Publication, Publisher
from .reader import Reader
from .runner import AppValues
from .sending import Requester, send_all, sender
from .spy import Probe
from .subscriber import Subscriber
from .subscription import Subscription
from .types import LoggerLike
from .watchdog import watch

_UNSET: Any = msgspec.UNSET


class State(enum.Enum):
    """Where a broker is in its life."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class BrokerOptions(EndpointsOptions, total=False):
    """Options of every broker, whatever its kind, besides those that it shares with routers.

    Keys:
        sources: further providers of parameter values.
        prefix: put before every address.
        graceful_timeout: seconds that running handlers get to finish at a stop; 15.
        startup_timeout: seconds to try to reach the broker at start; 30.
        publish_timeout: seconds a publication waits for a lost connection and for the
            broker's confirmation; 5.
        request_timeout: seconds to wait for an answer; 5.
        watchdog: seconds for which a handler may block the event loop before a warning names
            it; 1. None for no watchdog.
        logger: what ``Logger`` injects and where the broker logs; None for nothing at all.
        context: values for ``Context``; the application's by default.
        clock: time, for tests.
        description: for documents.
        tags: for documents.
    """

    sources: Sequence[ParameterSource]
    prefix: str
    graceful_timeout: float
    startup_timeout: float
    publish_timeout: float
    request_timeout: float
    watchdog: float | None
    logger: LoggerLike | None
    context: ContextRepo | None
    clock: Clock | None
    description: str | None
    tags: Sequence[Any]


#: What they are by default, in seconds.
TIMEOUTS = {
    "graceful_timeout": 15.0,
    "startup_timeout": 30.0,
    "publish_timeout": 5.0,
    "request_timeout": 5.0,
}


#: Options whose values are checked with advice of their own.
_CHECKED = {*TIMEOUTS, "retry"}


def split_options(
    options: Mapping[str, Any], kind: type, owner: str
) -> tuple[dict[str, Any], BrokerOptions]:
    """A broker's own options with its ``publish_timeout``, and those of every broker.

    Raises:
        SetupError: the TypedDict ``kind`` has no such option, or it is of another type.
    """
    known_options(options, kind, owner)
    for name, value in options.items():
        # Where a value is None the default is meant; timeouts and retry have checks of their own,
        # and what is None alone is refused by its broker, with its own advice.
        wanted = plain(kind.__annotations__[name])
        if value is not None and name not in _CHECKED and set(wanted) - {type(None)}:
            check_type(owner, name, value, wanted)
    own = dict(options)
    common = {key: own.pop(key) for key in BrokerOptions.__annotations__ if key in own}
    own["publish_timeout"] = common.get("publish_timeout", TIMEOUTS["publish_timeout"])
    return own, cast(BrokerOptions, common)


class Broker(Endpoints):
    """Connects a driver with declarations.

    ``connect`` is enough to publish; ``start`` also consumes. ``async with broker`` connects
    and stops.
    """

    graceful_timeout: float
    startup_timeout: float
    publish_timeout: float
    request_timeout: float

    def __init__(self, driver: Driver, **options: Unpack[BrokerOptions]) -> None:
        known_options(options, BrokerOptions, type(self).__name__)
        shared = EndpointsOptions.__annotations__
        declared: Any = {name: value for name, value in options.items() if name in shared}
        super().__init__(prefix=options.get("prefix", ""), **declared)
        self.driver = driver
        self.clock = options.get("clock") or LoopClock()
        self.context = options.get("context") or ContextRepo()
        self.sources: list[ParameterSource] = list(options.get("sources", ()))
        #: Dependency → what stands in for it; changes are noticed while the broker runs.
        self.dependency_overrides: MutableMapping[Any, Any] = {}
        for name, default in TIMEOUTS.items():
            value = options.get(name, default)
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise SetupError(
                    f"{type(self).__name__}: {name}={value!r}",
                    code="MS121",
                    where=caller(),
                    fix="seconds, 0 or more",
                )
            setattr(self, name, value)
        self.watchdog = options.get("watchdog", 1.0)
        self.description, self.tags = options.get("description"), options.get("tags", ())
        self._logger: Any = options.get("logger", _UNSET)
        #: The application that runs this broker, if one does.
        self.app: Any = None
        #: Called by ``StopApplication``.
        self.on_stop_application: Callable[[], None] | None = None
        #: What to do if it never started; said by whoever should have started it.
        self.hint = ""
        self.state = State.NEW
        self.subscriptions: list[Subscription] = []
        self.publications: list[Publication] = []
        self.values = AppValues()
        self.stack = AsyncExitStack()
        #: Innermost middlewares that a test broker adds.
        self.test_middlewares: list[Any] = []
        #: What a test broker watches deliveries and publications with.
        self.probe: Probe | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._send: Send | None = None
        self._ask: Requester | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._connection = Connection(self)

    @property
    def logger(self) -> LoggerLike:
        """The logger given, or the application's, or ``millstream.<kind>``."""
        if self._logger is None:
            return silent_logger()
        if self._logger is not msgspec.UNSET:
            return self._logger  # type: ignore[no-any-return]
        given = getattr(self.app, "given_logger", None)
        return given if given is not None else default_logger(self.driver.name)

    @logger.setter
    def logger(self, logger: LoggerLike | None) -> None:
        self._logger = logger

    def root(self) -> Broker:
        return self

    def _changeable(self) -> None:
        if self.state in (State.STARTING, State.RUNNING):
            raise StateError(
                "middlewares are fixed once the broker runs; add them before it starts",
                state=self.state.value,
            )

    # Publishing

    def _publish(self, command: PublishCommand, /) -> Coroutine[Any, Any, Any]:
        if self._send is None:
            raise self._not_connected("publish")
        return self._send(command)  # type: ignore[return-value]

    def _request(self, command: PublishCommand, /) -> Coroutine[Any, Any, Any]:
        if self._ask is None:
            raise self._not_connected("request")
        return self._ask(command, getattr(command, "response_model", None))

    def _not_connected(self, what: str) -> NotConnected:
        hint = (
            "it was stopped"
            if self.state in (State.STOPPED, State.DRAINING, State.FAILED)
            else self.hint
            or "connect or start it first: `await broker.connect()`, `async with broker:`, "
            "or run the application that it belongs to"
        )
        return NotConnected(
            f"cannot {what}: the broker {self.driver.describe()} is not connected "
            f"({self.state.value}); {hint}",
            state=self.state.value,
            wanted="connected",
        )

    async def publish_batch(self, *messages: Any, **options: Any) -> list[Any]:
        """Publish several messages to one address; ``options`` as for ``publish``.

        They are sent without waiting for each other's confirmation, and in order. Returns the
        receipts in the order of the messages.

        Raises:
            ExceptionGroup: some failed; the others are published.
            SetupError: an option is unknown; nothing is published.
        """
        if self._send is None:
            raise self._not_connected("publish")
        kind = self.driver.command
        try:
            commands = [kind(message=m, **options) for m in messages]
        except TypeError as error:
            owner = f"{type(self).__qualname__}.publish_batch"
            raise not_taken(options, kind, owner, error) from error
        return await send_all(self._send, commands)

    # Declarations

    def bind(self) -> None:
        """Give every declared publisher its way to send; idempotent."""
        scope = default_scope(self.codec)
        own = self.inherited(scope)
        self._send = sender(self, own.codec, own.middlewares)
        self._ask = Requester(self, own.codec, own.middlewares)
        self.publications = []
        errors: list[SetupError] = []
        declared = [(d, inside) for d, inside in self.walk(scope) if isinstance(d, Publisher)]
        for publisher, _ in declared:
            publisher.publications = [p for p in publisher.publications if p.broker is not self]
        for publisher, inside in declared:
            spec = publisher.spec.prefixed(inside.prefix) if inside.prefix else publisher.spec
            try:
                spec.check()
            except SetupError as error:
                errors.append(error)
                continue
            publication = Publication(publisher, spec, inside, self)
            publisher.publications.append(publication)
            self.publications.append(publication)
        raise_all(errors)

    def compile(self) -> None:
        """Compile all handlers, without a connection; finds everything that is wrong.

        Raises:
            SetupError: one declaration is wrong.
            SetupErrors: several are.
        """
        errors: list[SetupError] = []
        try:
            self.bind()
        except SetupError as error:
            errors.append(error)
        self.subscriptions = []
        for declaration, scope in self.walk(default_scope(self.codec)):
            if isinstance(declaration, Subscriber):
                declaration.running = [s for s in declaration.running if s.broker is not self]
                if not declaration.entries:
                    continue  # to be read from, or to get its handler later
                subscription = Subscription(declaration, scope, self)
                try:
                    subscription.compile()
                except SetupError as error:
                    errors.append(error)
                    continue
                if declaration.spec.persistent:
                    self.subscriptions.append(subscription)
        raise_all(errors)

    def specs(self) -> list[Spec]:
        """All declarations with their prefixes, as the driver declares them."""
        return [*(s.spec for s in self.subscriptions), *(p.spec for p in self.publications)]

    # Life

    async def connect(self) -> Self:
        """Connect, and try again for ``startup_timeout`` seconds.

        Raises:
            ConnectError: the broker was not reached, or did not let us in.
        """
        if self.state not in (State.NEW, State.STOPPED, State.FAILED):
            return self
        self.state = State.CONNECTING
        try:
            await self._connection.open()
            self.bind()
        except BaseException:
            self.state = State.STOPPED if self.ending else State.FAILED
            await self._connection.close()
            raise
        self.state = State.CONNECTED
        return self

    async def start(self) -> None:
        """Connect, compile, declare what is needed and consume.

        Raises:
            ConnectError: as ``connect``.
            SetupError: a declaration is wrong.
        """
        if self.state in (State.STARTING, State.RUNNING):
            return
        await self.connect()
        self.state = State.STARTING
        try:
            self.compile()
            await self.values.open(self.stack)
            await self.driver.declare(self.specs())
            if self.watchdog is not None:
                self.stack.enter_context(watch(self.watchdog))
            for subscription in self.subscriptions:
                await subscription.start()
                if self._stopping is not None or self._send is None:
                    return  # stopped meanwhile
                subscription.subscriber.running.append(subscription)
        except BaseException:
            await self._shut(State.FAILED)
            raise
        self.state = State.RUNNING
        text = f"{self.driver.describe()}: {len(self.subscriptions)} subscriptions run"
        log_line(self.logger, "debug", text)

    async def stop(self, *exc: object) -> None:
        """Drain and disconnect; safe to call again."""
        if self.state in (State.NEW, State.STOPPED, State.FAILED):
            return
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._shut(State.STOPPED))
        try:
            await asyncio.shield(self._stopping)
        finally:
            if self._stopping is not None and self._stopping.done():
                self._stopping = None

    async def drain(self) -> None:
        """Stop consuming: no new messages, running handlers finish; publishing goes on."""
        if self.state is State.RUNNING:
            await self._drain()
            self.state = State.CONNECTED

    async def _drain(self) -> list[Subscription]:
        """Stop all subscriptions at once, and tell which they were."""
        self.state = State.DRAINING
        deadline, stopped = self.clock.now() + self.graceful_timeout, self.subscriptions
        await asyncio.gather(*(s.stop(deadline) for s in stopped), return_exceptions=True)
        return stopped

    def hurry(self) -> None:
        """End a running drain now: what still runs is cancelled and handed back."""
        for subscription in self.subscriptions:
            subscription.hurry()

    async def _shut(self, last: State) -> None:
        """Drain, then close; ``last`` is the state afterwards."""
        stopped = await self._drain()
        finished, returned = sum(s.finished for s in stopped), sum(s.returned for s in stopped)
        if stopped and last is State.STOPPED:
            text = f"{self.driver.describe()}: finished {finished}, returned {returned}"
            log_line(self.logger, "info", text)
        for task in list(self._tasks):
            task.cancel()
        await self._connection.close()
        try:
            await self.stack.aclose()
        finally:
            self._send = self._ask = None
            for subscription in stopped:
                if subscription in subscription.subscriber.running:
                    subscription.subscriber.running.remove(subscription)
            self.state = last

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def ping(self, timeout: float = 5.0) -> bool:
        """Whether the broker answers within ``timeout`` seconds."""
        return self._send is not None and await self.driver.ping(timeout)

    @property
    def ending(self) -> bool:
        """Whether the broker is being stopped, or is."""
        return self.state in (State.DRAINING, State.STOPPED)

    def closed(self, reason: str) -> None:
        """The connection is closed and does not come back."""
        if self.state in (State.RUNNING, State.STARTING, State.CONNECTED):
            self.state = State.FAILED
            where = self.driver.describe()
            log_line(self.logger, "error", f"{where}: connection closed for good: {reason}")
            self.stop_application()

    # Late subscriptions

    async def start_subscriber(self, subscriber: Subscriber) -> None:
        """Start one subscriber of a running broker; see :meth:`Subscriber.start`."""
        if self._send is None:
            raise self._not_connected("subscribe")
        if any(s.broker is self for s in subscriber.running):
            return
        self.bind()
        started = [Subscription(subscriber, scope, self) for scope in self._scopes(subscriber)]
        for subscription in started:
            subscription.compile()
        await self.values.open(self.stack)
        await self.driver.declare([s.spec for s in started])
        for subscription in started:
            await subscription.start()
            subscriber.running.append(subscription)
            self.subscriptions.append(subscription)

    async def stop_subscriber(self, subscriber: Subscriber) -> None:
        """Stop one subscriber; see :meth:`Subscriber.stop`."""
        deadline = self.clock.now() + self.graceful_timeout
        for subscription in [s for s in subscriber.running if s.broker is self]:
            await subscription.stop(deadline)
            subscriber.running.remove(subscription)
            if subscription in self.subscriptions:
                self.subscriptions.remove(subscription)

    async def open_reader(self, subscriber: Subscriber) -> Reader:
        """Open a subscription that is read from; see :meth:`Subscriber.get_one`."""
        if self._send is None:
            raise self._not_connected("read")
        for scope in self._scopes(subscriber):
            reader = Reader(subscriber, scope, self)
            reader.compile()
            await self.driver.declare([reader.spec])
            await reader.start()
            subscriber.running.append(reader)
            self.subscriptions.append(reader)
            return reader
        raise StateError(f"the subscription of {subscriber.spec.destination!r} is in no broker")

    def _scopes(self, subscriber: Subscriber) -> list[Scope]:
        """The places where a subscriber is included."""
        return [s for declared, s in self.walk(default_scope(self.codec)) if declared is subscriber]

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something beside the messages; cancelled at the end of the drain."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop_application(self) -> None:
        """End the application that runs this broker, or the broker itself."""
        if self.on_stop_application is not None:
            self.on_stop_application()
        else:
            self.spawn(self.stop())

    def health(self) -> dict[str, Any]:
        """State and progress of the broker and of each subscription."""
        return {
            "broker": self.driver.describe(),
            "state": self.state.value,
            "connected": self._send is not None and not self._connection.lost,
            "subscriptions": [s.health() for s in self.subscriptions],
        }
