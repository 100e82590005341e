"""Middleware: a function from the next call to a call, folded once at start.

    call = broker's(router's(subscriber's(handler)))

Nothing is looked up per message; a middleware that leaves a side alone costs nothing there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import DecodeError, IgnoredException, SetupError
from .message import Message, current

if TYPE_CHECKING:
    from .driver import PublishCommand
    from .plan import Site

Call = Callable[[Message[Any]], Awaitable[Any]]
Send = Callable[[Any], Awaitable[Any]]


class Middleware:
    """Wraps the handling of messages, the publishing, or both.

    ``consume`` wraps decoding and handler, and its call's return value is what gets
    published; ``publish`` wraps encoding and sending, and sees the command before its body
    is encoded. Both are called once, at start; ``site`` describes the handler, or for a
    publication its broker.
    """

    def consume(self, call_next: Call, site: Site) -> Call:
        """The call that replaces ``call_next``."""
        return call_next

    def publish(self, call_next: Send, site: Site) -> Send:
        """The send that replaces ``call_next``."""
        return call_next


class BaseMiddleware:
    """Four hooks around each message, on an object made for it.

    A subclass is given as it is (``middlewares=[Timing]``). Only hooks that it overrides
    cost anything.
    """

    def __init__(self, msg: Any = None, /, *, context: Any = None) -> None:
        self.msg = msg
        self.context = context

    async def on_receive(self) -> None:
        """Before anything else."""

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: Any = None,
    ) -> bool | None:
        """After the handler, before its result is published; True swallows the exception."""
        return False

    async def consume_scope(
        self, call_next: Callable[[Any], Awaitable[Any]], msg: Message[Any]
    ) -> Any:
        """Around the handler."""
        return await call_next(msg)

    async def publish_scope(
        self, call_next: Callable[[Any], Awaitable[Any]], cmd: PublishCommand
    ) -> Any:
        """Around a publication."""
        return await call_next(cmd)


class _Hooks(Middleware):
    """Runs a :class:`BaseMiddleware` class."""

    def __init__(self, factory: Callable[..., BaseMiddleware], kind: type[BaseMiddleware]) -> None:
        self.factory = factory
        self.receive = kind.on_receive is not BaseMiddleware.on_receive
        self.after = kind.after_processed is not BaseMiddleware.after_processed
        self.scope = kind.consume_scope is not BaseMiddleware.consume_scope
        self.send = kind.publish_scope is not BaseMiddleware.publish_scope

    def consume(self, call_next: Call, site: Site) -> Call:
        if not (self.receive or self.after or self.scope):
            return call_next
        factory, context = self.factory, site.context

        async def call(msg: Message[Any]) -> Any:
            hooks = factory(msg.raw, context=context)
            await hooks.on_receive()
            try:
                result = await hooks.consume_scope(call_next, msg)
            except Exception as error:
                if await hooks.after_processed(type(error), error, error.__traceback__):
                    return None
                raise
            await hooks.after_processed()
            return result

        return call

    def publish(self, call_next: Send, site: Site) -> Send:
        if not self.send:
            return call_next
        factory, context = self.factory, site.context

        async def send(command: Any) -> Any:
            message = current.get()
            if command.headers is None:
                command.headers = {}  # the hook may add to it
            hooks = factory(message.raw if message is not None else None, context=context)
            return await hooks.publish_scope(call_next, command)

        return send


class _Function(Middleware):
    """A plain ``async def middleware(call_next, msg)``."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.function = function

    def consume(self, call_next: Call, site: Site) -> Call:
        return functools.partial(self.function, call_next)


class ExceptionMiddleware(Middleware):
    """Handlers for exceptions, found along the exception's class hierarchy.

    Args:
        handlers: exception class → function called with the exception; the message then
            counts as handled and nothing is published.
        publish_handlers: the same, but what the function returns is published in place of
            the handler's result.

    The functions' further parameters are filled as a handler's are.
    """

    def __init__(
        self,
        handlers: dict[type[Exception], Callable[..., Any]] | None = None,
        publish_handlers: dict[type[Exception], Callable[..., Any]] | None = None,
    ) -> None:
        self._handlers: dict[type[Exception], tuple[Callable[..., Any], bool]] = {}
        for kind, function in (handlers or {}).items():
            self._handlers[kind] = (function, False)
        for kind, function in (publish_handlers or {}).items():
            self._handlers[kind] = (function, True)

    def add_handler(
        self, error: type[Exception], publish: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function for an exception class, as a decorator."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._handlers[error] = (function, publish)
            return function

        return register

    def consume(self, call_next: Call, site: Site) -> Call:
        from .hooks import compile_hook

        if not self._handlers:
            return call_next
        table = {
            kind: (compile_hook(function, site), publish)
            for kind, (function, publish) in self._handlers.items()
        }

        async def call(msg: Message[Any]) -> Any:
            try:
                return await call_next(msg)
            except IgnoredException:
                raise
            except Exception as error:
                known: list[BaseException] = [error]
                if isinstance(error, DecodeError) and error.__cause__ is not None:
                    # A validation error is known to users by its library's own class.
                    known.append(error.__cause__)
                for one in known:
                    for kind in type(one).__mro__:
                        if kind in table:
                            function, publish = table[kind]
                            result = await function(msg, one)
                            return result if publish else None
                raise

        return call


def as_middleware(item: Any) -> Middleware:
    """Any accepted form of a middleware, as :class:`Middleware`."""
    if isinstance(item, Middleware):
        return item
    if isinstance(item, type) and issubclass(item, Middleware):
        return item()
    if isinstance(item, type) and issubclass(item, BaseMiddleware):
        return _Hooks(item, item)
    function = getattr(item, "func", None)  # functools.partial of a BaseMiddleware
    if isinstance(function, type) and issubclass(function, BaseMiddleware):
        return _Hooks(item, function)
    if inspect.iscoroutinefunction(item):
        return _Function(item)
    if hasattr(item, "consume") or hasattr(item, "publish"):
        return _Duck(item)
    raise SetupError(
        f"{item!r} is not a middleware",
        code="MS111",
        fix="give a Middleware, a BaseMiddleware class, or `async def middleware(call_next, msg)`",
    )


class _Duck(Middleware):
    """An object with ``consume`` or ``publish`` that is no subclass."""

    def __init__(self, item: Any) -> None:
        if hasattr(item, "consume"):
            self.consume = item.consume  # type: ignore[method-assign]
        if hasattr(item, "publish"):
            self.publish = item.publish  # type: ignore[method-assign]


def fold_consume(middlewares: Sequence[Any], call: Call, site: Site) -> Call:
    """Wrap a call; the first middleware is the outermost."""
    for item in reversed(middlewares):
        call = as_middleware(item).consume(call, site)
    return call


def fold_publish(middlewares: Sequence[Any], send: Send, site: Site) -> Send:
    """Wrap a send; the first middleware is the outermost."""
    for item in reversed(middlewares):
        send = as_middleware(item).publish(send, site)
    return send
