"""Markers for handler parameters, and the interface of whoever fills them.

The markers are plain records, the same objects in a plain handler, in a subscriber of a
FastAPI router and in an HTTP endpoint.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from . import types

if TYPE_CHECKING:
    from .message import Message
    from .plan import Site

#: "No value was given", where None is a value.
MISSING: Any = inspect.Parameter.empty


class Marker:
    """The root of all markers.

    An adapter of a web framework may register a subclass that its framework understands
    too (:meth:`adapt`); markers made before or after are then of that class.
    """

    _adapted: type[Marker] | None = None
    _made: weakref.WeakSet[Marker]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._made = weakref.WeakSet()
        cls._adapted = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        kind: Any = cls._adapted or cls
        marker = super().__new__(kind)
        cls._made.add(marker)
        return marker

    @classmethod
    def adapt(cls, subclass: type[Marker]) -> None:
        """From now on, markers of this class are of ``subclass``, those that exist included."""
        cls._adapted = subclass
        for marker in list(cls._made):
            marker.__class__ = subclass


class Context(Marker):
    """A value of the context.

    Args:
        name: a dotted path such as ``"message.headers.user"``; the parameter's own name if
            empty. Roots: ``message``, ``broker``, ``app``, ``logger``, ``context``,
            ``handler_``, and every key of the :class:`ContextRepo`.
        default: taken where the path leads nowhere; without one that is an error.
        initial: a value, or a factory of one, kept for the whole process from its first use.
        cast: convert the value to the parameter's annotation.
        prefix: put before ``name``.
    """

    def __init__(
        self,
        name: str = "",
        *,
        default: Any = MISSING,
        initial: Any = None,
        cast: bool = False,
        prefix: str = "",
    ) -> None:
        self.name, self.default, self.initial = name, default, initial
        self.cast, self.prefix = cast, prefix

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Header(Context):
    """A header of the message, converted to the parameter's annotation.

    Without a name, the parameter's own is tried as written and with ``-`` for ``_``.
    """

    def __init__(self, name: str = "", *, default: Any = MISSING, cast: bool = True) -> None:
        super().__init__(name, default=default, cast=cast, prefix="message.headers.")


class Path(Context):
    """A placeholder of the subscription's address, converted to the parameter's annotation."""

    def __init__(self, name: str = "", *, default: Any = MISSING, cast: bool = True) -> None:
        super().__init__(name, default=default, cast=cast, prefix="message.path.")


class Depends(Marker):
    """The result of another callable, whose own parameters are filled the same way.

    Args:
        dependency: a function, class, callable object or (async) generator function; what
            stands after its ``yield`` runs at the end of the scope.
        use_cache: call it once a message even if several ask for it.
        scope: ``function`` ends when the handler returned, before its result is published
            and its message settled; ``message`` ends after settlement; ``app`` is made once
            at start and ends at stop.
        thread: run a plain ``def`` in a worker thread (110 µs and more) instead of inline.
        cast: accepted for callers of other frameworks; values are never converted twice.
        cast_result: the same.
    """

    def __init__(
        self,
        dependency: Callable[..., Any],
        *,
        use_cache: bool = True,
        scope: Literal["function", "message", "app"] = "function",
        thread: bool = False,
        cast: bool = True,
        cast_result: bool = False,
    ) -> None:
        self.dependency, self.use_cache = dependency, use_cache
        self.scope, self.thread = scope, thread
        self.cast, self.cast_result = cast, cast_result

    def __repr__(self) -> str:
        return f"Depends({getattr(self.dependency, '__name__', self.dependency)})"


class _NoCast:
    """What marks an annotation that is for people only."""


T = TypeVar("T")
#: ``NoCast[T]``: takes the value as it comes, and checks and converts nothing.
NoCast = Annotated[T, _NoCast()]


def is_uncast(extra: Any) -> bool:
    """Whether it is the mark of :data:`NoCast`."""
    return isinstance(extra, _NoCast)


Logger = Annotated[types.LoggerLike, Context("logger")]


class Param(msgspec.Struct, frozen=True):
    """One parameter of a handler or a dependency, read once."""

    name: str
    #: The annotation without ``Annotated``; Any where there is none.
    annotation: Any
    #: The extras of ``Annotated``, then the default if that is a marker.
    markers: tuple[Any, ...]
    #: MISSING if there is none (a marker is not a default).
    default: Any
    #: The annotation as written, ``Annotated`` included.
    declared: Any


class Bound(msgspec.Struct):
    """What a :class:`ParameterSource` takes over.

    ``around(message, proceed)`` finds the values of ``names`` and returns
    ``await proceed(values)``, which runs the handler with them; it may open and close
    resources around that call and may handle its exceptions. ``after(message)`` runs when
    the message is settled. ``dependencies`` are those of ``site.dependencies`` that
    ``around`` runs as well.
    """

    names: tuple[str, ...]
    around: Callable[[Message[Any], Callable[[dict[str, Any]], Awaitable[Any]]], Awaitable[Any]]
    after: Callable[[Message[Any]], Awaitable[None]] | None = None
    dependencies: tuple[Any, ...] = ()


class ParameterSource(Protocol):
    """Fills parameters that the core does not know: a web framework's, a container's."""

    def bind(self, params: Sequence[Param], site: Site) -> Bound | None:
        """Take over some of a handler's parameters, or none. Called once per handler, at start."""
        ...
