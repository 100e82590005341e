"""One marker in both worlds: Millstream's markers as dependencies of FastAPI."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Annotated, Any, get_args, get_origin

import fastapi.routing
from fastapi import params
from fastapi.exceptions import RequestValidationError
from starlette.requests import HTTPConnection

from ..broker import Broker
from ..codec import as_decode_error, converter
from ..context import ContextRepo, follow
from ..errors import ContextError, SetupError, raise_all
from ..message import Message
from ..params import MISSING, Context, Depends, Header, Param, Path
from ..signature import name_of, read_params, where_is
from ..subscriber import Handler
from ..types import LoggerLike


class _ByIdentity(params.Depends):
    """FastAPI's records of dependencies are frozen and compared by value; a marker is neither."""

    use_cache = True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class _Resolved(_ByIdentity):
    """Makes a marker of the context a dependency that finds its value by itself."""

    scope = None
    #: The parameter that this marker stands for: its name and annotation.
    place: tuple[str, Any] | None = None

    @property
    def dependency(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.value

    async def value(self, connection: HTTPConnection) -> Any:
        """The value in an HTTP endpoint, or in a dependency that FastAPI runs for a message."""
        marker: Any = self
        own_name, annotation = self.place or ("", Any)
        name = marker.name or own_name
        if not name:
            raise SetupError(
                f"{marker!r} has no name in this endpoint", fix="give the marker a name"
            )
        try:
            value = _look_up(marker, name, connection)
        except ContextError:
            if marker.default is not MISSING:
                return marker.default
            if isinstance(marker, Header | Path):
                raise request_error(
                    "missing", _where(marker, name), "Field required", None
                ) from None
            raise
        if not marker.cast or annotation is Any:
            return value
        try:
            return converter(annotation)(value)
        except Exception as error:
            text = str(as_decode_error(error, name))
            raise request_error("value_error", _where(marker, name), text, value) from error


def request_error(kind: str, where: tuple[Any, ...], text: str, got: Any) -> RequestValidationError:
    """FastAPI's own error for a value that came from outside."""
    return RequestValidationError([{"type": kind, "loc": where, "msg": text, "input": got}])


def _where(marker: Any, name: str) -> tuple[str, str]:
    return "header" if isinstance(marker, Header) else "path", name


def _look_up(marker: Any, name: str, connection: HTTPConnection) -> Any:
    if isinstance(marker, Header):
        for key in (name, name.replace("_", "-")):
            if key in connection.headers:
                return connection.headers[key]
        raise ContextError(f"there is no header {name!r}")
    path, scope = marker.prefix + name, connection.scope
    root, *rest = path.split(".")
    if root == "message":
        if rest[:1] == ["path"]:
            return follow(connection.path_params, rest[1:], path)
        if rest[:1] == ["headers"]:
            return follow(connection.headers, rest[1:], path)
        if "millstream.message" not in scope:
            raise ContextError(f"{path!r}: an HTTP request has no message")
        return follow(scope["millstream.message"], rest, path)
    broker = scope.get("millstream.broker") or _broker_of(connection)
    repo = broker.context if broker is not None else ContextRepo()
    roots = {
        "broker": broker,
        "app": scope.get("app"),
        "logger": broker.logger if broker is not None else logging.getLogger("millstream"),
        "context": repo,
        "handler_": scope.get("endpoint"),
    }
    if roots.get(root) is not None:
        return follow(roots[root], rest, path)
    if root not in repo and marker.initial is not None:
        repo.set_global(root, marker.initial() if callable(marker.initial) else marker.initial)
    return repo.resolve(path)


def _broker_of(connection: HTTPConnection) -> Broker | None:
    """The broker of the router whose endpoint is served, else the application's first."""
    router = router_of(connection.scope.get("endpoint"))
    if router is not None:
        return router.broker  # type: ignore[no-any-return]
    state = getattr(connection.scope.get("app"), "state", None)
    brokers = getattr(getattr(state, "millstream", None), "brokers", None)
    return brokers[0] if brokers else None


class _Context(Context, _Resolved):
    pass


class _Header(Header, _Resolved):
    pass


class _Path(Path, _Resolved):
    pass


class _Depends(Depends, _ByIdentity):
    @property
    def scope(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The scope in FastAPI's words, which the core reads as well."""
        own = self.__dict__["scope"]
        return "request" if own == "message" else own

    @scope.setter
    def scope(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["scope"] = value


Context.adapt(_Context)
Header.adapt(_Header)
Path.adapt(_Path)
Depends.adapt(_Depends)

#: What a class stands for where a parameter has no marker.
_BY_CLASS: dict[type, str] = {
    Broker: "broker",
    Message: "message",
    ContextRepo: "context",
    logging.Logger: "logger",
}


def marker_of(param: Param) -> Any:
    """The context's marker of a parameter: its own, or the one its class stands for."""
    for marker in reversed(param.markers):
        if isinstance(marker, Context):
            return marker
        if isinstance(marker, params.Depends | params.Param | params.Body):
            return None
    kind = get_origin(param.annotation) or param.annotation
    if kind is LoggerLike:
        return Context("logger")
    found = (
        n for base, n in _BY_CLASS.items() if isinstance(kind, type) and issubclass(kind, base)
    )
    name = next(found, None)
    return Context(name) if name is not None else None


def placed(marker: Any, param: Param) -> Any:
    """The annotation of a parameter with a marker of its own that knows it."""
    marker = copy.copy(marker)
    marker.place = (param.name, param.annotation)
    if marker.default is MISSING:
        marker.default = param.default
    return Annotated[param.annotation, marker]


# Endpoints of our own routers


def router_of(endpoint: Any) -> Any:
    """The router with a broker on which an endpoint was declared, if it was on one."""
    return getattr(endpoint, "__millstream__", None)


def as_endpoint(function: Callable[..., Any], router: Any) -> Callable[..., Any]:
    """A twin of a function in whose signature every marker knows its parameter."""
    if isinstance(function, Handler):
        function = function.function
    if not isinstance(function, FunctionType):
        return function
    twin = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(twin, function)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.pop("__wrapped__")
    twin.__dict__.update(function.__dict__, __millstream__=router)
    try:
        found, _ = read_params(function)
    except SetupError:
        return twin  # an annotation that FastAPI has to complain about
    signature = inspect.signature(function)
    parameters = [_parameter(param, signature.parameters[param.name]) for param in found]
    twin.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return twin


def _parameter(param: Param, written: inspect.Parameter) -> inspect.Parameter:
    marker = marker_of(param)
    declared, default = param.declared, written.default
    if isinstance(marker, Header | Path) and marker.default is MISSING and marker.cast:
        # FastAPI's own validate, and show up in its documents.
        native = params.Header if isinstance(marker, Header) else params.Path
        declared = Annotated[param.annotation, native(alias=marker.name or None)]
        default = param.default
    elif marker is not None:
        declared, default = placed(marker, param), MISSING
    return written.replace(annotation=declared, default=default, kind=written.KEYWORD_ONLY)


# All endpoints of an application


def check_endpoints(app: Any) -> None:
    """Tell the markers of an application's HTTP endpoints their parameters.

    Raises:
        SetupError: a marker has no value in an HTTP endpoint.
        SetupErrors: several have none.
    """
    flat = getattr(fastapi.routing, "iter_route_contexts", iter)  # older ones copy on inclusion
    errors: list[SetupError] = []
    for route in flat(getattr(app, "routes", ())):
        what = f"the HTTP endpoint {getattr(route, 'path', '')!r}"
        errors += settle_markers(route, what, with_message=False)
    raise_all(errors)


def settle_markers(route: Any, what: str, *, with_message: bool) -> list[SetupError]:
    """Tell the markers that FastAPI resolves for a route their parameters; the errors."""
    errors: list[SetupError] = []
    for owner, name, marker in _marked(getattr(route, "dependant", None)):
        problem, fix = _settle(marker, name, _annotation(owner, name), with_message)
        if problem:
            where = f"{name_of(owner)} ({where_is(owner)})"
            text = f"{name!r} of {what}: {problem}"
            errors.append(SetupError(text, code="MS130", where=where, fix=fix))
    return errors


def _marked(dependant: Any) -> Iterator[tuple[Any, str, Any]]:
    """The context's markers in FastAPI's tree of dependencies: owner, parameter and marker."""
    for inner in getattr(dependant, "dependencies", ()):
        marker = getattr(inner.call, "__self__", None)
        if isinstance(marker, _Resolved):
            yield dependant.call, inner.name, marker
        else:
            yield from _marked(inner)


def _annotation(function: Any, name: str) -> Any:
    try:
        annotation = inspect.signature(function, eval_str=True).parameters[name].annotation
    except (NameError, TypeError, ValueError, KeyError):
        return Any  # FastAPI got on without it
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _settle(marker: Any, name: str, annotation: Any, with_message: bool) -> tuple[str, str]:
    """Tell a marker its parameter; what is wrong with it and how to mend it, if anything is."""
    if annotation is MISSING:
        annotation = Any
    known = marker.place or (name, annotation)
    if not marker.name and known[0] != name:
        return f"{marker!r} stands for {known[0]!r} as well", "give the marker a name"
    if marker.cast and known[1] != annotation:
        return f"{marker!r} is used with another annotation as well", "make a marker for each"
    marker.place = known
    path = marker.prefix + (marker.name or name)
    of_message = f"{path}.".startswith("message.") and not isinstance(marker, Header | Path)
    if of_message and not with_message and marker.default is MISSING:
        return "an HTTP request has no message", f"Context({path!r}, default=None)"
    return "", ""
