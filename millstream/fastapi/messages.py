"""Messages as FastAPI sees them: parameters that only it can fill, and exceptions."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from fastapi import params
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from starlette.background import BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from ..errors import DecodeError, IgnoredException, SignatureError
from ..message import BatchMessage, Message
from ..middleware import Call, Middleware
from ..params import MISSING, Bound, Context, Param
from ..plan import Site
from ..signature import is_async, is_dependency, read_params
from .markers import marker_of, placed, request_error, settle_markers

if TYPE_CHECKING:
    from .streams import Streams

_log = logging.getLogger("millstream.fastapi")

#: Classes whose instances FastAPI gives to a parameter for its annotation.
_GIVEN = (HTTPConnection, Response, BackgroundTasks, SecurityScopes)


async def called(function: Callable[..., Any], *args: Any) -> Any:
    """Call as FastAPI does: a plain function in a thread."""
    if is_async(function):
        return await function(*args)
    return await run_in_threadpool(function, *args)


# The message as a request


def scope_of(message: Message[Any], site: Site, streams: Streams) -> dict[str, Any]:
    """A message as the scope of an HTTP request."""
    headers = [(k.lower().encode(), v.encode()) for k, v in message.headers.items()]
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/json"))
    path = f"/{message.destination}"
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
        "path_params": message.path,
        "app": streams.app,
        "state": dict(streams.state),
        "endpoint": site.handler,
        "millstream.message": message,
        "millstream.broker": site.broker,
    }


def _receiver(message: Message[Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    body = b"" if isinstance(message, BatchMessage) else message.body
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(parts, {"type": "http.disconnect"})

    return receive


async def _send(part: Any) -> None:
    """There is nobody to send a response to."""


# Parameters


def _wants_fastapi(param: Param, overrides: Mapping[Any, Any], seen: set[Any]) -> bool:
    """Whether only FastAPI can fill a parameter; of a dependency, any of its own."""
    for marker in reversed(param.markers):
        if isinstance(marker, params.Param | params.Body):
            return True
        if isinstance(marker, Context):
            return False
        if is_dependency(marker):
            return _needs_fastapi(marker, param.annotation, overrides, seen)
    return isinstance(param.annotation, type) and issubclass(param.annotation, _GIVEN)


def _needs_fastapi(
    marker: Any, annotation: Any, overrides: Mapping[Any, Any], seen: set[Any]
) -> bool:
    if isinstance(marker, params.Security):
        return True
    function = marker.dependency or annotation
    function = overrides.get(function, function)
    if function in seen or not callable(function):
        return False
    seen.add(function)
    return any(_wants_fastapi(p, overrides, seen) for p in read_params(function)[0])


class _Done(Response):
    """The hidden endpoint's response: nothing is sent, it only carries background tasks."""

    def __init__(self) -> None:
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        return None


class FastAPISource:
    """Has FastAPI fill those parameters of message handlers that only it can.

    Per handler there is one route that is registered nowhere and whose endpoint has just these
    parameters. A message runs through it as a request would: headers are the message's,
    path parameters the placeholders of its address, the body is the message's body.

    Args:
        streams: the application's brokers.
        resolver: ``native`` takes what needs FastAPI, ``fastapi`` every parameter.
    """

    def __init__(self, streams: Streams, resolver: Literal["native", "fastapi"]) -> None:
        self.streams, self.resolver = streams, resolver
        #: Background tasks of messages that are not settled yet.
        self._tasks: dict[int, Any] = {}

    def bind(self, params: Sequence[Param], site: Site) -> Bound | None:
        """Claim parameters of a handler."""
        everything = self.resolver == "fastapi"
        overrides, tasks = site.overrides, self._tasks
        claimed = [p for p in params if everything or _wants_fastapi(p, overrides, set())]
        dependencies = [
            d for d in site.dependencies if everything or _needs_fastapi(d, None, overrides, set())
        ]
        if not claimed and not dependencies:
            return None
        app = self._hidden(claimed, dependencies, site)

        async def around(
            message: Message[Any], proceed: Callable[[dict[str, Any]], Awaitable[Any]]
        ) -> Any:
            scope = scope_of(message, site, self.streams)
            scope["millstream.proceed"] = proceed
            try:
                async with AsyncExitStack() as stack:
                    scope["fastapi_middleware_astack"] = stack  # as FastAPI's outermost middleware
                    await app(scope, _receiver(message), _send)
            except RequestValidationError as error:
                if "millstream.started" in scope:
                    raise  # the handler's own
                raise _as_decode_error(error, site) from error
            done = scope["millstream.done"]
            if done.background is not None:
                tasks[id(message)] = done.background
            return scope["millstream.result"]

        async def after(message: Message[Any]) -> None:
            background = tasks.pop(id(message), None)
            if background is not None:
                await background()

        return Bound(tuple(p.name for p in claimed), around, after, tuple(dependencies))

    def _hidden(self, claimed: Sequence[Param], dependencies: Sequence[Any], site: Site) -> Any:
        # FastAPI gives the request to one parameter of a function: to ours, and we to the others.
        requests = [p.name for p in claimed if p.annotation in (Request, HTTPConnection)]

        async def endpoint(millstream_request: Request, **values: Any) -> Response:
            for name in requests:
                values[name] = millstream_request
            scope = millstream_request.scope
            scope["millstream.started"] = True
            scope["millstream.result"] = await scope["millstream.proceed"](values)
            scope["millstream.done"] = done = _Done()
            return done

        places = site.address.places if site.address is not None else {}
        written: list[tuple[str, Any, Any]] = [("millstream_request", Request, MISSING)]
        for param in claimed:
            if param.name in requests:
                continue
            marker = marker_of(param)
            annotation: Any = placed(marker, param) if marker is not None else param.declared
            if self.resolver == "fastapi" and _is_body(param, places):
                annotation = Annotated[annotation, params.Body()]
            written.append((param.name, annotation, _written_default(param)))
        endpoint.__dict__["__signature__"] = signature(written)
        try:
            route = APIRoute(
                "".join(f"/{{{name}}}" for name in places) or "/",
                endpoint,
                methods=["POST"],
                response_model=None,
                dependencies=dependencies,
                dependency_overrides_provider=site.broker,
            )
        except Exception as error:
            names = ", ".join(p.name for p in claimed)
            raise SignatureError(
                f"FastAPI cannot fill {names}: {' '.join(str(error).split())}",
                where=f"{site.name} ({site.where})",
                fix="inside FastAPI's dependencies, mark messages and brokers with Context(...), "
                "such as Annotated[NatsMessage, Context('message')]",
            ) from error
        for wrong in settle_markers(route, site.name, with_message=True):
            raise wrong
        return route.app


def signature(parameters: Sequence[tuple[str, Any, Any]]) -> inspect.Signature:
    """A signature of keyword parameters, each with its name, annotation and default."""
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    return inspect.Signature([keyword(n, annotation=a, default=d) for n, a, d in parameters])


def _written_default(param: Param) -> Any:
    """The default as it stands in the signature, also a marker of FastAPI."""
    if marker_of(param) is not None:
        return MISSING
    if param.default is not MISSING:
        return param.default
    extras = get_args(param.declared)[1:] if get_origin(param.declared) is Annotated else ()
    return param.markers[-1] if len(param.markers) > len(extras) else MISSING


def _is_body(param: Param, places: Mapping[str, Any]) -> bool:
    """Whether a parameter without a mark is (a field of) the body."""
    marked = any(
        isinstance(m, params.Param | params.Body) or is_dependency(m) for m in param.markers
    )
    given = isinstance(param.annotation, type) and issubclass(param.annotation, _GIVEN)
    return not (marked or given or param.name in places or marker_of(param) is not None)


def _as_decode_error(error: RequestValidationError, site: Site) -> DecodeError:
    first = error.errors()[0]
    place, *steps = first["loc"]
    path = "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return DecodeError(
        f"{site.name}: {place} {path}: {first['msg']}",
        path=path,
        expected=str(first["type"]),
        got=repr(first.get("input"))[:200],
    )


# Exceptions

_DEFAULT_HANDLERS = {http_exception_handler, request_validation_exception_handler}


class AppExceptions(Middleware):
    """Shows a handler's exceptions to the web application."""

    def __init__(self, source: FastAPISource) -> None:
        self.source = source

    def consume(self, call_next: Call, site: Site) -> Call:
        source = self.source

        async def call(message: Message[Any]) -> Any:
            try:
                return await call_next(message)
            except IgnoredException:
                raise
            except Exception as error:
                if await _handled(error, message, site, source.streams):
                    return None
                raise

        return call


async def _handled(error: Exception, message: Message[Any], site: Site, streams: Streams) -> bool:
    """Whether the application's exception handler made the message done."""
    told: Exception = error
    if isinstance(error, DecodeError):
        cause = error.__cause__
        told = cause if isinstance(cause, RequestValidationError) else as_request_error(error)
    handler = _exception_handler(told, getattr(streams.app, "exception_handlers", {}))
    if handler is None:
        return False
    request = Request(scope_of(message, site, streams), _receiver(message))
    try:
        response = await called(handler, request, told)
    except Exception:
        _log.exception("%s: the handler of %s failed", site.name, type(told).__name__)
        return False
    if isinstance(error, DecodeError) or not isinstance(response, Response):
        return False  # a body that cannot be read goes to the dead letter all the same
    if response.status_code >= 500:
        return False
    _log.debug("%s: %r handled with status %s", site.name, error, response.status_code)
    await _answer(message, site, response)
    if response.background is not None:
        await response.background()
    return True


def _exception_handler(error: Exception, handlers: Mapping[Any, Any]) -> Any:
    """The handler that the application registered; FastAPI's own defaults are none."""
    keys: list[Any] = [error.status_code] if isinstance(error, HTTPException) else []
    for key in (*keys, *type(error).__mro__, 500):
        handler = handlers.get(key)
        if handler is not None and handler not in _DEFAULT_HANDLERS:
            return handler
    return None


async def _answer(message: Message[Any], site: Site, response: Response) -> None:
    broker, spec = site.broker, site.spec
    if spec is None or spec.no_reply or spec.batch is not None or not message.reply_to:
        return
    command = broker.driver.command()
    command.message = bytes(response.body)
    command.answer(message)
    await broker._publish(command)


def as_request_error(error: DecodeError) -> RequestValidationError:
    """A decode error as applications know it from HTTP."""
    steps = [step for step in re.split(r"[.\[\]]+", error.path.removeprefix("$")) if step]
    where = tuple(int(step) if step.isdigit() else step for step in steps)
    kind = error.expected or "decode_error"
    return request_error(kind, ("body", *where), str(error), error.got)
