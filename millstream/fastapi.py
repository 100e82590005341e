"""Millstream inside FastAPI and Starlette applications.

Two ways in. A router that owns a broker, for messages and HTTP side by side::

    router = NatsRouter("nats://localhost:4222")   # from millstream.nats.fastapi
    app = FastAPI()
    app.include_router(router)

and any brokers on an existing application: ``attach(app, broker)``. Either way the broker
connects before the application's own lifespan begins, takes messages while the application
takes requests, and disconnects after that lifespan ended.

Only documented names of FastAPI are used. One method is wrapped, ``APIRouter.include_router``:
FastAPI starts the lifespan of an included router after the application's own, in which nothing
could be published then.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import re
import signal
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from types import FunctionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    get_origin,
)

import fastapi.routing
import msgspec
from fastapi import APIRouter, FastAPI, params
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute, Mount
from fastapi.security import SecurityScopes
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from starlette.background import BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from .broker import Broker, State
from .codec import JSON, as_decode_error, converter
from .context import ContextRepo, follow
from .driver import PublicationSpec, SubscriptionSpec
from .endpoints import Endpoints, Router
from .errors import (
    ContextError,
    DecodeError,
    HandlerException,
    MillstreamError,
    SetupError,
    SetupErrors,
    SignatureError,
    StopConsume,
)
from .message import BatchMessage, Message
from .middleware import Call, Middleware
from .params import MISSING, Bound, Context, Depends, Header, Logger, Param, Path
from .plan import HandlerModel, Site
from .publisher import Publisher
from .signature import is_async, is_dependency, name_of, read_params, where_is
from .subscriber import Handler, Subscriber
from .subscription import Subscription
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


_NAMELESS = (
    'give it one, such as Context("user"); only routers of millstream know parameters\' names'
)


def _invalid(kind: str, marker: Any, name: str, text: str, value: Any) -> RequestValidationError:
    where = {Header: "header", Path: "path"}.get(type(marker).__mro__[1], "context")
    return RequestValidationError(
        [{"type": kind, "loc": (where, name), "msg": text, "input": value}]
    )


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


class _DualContext(Context, _Resolved):
    pass


class _DualHeader(Header, _Resolved):
    pass


class _DualPath(Path, _Resolved):
    pass


class _DualDepends(Depends, params.Depends):
    __eq__ = object.__eq__
    __hash__ = object.__hash__
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    @property
    def scope(self) -> Any:  # type: ignore[override]
        """The scope in FastAPI's words, which the core reads as well."""
        own = self.__dict__["scope"]
        return "request" if own == "message" else own

    @scope.setter
    def scope(self, value: str) -> None:
        self.__dict__["scope"] = value


for _marker, _dual in (
    (Context, _DualContext),
    (Header, _DualHeader),
    (Path, _DualPath),
    (Depends, _DualDepends),
):
    _marker.adapt(_dual)


def _placed(marker: Any, name: str, annotation: Any, default: Any) -> Any:
    """A copy of a marker that knows its parameter."""
    marker = copy.copy(marker)
    marker.place = (name, annotation)
    if marker.default is MISSING:
        marker.default = default
    return marker


def _marker_of(param: Param) -> Any:
    """The context's marker of a parameter: the one it has, or the one its class stands for."""
    for marker in reversed(param.markers):
        if isinstance(marker, Context):
            return marker
        if isinstance(marker, params.Depends | params.Param | params.Body):
            return None
    kind = get_origin(param.annotation) or param.annotation
    if kind is LoggerLike:
        return Context("logger")
    if isinstance(kind, type):
        for base, name in _BY_CLASS.items():
            if issubclass(kind, base):
                return Context(name)
    return None


_BY_CLASS: dict[type, str] = {
    Broker: "broker",
    Message: "message",
    ContextRepo: "context",
    logging.Logger: "logger",
}


def _for_http(endpoint: Callable[..., Any], router: StreamRouter) -> Callable[..., Any]:
    """A twin of an endpoint in whose signature every marker knows its parameter."""
    if isinstance(endpoint, Handler):
        endpoint = endpoint.__wrapped__
    if not isinstance(endpoint, FunctionType):
        return endpoint
    twin = FunctionType(
        endpoint.__code__,
        endpoint.__globals__,
        endpoint.__name__,
        endpoint.__defaults__,
        endpoint.__closure__,
    )
    twin.__kwdefaults__ = endpoint.__kwdefaults__
    functools.update_wrapper(twin, endpoint)
    twin.__dict__.pop("__wrapped__")
    twin.__dict__.update(endpoint.__dict__)
    twin.__dict__["__millstream__"] = router
    try:
        found, _ = read_params(endpoint)
    except SetupError:
        return twin  # FastAPI says what it cannot resolve
    signature = inspect.signature(endpoint)
    twin.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[_http_parameter(p, signature.parameters[p.name]) for p in found]
    )
    return twin


def _http_parameter(param: Param, written: inspect.Parameter) -> inspect.Parameter:
    marker = _marker_of(param)
    declared, default = param.declared, written.default
    if isinstance(marker, Header | Path) and marker.default is MISSING and marker.cast:
        # FastAPI's own markers validate, and show up in its documents.
        native = params.Header if isinstance(marker, Header) else params.Path
        declared = Annotated[param.annotation, native(alias=marker.name or None)]
        default = param.default
    elif marker is not None:
        marker = _placed(marker, param.name, param.annotation, param.default)
        declared, default = Annotated[param.annotation, marker], MISSING
    return written.replace(annotation=declared, default=default, kind=written.KEYWORD_ONLY)


# Applications


class _Overrides(MutableMapping[Any, Any]):
    """An application's ``dependency_overrides``, even after it was given another dict."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __getitem__(self, key: Any) -> Any:
        return self.app.dependency_overrides[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.app.dependency_overrides[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.app.dependency_overrides[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.app.dependency_overrides)

    def __len__(self) -> int:
        return len(self.app.dependency_overrides)

    def __eq__(self, other: object) -> bool:
        return bool(self.app.dependency_overrides == other)


def _end_server(broker: Broker) -> None:
    """End the server in its own orderly way; without one, the broker."""
    if callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        broker.spawn(broker.stop())


class Streams:
    """What Millstream knows of one web application; ``app.state.millstream``.

    Starts and stops the brokers of the application's routers and of :func:`attach`.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.parts: list[Part] = []
        #: Whether the application's lifespan runs.
        self.running = False
        #: What the lifespan yielded; each message gets a copy as ``request.state``.
        self.state: dict[str, Any] = {}
        self._offered: set[str] = set()

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
        """Make a broker know this application: overrides, context, parameters, exceptions."""
        broker, app = part.broker, self.app
        source = next((s for s in broker.sources if isinstance(s, FastAPISource)), None)
        if source is None:
            source = FastAPISource(self, part.resolver)
            broker.sources.append(source)
            broker.insert_middleware(_AppExceptions(source))
        source.streams = self
        if app is None:
            return
        broker.app = app
        if hasattr(app, "dependency_overrides"):
            broker.dependency_overrides = _Overrides(app)
        if not hasattr(app.state, "broker"):
            app.state.broker = broker

    def broker_of(self, connection: HTTPConnection) -> Broker | None:
        """The broker of the router whose endpoint is served, else the application's first."""
        router = getattr(connection.scope.get("endpoint"), "__millstream__", None)
        if router is not None:
            return router.broker  # type: ignore[no-any-return]
        return self.parts[0].broker if self.parts else None

    @asynccontextmanager
    async def lifespan(
        self, inner: Callable[[Any], Any]
    ) -> AsyncIterator[Mapping[str, Any] | None]:
        """Connect, run the inner lifespan, and take messages while it is up."""
        if self.running:  # a lifespan around this one has taken charge
            async with inner(self.app) as state:
                yield state
            return
        self.running = True
        try:
            for part in self.parts:
                self._link(part)
            owned = [broker for broker in self.brokers if broker.state is not State.RUNNING]
            async with AsyncExitStack() as stack:
                for broker in owned:
                    stack.push_async_callback(broker.stop)
                    if broker.on_stop_application is None:
                        broker.on_stop_application = functools.partial(_end_server, broker)
                    await broker.connect()
                async with inner(self.app) as state:
                    merged = await self._start(owned, state)
                    try:
                        yield merged
                    finally:
                        await self._drain(owned)
        finally:
            self.running = False

    async def _start(
        self, owned: Sequence[Broker], state: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        found: dict[str, Any] = {}
        for part in self.parts:
            if part.setup_state:
                found.setdefault("broker", part.broker)
        self.state = {**found, **(state or {})}
        self._check_endpoints()
        for broker in owned:
            await broker.start()
        self._offer()
        self._warn_of_mounted(getattr(self.app, "routes", ()))
        for part in self.parts:
            for hook in part.started:
                more = await _called(hook, self.app)
                self.state.update(more if isinstance(more, Mapping) else {})
        return self.state or None

    async def _drain(self, owned: Sequence[Broker]) -> None:
        for part in self.parts:
            for hook in part.stopping:
                await _called(hook, self.app)
        for broker in owned:
            await broker.drain()

    def _warn_of_mounted(self, routes: Sequence[Any]) -> None:
        for route in routes:
            inner = getattr(route, "app", None) if isinstance(route, Mount) else None
            streams = getattr(getattr(inner, "state", None), "millstream", None)
            if isinstance(streams, Streams) and not streams.running:
                for broker in streams.brokers:
                    if broker not in self.brokers:
                        _log.warning("%s", _never_started(broker, f"mounted at {route.path!r}"))
            self._warn_of_mounted(getattr(inner, "routes", ()))

    # HTTP endpoints with markers

    def _check_endpoints(self) -> None:
        """Tell the markers of HTTP endpoints their parameters.

        Raises:
            SetupErrors: a marker that has no value in an HTTP endpoint.
        """
        errors: list[SetupError] = []
        for route in _routes(self.app):
            for function, name, annotation, marker in _marked(route.endpoint, set()):
                problem = _settle_marker(marker, name, annotation)
                if problem is not None:
                    what, fix = problem
                    errors.append(
                        SetupError(
                            f"{name!r} of the HTTP endpoint {route.path!r}: {what}",
                            code="MS130",
                            where=f"{name_of(function)} ({where_is(function)})",
                            fix=fix,
                        )
                    )
        if errors:
            raise errors[0] if len(errors) == 1 else SetupErrors(errors)

    # Messages seen by FastAPI

    def scope(self, message: Message[Any], site: Site) -> dict[str, Any]:
        """A message as the scope of an HTTP request."""
        headers = [
            (name.lower().encode("latin-1", "replace"), value.encode("utf-8"))
            for name, value in message.headers.items()
        ]
        if not any(name == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"application/json"))
        path = "/" + message.destination
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
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
            "app": self.app,
            "state": dict(self.state),
            "endpoint": site.handler,
            "millstream.message": message,
            "millstream.broker": site.broker,
        }

    async def handled(self, message: Message[Any], site: Site, error: Exception) -> bool:
        """Show an exception to the application's handlers; whether the message is done with it."""
        told: Exception = error
        if isinstance(error, DecodeError):
            cause = error.__cause__
            told = cause if isinstance(cause, RequestValidationError) else _as_request_error(error)
        handler = self._exception_handler(told)
        if handler is None:
            return False
        request = Request(self.scope(message, site), _receiver(message))
        try:
            response = await _called(handler, request, told)
        except Exception:
            _log.exception("the exception handler for %s failed", type(told).__name__)
            return False
        if isinstance(error, DecodeError) or not isinstance(response, Response):
            return False
        if response.status_code >= 500:
            return False
        _log.debug(
            "%s: %r was handled by the application: %s", site.name, error, response.status_code
        )
        await self._answer(message, site, response)
        if response.background is not None:
            await response.background()
        return True

    def _exception_handler(self, error: Exception) -> Callable[..., Any] | None:
        """The handler that the application registered, FastAPI's own defaults aside."""
        handlers = getattr(self.app, "exception_handlers", {})
        keys: list[Any] = [error.status_code] if isinstance(error, HTTPException) else []
        for key in (*keys, *type(error).__mro__, 500):
            handler = handlers.get(key)
            if handler is not None and handler not in _DEFAULT_HANDLERS:
                return handler  # type: ignore[no-any-return]
        return None

    async def _answer(self, message: Message[Any], site: Site, response: Response) -> None:
        broker, spec = site.broker, site.spec
        if spec is None or spec.no_reply or spec.batch is not None or not message.reply_to:
            return
        command = broker.driver.command()
        command.destination = message.reply_to
        command.message = bytes(response.body)
        command.correlation_id = message.known_correlation_id
        await broker._publish(command)

    # Trying messages out from /docs

    def _offer(self) -> None:
        """Add an operation for each subscription that has none yet."""
        if not isinstance(self.app, FastAPI):
            return
        for part in self.parts:
            for subscription in part.broker.subscriptions if part.try_it else ():
                path = f"/messages/{subscription.spec.destination}"
                if path not in self._offered and subscription.plans:
                    self._offered.add(path)
                    _add_operation(self.app, path, subscription)
        if self._offered and not hasattr(self.app.openapi, "__wrapped__"):
            plain = self.app.openapi

            @functools.wraps(plain)
            def openapi() -> dict[str, Any]:
                known = len(self._offered)
                self._offer()
                if len(self._offered) > known:
                    self.app.openapi_schema = None
                return plain()

            self.app.openapi = openapi  # type: ignore[method-assign]


async def _called(function: Callable[..., Any], *args: Any) -> Any:
    """Call as FastAPI does: a plain function in a thread."""
    if is_async(function):
        return await function(*args)
    return await run_in_threadpool(function, *args)


_DEFAULT_HANDLERS = {http_exception_handler, request_validation_exception_handler}


def _as_request_error(error: DecodeError) -> RequestValidationError:
    """A message's decode error as an application knows it from HTTP."""
    steps = [step for step in re.split(r"[.\[\]]+", error.path.removeprefix("$")) if step]
    where = [int(step) if step.isdigit() else step for step in steps]
    return _request_error(error.expected or "decode_error", ("body", *where), str(error), error.got)


def _request_error(
    kind: str, where: tuple[Any, ...], text: str, got: Any
) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": where, "msg": text, "input": got}])


def _receiver(message: Message[Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    body = b"" if isinstance(message, BatchMessage) else message.body
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(parts, {"type": "http.disconnect"})

    return receive


async def _send(part: Any) -> None:
    """There is nobody to send a response to."""


class _AppExceptions(Middleware):
    """Shows a handler's exceptions to the web application."""

    def __init__(self, source: FastAPISource) -> None:
        self.source = source

    def consume(self, call_next: Call, site: Site) -> Call:
        source = self.source

        async def call(message: Message[Any]) -> Any:
            try:
                return await call_next(message)
            except (HandlerException, StopConsume):
                raise
            except Exception as error:
                if await source.streams.handled(message, site, error):
                    return None
                raise

        return call


# Parameters that only FastAPI can fill


#: Classes whose instances FastAPI gives to a parameter by its annotation.
_GIVEN = (HTTPConnection, Response, BackgroundTasks, SecurityScopes)


def _wants_fastapi(param: Param, overrides: Mapping[Any, Any], seen: set[Any]) -> bool:
    """Whether only FastAPI can fill a parameter; a dependency is asked for its own."""
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

    Per handler there is one route that is registered nowhere, whose endpoint has just these
    parameters. A message runs through it as a request would: headers are the message's,
    path parameters the placeholders of its address, the body is the message's body.

    Args:
        streams: the application's brokers.
        resolver: ``native`` takes what needs FastAPI, ``fastapi`` every parameter.
    """

    def __init__(self, streams: Streams, resolver: Literal["native", "fastapi"] = "native") -> None:
        self.streams = streams
        self.resolver = resolver
        self._tasks: dict[int, Any] = {}

    def bind(self, params: Sequence[Param], site: Site) -> Bound | None:
        """Claim parameters of a handler."""
        everything = self.resolver == "fastapi"
        claimed = [p for p in params if everything or _wants_fastapi(p, site.overrides, set())]
        dependencies = [
            d
            for d in site.dependencies
            if everything or _needs_fastapi(d, None, site.overrides, set())
        ]
        if not claimed and not dependencies:
            return None
        app = self._hidden(claimed, dependencies, site)
        streams, tasks = self.streams, self._tasks

        async def around(
            message: Message[Any], proceed: Callable[[dict[str, Any]], Awaitable[Any]]
        ) -> Any:
            scope = self.streams.scope(message, site)
            scope["millstream.proceed"] = proceed
            try:
                await app(scope, _receiver(message), _send)
            except RequestValidationError as error:
                if "millstream.started" in scope:
                    raise  # the handler's own
                raise _as_decode_error(error, site) from error
            if scope["millstream.done"].background is not None:
                tasks[id(message)] = scope["millstream.done"].background
            return scope["millstream.result"]

        async def after(message: Message[Any]) -> None:
            background = tasks.pop(id(message), None)
            if background is not None:
                await background()

        return Bound(tuple(p.name for p in claimed), around, after, tuple(dependencies))

    def _hidden(self, claimed: Sequence[Param], dependencies: Sequence[Any], site: Site) -> Any:
        async def endpoint(millstream_request: Request, **values: Any) -> Response:
            scope = millstream_request.scope
            scope["millstream.started"] = True
            scope["millstream.result"] = await scope["millstream.proceed"](values)
            scope["millstream.done"] = done = _Done()
            return done

        places = site.address.places if site.address is not None else {}
        bodies = [p for p in claimed if self.resolver == "fastapi" and _is_body(p, places)]
        parameter = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        endpoint.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                parameter("millstream_request", annotation=Request),
                *(
                    parameter(
                        p.name, annotation=_for_hidden(p, p in bodies), default=_written_default(p)
                    )
                    for p in claimed
                ),
            ]
        )
        path = "".join(f"/{{{name}}}" for name in places) or "/"
        try:
            route = APIRoute(
                path,
                endpoint,
                methods=["POST"],
                response_model=None,
                dependencies=dependencies,
                dependency_overrides_provider=site.broker,
            )
        except Exception as error:
            raise SignatureError(
                f"FastAPI cannot fill {', '.join(p.name for p in claimed)}: {error}",
                where=f"{site.name} ({site.where})",
                fix="annotate messages and brokers inside FastAPI's dependencies with "
                "millstream's annotations, such as Annotated[..., Context('message')]",
            ) from error
        return AsyncExitStackMiddleware(route.app)


def _written_default(param: Param) -> Any:
    """The default as it stands in the signature, a marker of FastAPI included."""
    if param.default is not MISSING:
        return param.default
    extras = get_args(param.declared)[1:] if get_origin(param.declared) is Annotated else ()
    return param.markers[-1] if len(param.markers) > len(extras) else MISSING


def _is_body(param: Param, places: Mapping[str, Any]) -> bool:
    known = any(
        isinstance(m, Context | params.Param | params.Body) or is_dependency(m)
        for m in param.markers
    )
    by_class = isinstance(param.annotation, type) and issubclass(param.annotation, _GIVEN)
    return not (known or by_class or param.name in places or _marker_of(param))


def _for_hidden(param: Param, whole: bool) -> Any:
    """A parameter's annotation for FastAPI."""
    marker = _marker_of(param)
    if marker is not None:
        return Annotated[
            param.annotation, _placed(marker, param.name, param.annotation, param.default)
        ]
    return Annotated[param.declared, params.Body()] if whole else param.declared


def _as_decode_error(error: RequestValidationError, site: Site) -> DecodeError:
    first = error.errors()[0]
    place, *steps = first["loc"]
    path = "$" + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps)
    return DecodeError(
        f"{site.name}: {place} {path}: {first['msg']}",
        path=path,
        expected=str(first["type"]),
        got=repr(first.get("input"))[:200],
    )


# HTTP endpoints


def _routes(app: Any) -> Iterator[Any]:
    """The HTTP endpoints of an application, those of included routers as well."""
    routes = getattr(app, "routes", ())
    flat = getattr(fastapi.routing, "iter_route_contexts", iter)  # older ones copy on inclusion
    return (r for r in flat(routes) if callable(getattr(r, "endpoint", None)))


def _marked(
    function: Callable[..., Any], seen: set[Any]
) -> Iterator[tuple[Callable[..., Any], str, Any, Any]]:
    """The context's markers that FastAPI will resolve for an endpoint, with their parameters."""
    if function in seen:
        return
    seen.add(function)
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, ValueError):
        return  # FastAPI has looked at it already
    for name, parameter in signature.parameters.items():
        annotation, *extras = (parameter.annotation,)
        if get_origin(annotation) is Annotated:
            annotation, *extras = get_args(annotation)
        for marker in (*extras, parameter.default):
            if isinstance(marker, Context):
                yield function, name, annotation, marker
            elif is_dependency(marker) and callable(marker.dependency or annotation):
                yield from _marked(marker.dependency or annotation, seen)


def _settle_marker(marker: Any, name: str, annotation: Any) -> tuple[str, str] | None:
    """Tell a marker its parameter, or say what is wrong (and how to mend it)."""
    if annotation is inspect.Parameter.empty:
        annotation = Any
    known = marker.place or (name, annotation)
    if not marker.name and known[0] != name:
        return f"{marker!r} stands for {known[0]!r} as well", "give the marker a name"
    if marker.cast and known[1] != annotation:
        return f"{marker!r} is used with another annotation as well", "make a marker for each"
    marker.place = known
    path = marker.prefix + (marker.name or name)
    if path.split(".")[0] == "message" and not path.startswith(("message.headers", "message.path")):
        if marker.default is MISSING:
            return "an HTTP request has no message", f"Context({path!r}, default=None)"
    return None


class _StreamRoute(APIRoute):
    """An HTTP endpoint of a router with a broker: says so once if that was never started."""

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        router = getattr(self.endpoint, "__millstream__", None)
        if router is not None and router.broker.state is State.NEW and not router.warned:
            router.warned = True
            _log.warning("%s", _never_started(router.broker, f"asked for {scope.get('path')!r}"))
        await super().handle(scope, receive, send)


_HINT = (
    "the lifespan of the application that includes its router did not run. The lifespan of an "
    "application mounted into another one never runs: start the broker with the outer one, by "
    "millstream.fastapi.attach(outer, router.broker) or FastAPI(lifespan=router.lifespan_context)"
)


def _never_started(broker: Broker, where: str) -> str:
    return f"{broker.driver.describe()} was never started ({where}): {_HINT}"


# Operations that publish, for /docs


def _add_operation(app: FastAPI, path: str, subscription: Subscription) -> None:
    """A POST operation that publishes to a subscription's address."""
    broker, address, model = subscription.broker, subscription.address, subscription.plans[0].model
    body, single = _body_of(model, subscription.spec.batch is not None), not model.fields
    decode = None if _known_to_pydantic(body) else JSON().decoder(body)

    async def operation(
        millstream_request: Request, millstream_reply: bool, **values: Any
    ) -> dict[str, Any]:
        destination = values.pop("millstream_destination", None)
        if destination is None:
            destination = address.template.format(
                **{name: values.pop(name) for name in address.places}
            )
        elif not address.matches(destination):
            text = f"is no address of {address.pattern!r}"
            raise _request_error("value_error", ("query", "destination"), text, destination)
        data = values.get("millstream_body") if single else values
        if decode is not None:
            try:
                data = decode(await millstream_request.body())
            except Exception as error:
                raise _as_request_error(as_decode_error(error, "the body")) from error
        command = broker.driver.command()
        command.destination, command.message = destination, data
        try:
            if not millstream_reply:
                receipt = await broker._publish(command)
                return {
                    "published": destination,
                    "receipt": msgspec.to_builtins(receipt, enc_hook=str),
                }
            answer = await broker._request(command)
            return {"published": destination, "reply": await answer.decode()}
        except MillstreamError as error:
            raise HTTPException(502, f"{type(error).__name__}: {error}") from error

    written: list[tuple[str, Any, Any]] = [("millstream_request", Request, MISSING)]
    query = functools.partial(
        params.Query, alias="destination", description=f"matching {address.pattern}"
    )
    if {broker.driver.syntax.one, broker.driver.syntax.rest} & set(
        address.template.split(address.separator)
    ):
        written.append(("millstream_destination", Annotated[str, query()], MISSING))
    else:
        written += [(name, Annotated[str, params.Path()], MISSING) for name in address.places]
    if decode is None and single and body is not None:
        written.append(("millstream_body", Annotated[body, params.Body()], MISSING))
    elif decode is None:
        embedded = params.Body(embed=True)
        written += [(n, Annotated[t, embedded], d) for n, (t, d) in model.fields.items()]
    asks = params.Query(alias="reply", description="wait for the answer and return it")
    written.append(("millstream_reply", Annotated[bool, asks], False))
    operation.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
            )
            for name, annotation, default in written
        ]
    )
    shown = {"requestBody": _shown_body(body)} if decode is not None else None
    app.add_api_route(
        path,
        operation,
        methods=["POST"],
        tags=["messages"],
        name=f"publish {address.template}",
        summary=f"{address.template} → {subscription.name}",
        description=model.description or "Publishes the body to the broker.",
        response_model=None,
        openapi_extra=shown,
    )


def _body_of(model: HandlerModel, batch: bool) -> Any:
    """The type of one message's body; None if the handler takes none."""
    if model.fields and not all(_known_to_pydantic(kind) for kind, _ in model.fields.values()):
        fields = sorted(model.fields.items(), key=lambda field: field[1][1] is not MISSING)
        return msgspec.defstruct(
            "Body", [(n, t) if d is MISSING else (n, t, d) for n, (t, d) in fields]
        )
    if batch and model.body is not None:
        return (get_args(model.body) or (Any,))[0]
    return model.body


def _known_to_pydantic(kind: Any) -> bool:
    try:
        TypeAdapter(kind)
    except PydanticUserError:
        return False
    return True


def _shown_body(kind: Any) -> dict[str, Any]:
    """A type of msgspec in an OpenAPI document, without references."""
    schema = msgspec.json.schema(kind)
    known = schema.pop("$defs", {})

    def inline(part: Any, above: tuple[str, ...] = ()) -> Any:
        if isinstance(part, list):
            return [inline(item, above) for item in part]
        if not isinstance(part, dict):
            return part
        name = str(part.get("$ref", "")).removeprefix("#/$defs/")
        if name:
            return inline(known[name], (*above, name)) if name not in above else {"title": name}
        return {key: inline(value, above) for key, value in part.items()}

    return {"required": True, "content": {"application/json": {"schema": inline(schema)}}}


# The two ways in


class Part:
    """A broker in a web application, and what happens around it.

    Args:
        broker: the broker; may be there already.
        try_it: show its subscriptions as operations in /docs; None means in development,
            which is when the environment variable MILLSTREAM_DEV is 1.
        setup_state: give the broker to endpoints as ``request.state.broker``.
        resolver: ``fastapi`` has FastAPI fill all parameters of message handlers.
    """

    broker: Any

    def __init__(
        self,
        *,
        try_it: bool | None = None,
        setup_state: bool = True,
        resolver: Literal["native", "fastapi"] = "native",
    ) -> None:
        self.try_it = os.environ.get("MILLSTREAM_DEV") == "1" if try_it is None else try_it
        self.setup_state = setup_state
        if resolver not in ("native", "fastapi"):
            raise SetupError(f"resolver={resolver!r}", code="MS131", fix="'native' or 'fastapi'")
        self.resolver = resolver
        self.started: list[Callable[..., Any]] = []
        self.stopping: list[Callable[..., Any]] = []


class _Attached(Part):
    def __init__(self, broker: Broker, **options: Any) -> None:
        super().__init__(**options)
        self.broker = broker


def attach(app: Any, *brokers: Broker, **options: Unpack[PartOptions]) -> Streams:
    """Run brokers with a FastAPI or Starlette application.

    They connect before the application's lifespan and disconnect after it; messages are taken
    while it is up. Works before and after routers are included. ``app.state.millstream`` is
    what this returns, ``app.state.broker`` the first broker.

    Args:
        app: the application that the server runs; not one that is mounted into another.
        brokers: any number.
        options: as :class:`Part`.

    Raises:
        SetupError: the application or a broker is something else.
    """
    router = getattr(app, "router", None)
    if not hasattr(router, "lifespan_context") or not hasattr(app, "state"):
        raise SetupError(
            f"attach({type(app).__name__}): not a FastAPI or Starlette application",
            code="MS132",
            fix="give the application itself, before any ASGI middleware wraps it",
        )
    for broker in brokers:
        if not isinstance(broker, Broker):
            raise SetupError(f"attach(): {broker!r} is not a broker", code="MS132")
    streams = Streams.of(app)
    known = streams.brokers
    parts = [_Attached(broker, **options) for broker in brokers if broker not in known]
    streams.add(parts)
    router.lifespan_context = Lifespan.around(router.lifespan_context, parts)
    return streams


class Lifespan:
    """A lifespan with brokers around it, usable wherever FastAPI takes a lifespan."""

    def __init__(self, inner: Callable[[Any], Any], parts: Sequence[Part]) -> None:
        self.inner, self.parts = inner, list(parts)

    @classmethod
    def around(cls, inner: Callable[[Any], Any], parts: Sequence[Part]) -> Lifespan:
        """With one more layer, or the same with more brokers."""
        if isinstance(inner, Lifespan):
            inner, parts = inner.inner, [*inner.parts, *parts]
        return cls(inner, list(dict.fromkeys(parts)))

    def __call__(self, app: Any) -> Any:
        """The context manager for one run of the application."""
        streams = Streams.of(app)
        streams.add(self.parts)
        return streams.lifespan(self.inner)


_include = APIRouter.include_router


@functools.wraps(_include)
def _include_router(self: APIRouter, router: APIRouter, *args: Any, **kwargs: Any) -> None:
    mine, theirs = self.lifespan_context, router.lifespan_context
    if isinstance(mine, Lifespan) and not isinstance(self, StreamRouter):
        self.lifespan_context = mine.inner
    _include(self, router, *args, **kwargs)
    parts = [part for each in (mine, theirs) if isinstance(each, Lifespan) for part in each.parts]
    if parts:
        self.lifespan_context = Lifespan.around(self.lifespan_context, parts)
        app = self.dependency_overrides_provider  # of an application's own router: the application
        if hasattr(app, "state"):
            Streams.of(app).add(parts)


APIRouter.include_router = _include_router  # type: ignore[method-assign]


class PartOptions(TypedDict, total=False):
    """Options of :class:`Part`."""

    try_it: bool | None
    setup_state: bool
    resolver: Literal["native", "fastapi"]


class RouterOptions(PartOptions, total=False):
    """Options of a router with a broker that are not the broker's: those of ``APIRouter``.

    ``prefix``, ``tags`` and ``dependencies`` belong to the HTTP side; a broker with a prefix or
    dependencies of its own is given as ``broker``.
    """

    prefix: str
    tags: Any
    dependencies: Any
    default_response_class: Any
    responses: Any
    callbacks: Any
    routes: Any
    redirect_slashes: bool
    default: Any
    dependency_overrides_provider: Any
    route_class: Any
    on_startup: Any
    on_shutdown: Any
    lifespan: Any
    deprecated: bool | None
    include_in_schema: bool
    generate_unique_id_function: Any


F = TypeVar("F", bound=Callable[..., Any])


class StreamRouter(APIRouter, Part):
    """An ``APIRouter`` that owns a broker; each broker's package has its own subclass.

    Subscribers and publishers are declared on it as on a broker, endpoints as on any
    ``APIRouter``, and one function may be all of that at once. Without arguments for a broker
    it shares the one of the router that includes it.

    Args:
        arguments: the broker's own positional arguments.
        broker: a broker that is there already, instead of arguments for one.
        options: the broker's options, those of ``APIRouter`` and those of :class:`Part`.
    """

    broker_class: ClassVar[type[Broker]]
    router_class: ClassVar[type[Router]]

    def __init__(self, *arguments: Any, broker: Broker | None = None, **options: Any) -> None:
        part = {k: options.pop(k) for k in PartOptions.__annotations__ if k in options}
        http = {k: options.pop(k) for k in RouterOptions.__annotations__ if k in options}
        if broker is not None and (arguments or options):
            given = ", ".join([*map(repr, arguments), *options])
            raise SetupError(
                f"{type(self).__name__}(broker=...) with {given}",
                code="MS133",
                fix="give a broker or the options of one",
            )
        Part.__init__(self, **part)
        self._lifespan: Callable[[Any], Any] | None = None
        self._parts: list[Part] = [self]
        self._broker, self._host = None, None
        self._arguments, self._options = arguments, options
        #: What is declared here; part of the broker, whichever that will be.
        self.declared = self.router_class()
        self.warned = False
        http.setdefault("route_class", _StreamRoute)
        APIRouter.__init__(self, **http)
        if broker is not None:
            self._own(broker)

    def _own(self, broker: Broker) -> Broker:
        self._broker = broker
        broker.include_router(self.declared)
        broker.hint = broker.hint or _HINT
        return broker

    @property
    def broker(self) -> Any:
        """The broker; made on first use."""
        if self._host is not None:
            return self._host.broker
        return self._broker or self._own(self.broker_class(*self._arguments, **self._options))

    @property
    def lifespan_context(self) -> Any:  # type: ignore[override]
        """For ``FastAPI(lifespan=router.lifespan_context)`` where the router is not included."""
        return Lifespan(self._lifespan, self._parts)

    @lifespan_context.setter
    def lifespan_context(self, inner: Any) -> None:
        if isinstance(inner, Lifespan):
            self._parts = list(dict.fromkeys([*self._parts, *inner.parts]))
            inner = inner.inner
        self._lifespan = inner

    def _subscribe(self, spec: SubscriptionSpec, /) -> Subscriber:
        return self.declared._subscribe(spec)

    def _produce(self, spec: PublicationSpec, /) -> Publisher:
        return self.declared._produce(spec)

    def include_router(self, router: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Include a broker's router, another router with a broker, or an ``APIRouter``.

        A router of the same kind that was given no broker and no options of one shares this
        one's.
        """
        if isinstance(router, Endpoints):
            self.declared.include_router(router, *args, **kwargs)
            return
        if isinstance(router, StreamRouter) and router._homeless(self):
            router._host = self
            self.declared.include_router(router.declared)
        super().include_router(router, *args, **kwargs)

    def _homeless(self, host: StreamRouter) -> bool:
        given = self._arguments or self._options or self._broker or self._host
        return not given and self.broker_class is host.broker_class

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        """As ``APIRouter.add_api_route``; the endpoint may ask for what a handler may."""
        super().add_api_route(path, _for_http(endpoint, self), **kwargs)

    def after_startup(self, hook: F) -> F:
        """Call ``hook(app)`` when messages are taken; a mapping it returns joins the state."""
        self.started.append(hook)
        return hook

    def on_broker_shutdown(self, hook: F) -> F:
        """Call ``hook(app)`` before the broker drains."""
        self.stopping.append(hook)
        return hook
