"""Subscribers as they are declared, and the handlers they carry."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Never, ParamSpec, TypeVar, overload

from . import watchdog
from .checks import unknown_option
from .driver import SubscriptionSpec
from .errors import SetupError, StateError
from .message import Message
from .params import Depends
from .signature import early_hints, name_of, unwrap, where_is
from .spy import Spied

if TYPE_CHECKING:
    from .endpoints import Endpoints
    from .publisher import Publisher
    from .reader import Reader
    from .subscription import Subscription

P = ParamSpec("P")
R = TypeVar("R")


class Handler(Spied, Generic[P, R]):
    """A user's function, unchanged to call, that subscribers and publishers refer to."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.where = where_is(function)
        self.hints = early_hints(function)
        self.publishers: list[Publisher] = []
        functools.update_wrapper(self, function)
        self.name = name_of(function)
        code = getattr(unwrap(function), "__code__", None)
        if code is not None:
            watchdog.handlers[code] = f"{self.name} ({self.where})"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self if obj is None else functools.partial(self.function, obj)

    def __repr__(self) -> str:
        return f"<Handler {self.name} ({self.where})>"


def as_handler(function: Callable[P, R]) -> Handler[P, R]:
    """A function as a :class:`Handler`, or the one it already is."""
    if isinstance(function, Handler):
        return function
    if not callable(function):
        raise SetupError(
            f"{function!r} is not a function", code="MS125", fix="put the decorator on a function"
        )
    if inspect.isclass(function):
        raise SetupError(f"{function.__name__} is a class, not a function", code="MS125")
    return Handler(function)


class Entry:
    """One handler of a subscriber, with what is said for it alone."""

    __slots__ = ("decoder", "dependencies", "filter", "handler", "parser")

    def __init__(
        self,
        handler: Handler[..., Any],
        filter: Callable[[Message[Any]], Any] | None,
        parser: Callable[..., Any] | None,
        decoder: Callable[..., Any] | None,
        dependencies: Sequence[Depends],
    ) -> None:
        self.handler, self.filter = handler, filter
        self.parser, self.decoder, self.dependencies = parser, decoder, tuple(dependencies)


class Subscriber:
    """A declared subscription: a decorator, and an object to start, stop and read from."""

    def __init__(self, spec: SubscriptionSpec, owner: Endpoints) -> None:
        self.spec = spec
        self.owner = owner
        self.entries: list[Entry] = []
        #: The subscriptions it became in a broker, one per inclusion of its router.
        self.running: list[Subscription] = []
        self._reader: Reader | None = None

    @property
    def handlers(self) -> list[Handler[..., Any]]:
        """The handlers, in the order of their declaration."""
        return [entry.handler for entry in self.entries]

    @overload
    def __call__(self, function: Callable[P, R]) -> Handler[P, R]: ...
    @overload
    def __call__(
        self,
        function: None = None,
        *,
        filter: Callable[[Message[Any]], Any] | None = None,
        parser: Callable[..., Any] | None = None,
        decoder: Callable[..., Any] | None = None,
        dependencies: Sequence[Depends] = (),
    ) -> Callable[[Callable[P, R]], Handler[P, R]]: ...
    def __call__(
        self,
        function: Callable[..., Any] | None = None,
        *,
        filter: Callable[[Message[Any]], Any] | None = None,
        parser: Callable[..., Any] | None = None,
        decoder: Callable[..., Any] | None = None,
        dependencies: Sequence[Depends] = (),
    ) -> Any:
        """Register a handler.

        Args:
            function: the handler.
            filter: takes the message; the first handler whose filter says yes gets it, and a
                handler without one takes what is left.
            parser: as in the subscription's options, for this handler.
            decoder: the same.
            dependencies: run before this handler.
        """

        def register(function: Callable[..., Any]) -> Handler[..., Any]:
            handler = as_handler(function)
            self.entries.append(Entry(handler, filter, parser, decoder, dependencies))
            return handler

        return register if function is None else register(function)

    async def start(self) -> None:
        """Start a subscription of a running broker that is declared late, or stopped.

        One without handlers is read from, by ``get_one`` and ``async for``.

        Raises:
            StateError: the broker is not connected.
            SetupError: the declaration is wrong.
        """
        if self.entries:
            await self.owner.root().start_subscriber(self)
        else:
            await self._open_reader()

    async def stop(self) -> None:
        """Stop it: no new messages, running handlers finish."""
        await self.owner.root().stop_subscriber(self)

    async def pause(self) -> None:
        """Stop taking messages; the rest of the broker goes on."""
        for subscription in self._started():
            await subscription.pause()

    async def resume(self) -> None:
        """Take messages again."""
        for subscription in self._started():
            await subscription.resume()

    def _started(self) -> list[Subscription]:
        if not self.running:
            raise StateError(
                f"the subscription of {self.spec.destination!r} is not started", wanted="running"
            )
        return self.running

    async def __aenter__(self) -> Subscriber:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def get_one(self, *, timeout: float = 5.0, **unknown: Never) -> Message[Any] | None:
        """The next message, or None after ``timeout`` seconds; settle it yourself.

        Only for a subscriber without handlers. The subscription is opened by the first call
        unless ``start`` has done that; what was fetched and not taken is handed back when it
        stops.

        Raises:
            StateError: it has a handler, or belongs to no broker that is connected.
            SetupError: the declaration is wrong, or there is no such option.
        """
        for name in unknown:
            raise unknown_option(name, ["timeout"], "get_one")
        reader = await self._open_reader()
        return await reader.take(timeout)

    async def __aiter__(self) -> AsyncIterator[Message[Any]]:
        """Message after message, until it stops; settle each yourself."""
        reader = await self._open_reader()
        while True:
            message = await reader.take(None)
            if message is None:
                return
            yield message

    async def _open_reader(self) -> Reader:
        if self.entries:
            raise StateError(
                f"the subscription of {self.spec.destination!r} has a handler, "
                "which gets the messages; declare another subscriber to read from"
            )
        if self._reader is None or not self._reader.open:
            self._reader = await self.owner.root().open_reader(self)
        return self._reader

    def __repr__(self) -> str:
        return f"<Subscriber {self.spec.destination!r}>"
