"""The brokers of a web application, and their life around the application's own.

    connect → the lifespan's start → take messages … drain → the lifespan's end → disconnect

FastAPI merges the lifespan of an included router into the application's so that it starts
after the application's own, in which nothing could be published then. ``include_router`` is
therefore wrapped: a lifespan with brokers always becomes the outermost one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import UserDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, TypedDict, Unpack

from fastapi import APIRouter
from fastapi.routing import Mount

from ..asgi import end_server
from ..broker import Broker, State
from ..errors import MillstreamError, SetupError
from ..logging import join_server
from .markers import check_endpoints
from .messages import AppExceptions, FastAPISource, called
from .try_it import Operations

_log = logging.getLogger("millstream.fastapi")

_HINT = (
    "the lifespan of the application that it belongs to did not run. The lifespan of an "
    "application that is mounted into another one never runs: start the broker with the outer "
    "one, by millstream.fastapi.attach(outer, broker)"
)


class PartOptions(TypedDict, total=False):
    """What can be said about a broker in a web application; see :class:`Part`."""

    try_it: bool | None
    setup_state: bool
    resolver: Literal["native", "fastapi"]


class Part:
    """A broker in a web application.

    Args:
        find: gives the broker, which may not be there yet.
        try_it: show its subscriptions as operations in /docs; None means in development,
            which is when the environment variable MILLSTREAM_DEV is 1.
        setup_state: give the broker to endpoints as ``request.state.broker``.
        resolver: ``fastapi`` has FastAPI fill all parameters of message handlers.
    """

    def __init__(
        self,
        find: Callable[[], Broker],
        *,
        try_it: bool | None = None,
        setup_state: bool = True,
        resolver: Literal["native", "fastapi"] = "native",
    ) -> None:
        if resolver not in ("native", "fastapi"):
            raise SetupError(f"resolver={resolver!r}", code="MS131", fix="'native' or 'fastapi'")
        self.find, self.setup_state = find, setup_state
        self.resolver: Literal["native", "fastapi"] = resolver
        self.try_it = os.environ.get("MILLSTREAM_DEV") == "1" if try_it is None else try_it
        #: Called with the application when messages are taken, and before the drain.
        self.after_startup: list[Callable[..., Any]] = []
        self.on_shutdown: list[Callable[..., Any]] = []
        self._warned = False

    @property
    def broker(self) -> Broker:
        """The broker."""
        return self.find()

    def warn_if_new(self, where: str) -> None:
        """Say, once, that the broker is used and was never started."""
        broker = self.broker
        if broker.state is State.NEW and not self._warned:
            self._warned = True
            _log.warning("%s was never started (%s): %s", broker.driver.describe(), where, _HINT)


class Streams:
    """What Millstream knows of one web application; ``app.state.millstream``."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.parts: list[Part] = []
        #: Whether the application's lifespan runs.
        self.running = False
        #: What the lifespan yielded; each message gets a copy as ``request.state``.
        self.state: dict[str, Any] = {}
        self._operations = Operations(self)

    @classmethod
    def of(cls, app: Any) -> Streams:
        """The one of an application, made on first use."""
        state = getattr(app, "state", None)
        found = getattr(state, "millstream", None)
        if not isinstance(found, cls):
            found = cls(app)
            if state is not None:
                state.millstream = found
        return found

    @property
    def brokers(self) -> list[Broker]:
        """Every broker once, in the order they were added."""
        return list(dict.fromkeys(part.broker for part in self.parts))

    def add(self, parts: Sequence[Part]) -> None:
        """Take brokers in; harmless for those that are known."""
        for part in parts:
            if part not in self.parts:
                self.parts.append(part)
            self._link(part)

    def _link(self, part: Part) -> None:
        """Make a broker know this application: overrides, state, exceptions, parameters."""
        broker, app = part.broker, self.app
        source = next((s for s in broker.sources if isinstance(s, FastAPISource)), None)
        if source is None:
            source = FastAPISource(self, part.resolver)
            broker.sources.append(source)
            broker.insert_middleware(AppExceptions(source))
        source.streams = self
        broker.hint = _HINT
        if app is None:
            return
        broker.app = app
        if hasattr(app, "dependency_overrides"):
            broker.dependency_overrides = _Overrides(app)
        if not hasattr(app.state, "broker"):
            app.state.broker = broker

    @asynccontextmanager
    async def lifespan(
        self, inner: Callable[[Any], Any], parts: Sequence[Part]
    ) -> AsyncIterator[Any]:
        """Connect, run the inner lifespan, and take messages while it is up.

        The outermost one is for all brokers; one inside of it only for what that one missed.

        Raises:
            ConnectError: a broker was not reached.
            SetupError: a declaration is wrong.
        """
        outermost, self.running = not self.running, True
        parts = list(self.parts if outermost else parts)
        theirs = {State.RUNNING} if outermost else {State.CONNECTED, State.STARTING, State.RUNNING}
        brokers = dict.fromkeys(part.broker for part in parts)
        owned = [broker for broker in brokers if broker.state not in theirs]
        try:
            async with AsyncExitStack() as stack:
                if outermost:
                    join_server()
                for broker in owned:
                    stack.push_async_callback(broker.stop)
                    if broker.on_stop_application is None:
                        broker.on_stop_application = functools.partial(end_server, broker)
                    await _plainly(broker.connect())
                async with inner(self.app) as state:
                    if not outermost and not owned:
                        yield state
                        return
                    await self._start(parts, owned, state)
                    try:
                        yield self.state or None
                    finally:
                        await self._drain(parts, owned)
        finally:
            self.running = not outermost

    async def _start(
        self, parts: Sequence[Part], owned: Sequence[Broker], state: Mapping[str, Any] | None
    ) -> None:
        first = next((part.broker for part in parts if part.setup_state), None)
        self.state = {**({"broker": first} if first is not None else {}), **(state or {})}
        check_endpoints(self.app)
        for broker in owned:
            await _plainly(broker.start())
        self._operations.update()
        self._warn_of_mounted(getattr(self.app, "routes", ()))
        for part in parts:
            for hook in part.after_startup:
                more = await called(hook, self.app)
                self.state.update(more if isinstance(more, Mapping) else {})

    async def _drain(self, parts: Sequence[Part], owned: Sequence[Broker]) -> None:
        for part in parts:
            for hook in part.on_shutdown:
                await called(hook, self.app)
        for broker in owned:
            await broker.drain()

    def _warn_of_mounted(self, routes: Sequence[Any]) -> None:
        for route in routes:
            app = route.app if isinstance(route, Mount) else None
            streams = getattr(getattr(app, "state", None), "millstream", None)
            for part in streams.parts if isinstance(streams, Streams) else ():
                part.warn_if_new(f"mounted at {route.path!r}")
            self._warn_of_mounted(getattr(app, "routes", ()))


class _Overrides(UserDict[Any, Any]):
    """An application's ``dependency_overrides``, also after it was given another dict."""

    data: Any = property(lambda self: self.app.dependency_overrides)

    def __init__(self, app: Any) -> None:
        self.app = app

    def __eq__(self, other: object) -> bool:  # asked for each message
        return bool(self.data == other)


async def _plainly(step: Awaitable[Any]) -> None:
    """A start whose errors are short: servers print them with all their frames and causes."""
    try:
        await step
    except MillstreamError as error:
        _log.debug("the application cannot start", exc_info=error)
        raise error.with_traceback(None) from None


class Lifespan:
    """A lifespan with brokers around it, for wherever FastAPI takes a lifespan."""

    def __init__(self, inner: Callable[[Any], Any], parts: Sequence[Part]) -> None:
        self.inner, self.parts = inner, list(dict.fromkeys(parts))

    @classmethod
    def around(cls, inner: Callable[[Any], Any], parts: Sequence[Part]) -> Lifespan:
        """A lifespan with brokers added."""
        if isinstance(inner, Lifespan):
            return cls(inner.inner, [*inner.parts, *parts])
        return cls(inner, parts)

    def __call__(self, app: Any) -> Any:
        """The context manager for one run of the application."""
        streams = Streams.of(app)
        streams.add(self.parts)
        return streams.lifespan(self.inner, self.parts)


def attach(app: Any, *brokers: Broker, **options: Unpack[PartOptions]) -> Streams:
    """Run brokers with a FastAPI or Starlette application.

    They connect before the application's lifespan and disconnect after it; messages are taken
    while it is up. ``app.state.millstream`` is what this returns, ``app.state.broker`` is the
    first broker.

    Args:
        app: the application that the server runs; not one that is mounted into another.
        brokers: any number; routers may be included before and after.
        options: ``try_it``, ``setup_state``, ``resolver``, as :class:`Part`.

    Raises:
        SetupError: the application or a broker is something else.
    """
    router: Any = getattr(app, "router", None)
    if not hasattr(router, "lifespan_context") or not hasattr(app, "state"):
        raise SetupError(
            f"attach({type(app).__name__}): this is no FastAPI or Starlette application",
            code="MS132",
            fix="give the application itself, not the middleware around it",
        )
    for broker in brokers:
        if not isinstance(broker, Broker):
            raise SetupError(f"attach(): {broker!r} is not a broker", code="MS132")
    streams = Streams.of(app)

    def part(broker: Broker) -> Part:
        return Part(lambda: broker, **options)

    parts = [part(broker) for broker in brokers if broker not in streams.brokers]
    streams.add(parts)
    router.lifespan_context = Lifespan.around(router.lifespan_context, parts)
    return streams


_include = APIRouter.include_router


@functools.wraps(_include)
def _include_router(self: APIRouter, router: APIRouter, *args: Any, **kwargs: Any) -> None:
    mine, theirs = self.lifespan_context, router.lifespan_context
    if isinstance(mine, Lifespan):
        self.lifespan_context = mine.inner
    _include(self, router, *args, **kwargs)
    parts = [part for each in (mine, theirs) if isinstance(each, Lifespan) for part in each.parts]
    if parts:
        self.lifespan_context = Lifespan.around(self.lifespan_context, parts)
        app = self.dependency_overrides_provider  # of an application's own router: the application
        if hasattr(app, "state"):
            streams = Streams.of(app)
            streams.add(parts)
            for broker in streams.brokers if streams.running else ():
                if broker.state is State.NEW:
                    _log.warning(
                        "%s was included while the application runs, and is not started: "
                        "`await router.broker.start()`, and stop() it yourself",
                        broker.driver.describe(),
                    )


APIRouter.include_router = _include_router  # type: ignore[method-assign]
