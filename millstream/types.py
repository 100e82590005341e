"""Aliases and small protocols of the public API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

AnyCallable = Callable[..., Any]
AsyncFunc = Callable[..., Awaitable[Any]]
AsyncFuncAny = AsyncFunc
DecodedMessage = Any
SendableMessage = Any
#: What ``Millstream(lifespan=...)`` takes.
Lifespan = Callable[..., AbstractAsyncContextManager[None]]


class LoggerLike(Protocol):
    """What a handler may expect of its ``logger``: the standard library's methods.

    A :class:`logging.Logger`, a structlog logger and loguru's ``logger`` all fit.
    """

    def debug(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def info(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def warning(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def error(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def exception(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...
    def critical(self, msg: Any, /, *args: Any, **kwargs: Any) -> Any: ...


LoggerProto = LoggerLike
