"""A plain application as an ASGI application: lifespan, health, and a few routes of one's own.

::

    app = Millstream(broker).as_asgi(routes=[("/metrics", metrics_app)])

Any ASGI server starts the brokers with its lifespan and stops them with it. Built in:
``/livez`` (200 while nothing failed for good), ``/readyz`` (200 while all brokers run) and
``/health`` (details as JSON); 503 otherwise.
"""

from __future__ import annotations

import functools
import inspect
import logging
import signal
import traceback
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

import msgspec

from .app import Millstream
from .broker import Broker
from .codec import converter
from .context import follow
from .errors import ContextError, MillstreamError, SetupError
from .logging import join_server
from .params import MISSING, Context, Header, Marker
from .runner import Getter
from .signature import name_of
from .values import guarded, of_context

__all__ = ["AsgiApp", "AsgiFastStream", "AsgiResponse", "Header", "Query", "Request"]
__all__ += ["get", "make_ping_asgi", "post"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("millstream.asgi")


class AsgiResponse:
    """A response, itself an ASGI application that sends it.

    Args:
        body: the bytes.
        status_code: the HTTP status.
        headers: sent along; ``content-length`` is added.
    """

    def __init__(
        self, body: bytes = b"", status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.body, self.status_code = body, status_code
        given = {name.lower(): value for name, value in (headers or {}).items()}
        self.headers = {"content-length": str(len(body))} | given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in self.headers.items()]
        start = {"type": "http.response.start", "status": self.status_code, "headers": pairs}
        await send(start)
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body})


def _json(value: Any, status_code: int = 200) -> AsgiResponse:
    body = msgspec.json.encode(value, enc_hook=str)
    return AsgiResponse(body, status_code, {"content-type": "application/json"})


def _text(text: str, status_code: int) -> AsgiResponse:
    return AsgiResponse(text.encode(), status_code, {"content-type": "text/plain; charset=utf-8"})


class Request:
    """An HTTP request, as handlers made by :func:`get` and :func:`post` see it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self._receive = receive
        self._body: bytes | None = None

    @property
    def method(self) -> str:
        """``GET``, ``POST`` and so on."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """The path, decoded."""
        return str(self.scope["path"])

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """By lower-case name; of several with one name, the last."""
        return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in self.scope["headers"]}

    @functools.cached_property
    def query_params(self) -> dict[str, str]:
        """Of several with one name, the last."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    async def body(self) -> bytes:
        """The whole body; read once."""
        if self._body is None:
            parts: list[bytes] = []
            more = True
            while more:
                event = await self._receive()
                parts.append(event.get("body", b""))
                more = event["type"] == "http.request" and event.get("more_body", False)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        """The body as JSON. Raises ``ValueError`` if it is none."""
        return msgspec.json.decode(await self.body())


class Query(Marker):
    """A value of the query string, converted to the parameter's annotation.

    Args:
        name: the parameter's own name if empty.
        default: taken where the value is missing; without one that is a 422 answer.
    """

    def __init__(self, name: str = "", *, default: Any = MISSING) -> None:
        self.name, self.default = name, default


class _Refused(Exception):
    """The request does not fit the handler's parameters; the text goes to the client."""


def get(function: Callable[..., Any] | None = None, **documents: Any) -> Any:
    """Make an ASGI application, to be routed, of a function that answers GET and HEAD.

    The function may be sync or async and returns an :class:`AsgiResponse`. Its parameters: a
    :class:`Request`, ``scope``, ``Annotated[T, Query()]``, ``Annotated[T, Header()]``,
    ``Logger`` and ``Annotated[T, Context(...)]``.

    Args:
        function: the handler.
        documents: ``include_in_schema``, ``description``, ``tags``, ``unique_id``, kept in the
            attribute ``documents`` of the result.

    Raises:
        SetupError: a parameter of another kind.
    """
    return _endpoint(function, ("GET", "HEAD"), documents)


def post(function: Callable[..., Any] | None = None, **documents: Any) -> Any:
    """The same as :func:`get` for POST."""
    return _endpoint(function, ("POST",), documents)


def _endpoint(
    function: Callable[..., Any] | None, methods: tuple[str, ...], documents: dict[str, Any]
) -> Any:
    if function is None:
        return functools.partial(_endpoint, methods=methods, documents=documents)
    handler = function
    hints = get_type_hints(handler, include_extras=True)
    sources = [
        (name, _source(handler, name, hints.get(name, Any), parameter.default))
        for name, parameter in inspect.signature(handler).parameters.items()
    ]

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await AsgiResponse()(scope, receive, send)
            return
        if scope["method"] not in methods:
            refusal = AsgiResponse(b"", 405, {"allow": ", ".join(methods)})
            await refusal(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            values = {name: source(request) for name, source in sources}
        except _Refused as refused:
            await _text(str(refused), 422)(scope, receive, send)
            return
        response = handler(**values)
        if inspect.isawaitable(response):
            response = await response
        await response(scope, receive, send)

    functools.update_wrapper(endpoint, handler, updated=())
    del endpoint.__wrapped__  # type: ignore[attr-defined]  # its signature is ASGI's
    endpoint.documents = documents  # type: ignore[attr-defined]
    return endpoint


def _source(
    function: Callable[..., Any], name: str, declared: Any, default: Any
) -> Callable[[Request], Any]:
    annotated = get_origin(declared) is Annotated
    annotation, *extras = get_args(declared) if annotated else (declared,)
    markers = [extra for extra in (*extras, default) if isinstance(extra, Marker)]
    marker = markers[0] if markers else None
    if annotation is Request:
        return lambda request: request
    if marker is None and name == "scope":
        return lambda request: request.scope
    fallback = getattr(marker, "default", MISSING)
    if fallback is MISSING and not isinstance(default, Marker):
        fallback = default
    if isinstance(marker, Query | Header):
        kind = "query parameter" if isinstance(marker, Query) else "header"
        key = marker.name or (name if isinstance(marker, Query) else name.replace("_", "-"))
        key = key if isinstance(marker, Query) else key.lower()

        def value(request: Request) -> Any:
            found = request.query_params if isinstance(marker, Query) else request.headers
            if key not in found:
                if fallback is MISSING:
                    raise _Refused(f"{kind} {key!r} is missing")
                return fallback
            try:
                return msgspec.convert(found[key], annotation, strict=False)
            except msgspec.ValidationError as error:
                raise _Refused(f"{kind} {key!r}: {error}") from None

        return value
    if isinstance(marker, Context):
        path = marker.prefix + (marker.name or name)
        found = _of_context(path, marker, fallback, annotation, name_of(function))
        return lambda request: found(request, [])
    raise SetupError(
        f"{name_of(function)}: parameter {name!r} cannot be filled",
        fix="annotate it with Request, Query(), Header(), Context() or Logger",
    )


def _of_context(path: str, marker: Context, default: Any, annotation: Any, name: str) -> Getter:
    """The getter of a handler's plan; its application is known only with the request."""
    root, *rest = path.split(".")

    def get(request: Request, values: list[Any]) -> Any:
        host: AsgiApp | None = request.scope.get("millstream.app")
        if host is None and default is MISSING:
            raise SetupError(
                f"{path!r} is not in the context of this request",
                fix="route the handler through Millstream.as_asgi(routes=[...])",
            )
        if host is None:
            raise ContextError(path)
        app = host.app
        own = {"app": app, "broker": app.broker, "logger": app.logger, "context": app.context}
        if own.get(root) is not None:
            return follow(own[root], rest, path)
        return of_context(app.context, root, rest, path, marker.initial, name)(request, values)

    return guarded(get, default, converter(annotation) if marker.cast else None)


def make_ping_asgi(broker: Broker, timeout: float | None = None, **documents: Any) -> ASGIApp:
    """An ASGI application that asks the broker: 204 if it answers, else 500.

    It says that the connection works; ``/readyz`` says whether messages are taken as well.

    Args:
        broker: the one to ask.
        timeout: seconds to wait; 5 by default.
        documents: as for :func:`get`.
    """

    async def ping() -> AsgiResponse:
        """Whether the broker answers."""
        alive = await broker.ping(5.0 if timeout is None else timeout)
        return AsgiResponse(status_code=204 if alive else 500)

    endpoint: ASGIApp = get(ping, **documents)
    return endpoint


class AsgiApp:
    """Hosts a plain application under any ASGI server.

    Args:
        app: the application, or the first broker of a new one.
        brokers: further brokers of a new one.
        routes: ``(path, asgi_app)``, for exactly these paths.
        asgi_routes: the same.
        options: of the new :class:`Millstream`.
    """

    def __init__(
        self,
        app: Millstream | Broker | None = None,
        *brokers: Broker,
        routes: Sequence[tuple[str, ASGIApp]] = (),
        asgi_routes: Sequence[tuple[str, ASGIApp]] = (),
        **options: Any,
    ) -> None:
        if not isinstance(app, Millstream):
            first = () if app is None else (app,)
            app = Millstream(*first, *brokers, **options)
        elif brokers or options:
            raise SetupError(
                "brokers and options belong to the Millstream that is given", fix="put them there"
            )
        self.app = app
        self.context, self.logger = app.context, app.logger
        self.on_startup, self.after_startup = app.on_startup, app.after_startup
        self.on_shutdown, self.after_shutdown = app.on_shutdown, app.after_shutdown
        #: Keyword arguments of the start, for ``on_startup`` hooks and the lifespan.
        self.startup_options: dict[str, Any] = {}
        self.routes: dict[str, ASGIApp] = {
            "/livez": self._probe("live"),
            "/readyz": self._probe("ready"),
            "/health": self._probe(None),
        }
        self._mounts: list[tuple[str, ASGIApp]] = []
        self.routes.update((*routes, *asgi_routes))

    @property
    def broker(self) -> Broker | None:
        """The application's first broker."""
        return self.app.broker

    @property
    def brokers(self) -> list[Broker]:
        """The application's brokers."""
        return self.app.brokers

    def mount(self, path: str, app: ASGIApp) -> None:
        """Give everything at and below ``path`` to another ASGI application."""
        self._mounts.insert(0, (path.rstrip("/"), app))

    def _probe(self, question: str | None) -> ASGIApp:
        async def probe() -> AsgiResponse:
            health = self.app.health() if question else await self.app.full_health()
            good = health["live" if question == "live" else "ready"]
            return _json({question: good} if question else health, 200 if good else 503)

        endpoint: ASGIApp = get(probe)
        return endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        scope["millstream.app"] = self
        root, path = scope.get("root_path", ""), scope["path"]
        # Servers put the root path in front of the path, and mounting frameworks as well.
        path = path.removeprefix(root) if root and path.startswith(root) else path
        if (route := self.routes.get(path)) is not None:
            await route(scope, receive, send)
            return
        for prefix, app in self._mounts:
            if path == prefix or path.startswith(prefix + "/"):
                scope["root_path"] = root + prefix
                await app(scope, receive, send)
                return
        await _text("Not Found", 404)(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        join_server()
        try:
            await self.app.start(**self.startup_options)
        except Exception as error:
            known = isinstance(error, MillstreamError)
            text = str(error) if known else traceback.format_exc()
            await send({"type": "lifespan.startup.failed", "message": text})
            raise  # servers know that from other frameworks, and `millstream run` wants it
        for broker in self.brokers:
            broker.on_stop_application = functools.partial(end_server, broker)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        try:
            await self.app.stop()
        except Exception as error:
            _log.exception("the application did not stop cleanly")
            await send({"type": "lifespan.shutdown.failed", "message": str(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})


#: Who handles SIGTERM by an orderly end of the server.
_SERVERS = {"uvicorn", "gunicorn", "hypercorn", "granian", "asyncio", "uvloop", "millstream"}


def end_server(broker: Broker) -> None:
    """End the server in its own orderly way, by a signal; where there is none, the broker."""
    handler = signal.getsignal(signal.SIGTERM)
    if (getattr(handler, "__module__", None) or "").partition(".")[0] in _SERVERS:
        signal.raise_signal(signal.SIGTERM)
    else:
        broker.spawn(broker.stop())


AsgiFastStream = AsgiApp
