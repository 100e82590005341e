"""Values that handlers ask for by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

from .errors import ContextError

_NOTHING: Mapping[str, Any] = {}


class ContextRepo:
    """Global values of an application, and local ones of the running task.

    A local value hides a global one of the same name and is seen by the task that set it
    and the tasks it starts.
    """

    def __init__(self, initial: Mapping[str, Any] | None = None) -> None:
        self._global: dict[str, Any] = dict(initial or {})
        self._local: ContextVar[Mapping[str, Any]] = ContextVar(
            "millstream_context", default=_NOTHING
        )

    @property
    def context(self) -> dict[str, Any]:
        """All values, as a copy."""
        return {**self._global, **self._local.get()}

    def set_global(self, key: str, value: Any) -> None:
        """Set a value for the whole application."""
        self._global[key] = value

    def reset_global(self, key: str) -> None:
        """Forget a global value."""
        self._global.pop(key, None)

    def set_local(self, key: str, value: Any) -> Token[Mapping[str, Any]]:
        """Set a value for the running task; the token undoes it."""
        return self._local.set({**self._local.get(), key: value})

    def reset_local(self, key: str, token: Token[Mapping[str, Any]]) -> None:
        """Undo ``set_local``."""
        self._local.reset(token)

    def get_local(self, key: str, default: Any = None) -> Any:
        """A local value."""
        return self._local.get().get(key, default)

    def get(self, key: str, default: Any = None) -> Any:
        """A local or global value."""
        local = self._local.get()
        if key in local:
            return local[key]
        return self._global.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._local.get() or key in self._global

    def resolve(self, path: str) -> Any:
        """Follow a dotted path through attributes and mappings.

        Raises:
            ContextError: the path leads nowhere.
        """
        root, *rest = path.split(".")
        if root not in self:
            raise ContextError(f"{root!r} is not in the context (for {path!r})")
        return follow(self.get(root), rest, path)

    @contextmanager
    def scope(self, key: str, value: Any) -> Iterator[None]:
        """A local value for the length of a block."""
        token = self.set_local(key, value)
        try:
            yield
        finally:
            self.reset_local(key, token)

    @contextmanager
    def scopes(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Several local values for the length of a block."""
        token = self._local.set({**self._local.get(), **values})
        try:
            yield
        finally:
            self._local.reset(token)

    def clear(self) -> None:
        """Forget everything."""
        self._global.clear()
        self._local.set(_NOTHING)


def follow(value: Any, parts: list[str], path: str) -> Any:
    """Walk from a value along keys (of mappings) and attributes (of all else)."""
    for part in parts:
        try:
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        except (KeyError, AttributeError):
            raise ContextError(f"{path!r}: there is no {part!r}") from None
    return value
