"""Millstream inside FastAPI and Starlette applications.

Two ways in. A router that owns a broker, for messages and HTTP side by side::

    router = NatsRouter("nats://localhost:4222")   # from millstream.nats.fastapi
    app = FastAPI()
    app.include_router(router)

and any brokers on an existing application: ``attach(app, broker)``. Either way the broker
connects before the application's own lifespan begins, takes messages while the application
takes requests, and disconnects after the lifespan ended.

Only names that FastAPI documents are used. ``APIRouter.include_router`` is wrapped, because
FastAPI starts an included router's lifespan after the application's own; a router without
that wrapper would still work, but the application's start-up code could not publish yet.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import FunctionType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_origin

import fastapi.routing
from fastapi import APIRouter, params
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from starlette.background import BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from .broker import Broker, State
from .codec import as_decode_error, converter, uses_pydantic
from .context import ContextRepo, follow
from .endpoints import Endpoints, Router
from .errors import ContextError, DecodeError, HandlerException, SetupError, StopConsume
from .message import Message, current
from .middleware import Call, Middleware
from .params import MISSING, Bound, Context, Depends, Header, Logger, Param, Path
from .plan import Site
from .publisher import Publisher
from .signature import is_dependency, read_params, unwrap, where_is
from .subscriber import Subscriber
from .types import LoggerLike

__all__ = [
    "Context",
    "Depends",
    "FastAPISource",
    "Header",
    "Logger",
    "Path",
    "StreamRouter",
    "Streams",
    "attach",
]

_log = logging.getLogger("millstream.fastapi")


# Markers in two worlds


class _Resolved(params.Depends):
    """Makes a marker of the context a dependency in FastAPI's eyes.

    Records of FastAPI are frozen and compared by value; a marker is neither.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    __setattr__ = object.__setattr__  # type: ignore[assignment]
    use_cache = True
    scope = None
    #: The parameter that this marker stands for: name and annotation.
    place: tuple[str, Any] | None = None

    @property
    def dependency(self) -> Callable[..., Any]:  # type: ignore[override]
        return self.value

    async def value(self, connection: HTTPConnection) -> Any:
        """The value in an HTTP endpoint, or in a dependency that FastAPI runs for a message."""
        marker: Any = self
        name, annotation = self.place or ("", Any)
        name = marker.name or name
        try:
            if not name:
                raise SetupError(f"{marker!r} has no name here", fix=_NAMELESS)
            value = _look_up(marker, name, connection)
        except ContextError:
            if marker.default is not MISSING:
                return marker.default
            if isinstance(marker, Header | Path):
                raise _invalid("missing", marker, name, "Field required", None) from None
            raise
        if not marker.cast or annotation is Any:
            return value
        try:
            return converter(annotation)(value)
        except Exception as error:
            text = str(as_decode_error(error, name))
            raise _invalid("value_error", marker, name, text, value) from error


_NAMELESS = 'give it one, such as Context("user"); only routers of millstream know parameters\' names'


def _invalid(kind: str, marker: Any, name: str, text: str, value: Any) -> RequestValidationError:
    where = {Header: "header", Path: "path"}.get(type(marker).__mro__[1], "context")
    return RequestValidationError([{"type": kind, "loc": (where, name), "msg": text, "input": value}])


def _look_up(marker: Any, name: str, connection: HTTPConnection) -> Any:
    if isinstance(marker, Header):
        for key in (name, name.replace("_", "-")):
            if key in connection.headers:
                return connection.headers[key]
        raise ContextError(f"there is no header {name!r}")
    path = marker.prefix + name
    root, *rest = path.split(".")
    message = connection.scope.get("millstream.message")
    streams = Streams.of(connection.scope.get("app"))
    broker = connection.scope.get("millstream.broker") or streams.broker_of(connection)
    if root == "message":
        if rest[:1] == ["path"]:
            return follow(connection.path_params, rest[1:], path)
        if rest[:1] == ["headers"]:
            return follow(connection.headers, rest[1:], path)
        if message is None:
            raise ContextError(f"{path!r}: an HTTP request has no message")
        return follow(message, rest, path)
    repo = broker.context if broker is not None else ContextRepo()
    roots = {
        "broker": broker,
        "app": connection.scope.get("app"),
        "logger": getattr(broker, "logger", None) or logging.getLogger("millstream"),
        "context": repo,
        "handler_": connection.scope.get("endpoint"),
    }
    if roots.get(root) is not None:
        return follow(roots[root], rest, path)
    if root not in repo and marker.initial is not None:
        repo.set_global(root, marker.initial() if callable(marker.initial) else marker.initial)
    return repo.resolve(path)
