"""Reading a callable's signature, once, into :class:`Param` values."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from .errors import SignatureError
from .params import MISSING, Marker, Param, is_uncast


def unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind ``functools.wraps`` decorators and handlers."""
    unwrapped: Callable[..., Any] = inspect.unwrap(function)
    return unwrapped


def _target(function: Callable[..., Any]) -> Callable[..., Any]:
    """What carries the annotations, for a class and an object too."""
    function = unwrap(function)
    if isinstance(function, functools.partial):
        return _target(function.func)
    if inspect.isclass(function):
        return function.__init__
    if inspect.isroutine(function):
        return function
    call: Callable[..., Any] = type(function).__call__
    return call


def name_of(function: Callable[..., Any]) -> str:
    """A callable's name, for people."""
    function = unwrap(function)
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def where_is(function: Callable[..., Any]) -> str:
    """``file:line`` of a callable's definition (its first decorator)."""
    code = getattr(_target(function), "__code__", None)
    if code is None:
        return getattr(function, "__module__", "") or ""
    return f"{code.co_filename}:{code.co_firstlineno}"


def _is(function: Callable[..., Any], test: Callable[[Any], bool]) -> bool:
    function = unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if test(function):
        return True
    if inspect.isclass(function) or inspect.isroutine(function):
        return False
    return test(getattr(type(function), "__call__", None))  # noqa: B004


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return _is(function, inspect.iscoroutinefunction)


def is_generator(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a generator."""
    return _is(function, inspect.isgeneratorfunction)


def is_async_generator(function: Callable[..., Any]) -> bool:
    """Whether calling it gives an async generator."""
    return _is(function, inspect.isasyncgenfunction)


def hints_of(
    function: Callable[..., Any], local: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The annotations, resolved, with ``Annotated`` kept.

    Raises:
        SignatureError: a name in an annotation cannot be found.
    """
    target = _target(function)
    try:
        return typing.get_type_hints(
            target, localns=dict(local) if local else None, include_extras=True
        )
    except NameError as error:
        raise SignatureError(
            f"an annotation of {name_of(function)}() cannot be resolved: {error}",
            where=where_is(function),
            fix="import the name where the function is defined, not only under TYPE_CHECKING",
        ) from error
    except TypeError:
        return {}  # a builtin, or another callable without annotations


def user_frame() -> FrameType:
    """The frame of the user's line that is being run: the first one outside this package."""
    frame = sys._getframe(1)
    package = __name__.partition(".")[0]
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] == package
    ):
        frame = frame.f_back
    return frame


def early_hints(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Annotations resolved with the names of the function in which the user declares a handler.

    Only needed for annotations kept as text whose names are local to a function; None if
    they cannot be resolved yet.
    """
    annotations = getattr(_target(function), "__annotations__", {})
    if not any(isinstance(a, str) for a in annotations.values()):
        return None
    try:
        return hints_of(function, user_frame().f_locals)
    except SignatureError:
        return None


def read_params(
    function: Callable[..., Any], hints: Mapping[str, Any] | None = None
) -> tuple[list[Param], set[str]]:
    """A callable's parameters, and the names of those that are keyword-only.

    Raises:
        SignatureError: an annotation cannot be resolved.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [], set()  # a builtin type without a signature
    if hints is None:
        hints = hints_of(function)
    params: list[Param] = []
    keyword_only: set[str] = set()
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            keyword_only.add(parameter.name)
        declared = hints.get(parameter.name, parameter.annotation)
        if declared is MISSING:
            declared = Any
        annotation: Any = declared
        markers: tuple[Any, ...] = ()
        if typing.get_origin(declared) is typing.Annotated:
            annotation, *extras = typing.get_args(declared)
            markers = tuple(extra for extra in extras if not is_uncast(extra))
            if len(markers) < len(extras):
                annotation = declared = Any
        default = parameter.default
        if default is not MISSING and looks_like_marker(default):
            markers, default = (*markers, default), MISSING
        params.append(Param(parameter.name, annotation, markers, default, declared))
    return params, keyword_only


def looks_like_marker(value: Any) -> bool:
    """Whether a default is a marker: ours, or a web framework's, told by its shape."""
    foreign = type(value).__module__.partition(".")[0] == "fastapi"
    return isinstance(value, Marker) or is_dependency(value) or foreign


def is_dependency(value: Any) -> bool:
    """Whether a marker is a dependency of any framework: told by its shape."""
    return hasattr(value, "dependency") and hasattr(value, "use_cache")
