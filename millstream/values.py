"""Getters: how the run finds a parameter's value in a message, its address or the context."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from .address import Address
from .codec import as_decode_error, converter
from .context import ContextRepo, follow
from .errors import ContextError, DecodeError
from .message import Message
from .params import MISSING
from .runner import Getter

Convert = Callable[[Any], Any]


def guarded(get: Getter, default: Any, convert: Convert | None) -> Getter:
    """A getter with a default and a conversion (which a default needs not), if asked for."""
    if default is MISSING and convert is None:
        return get

    def guarding(message: Any, values: list[Any]) -> Any:
        try:
            value = get(message, values)
        except ContextError:
            if default is MISSING:
                raise
            return default
        try:
            return value if convert is None else convert(value)
        except Exception as error:
            raise as_decode_error(error, "a context value") from error

    return guarding


def of_message(rest: list[str], path: str, default: Any, convert: Convert | None) -> Getter:
    """An attribute of the message, or what lies below it; ``path`` is for people."""
    if len(rest) == 1 and default is MISSING and convert is None:
        attribute = operator.attrgetter(rest[0])
        if hasattr(Message, rest[0]):
            return lambda m, v: attribute(m)
    return guarded(lambda m, v: follow(m, rest, path), default, convert)


def of_context(
    repo: ContextRepo, root: str, rest: list[str], path: str, initial: Any, name: str
) -> Getter:
    """A value of the context, made by ``initial`` where nobody set it; ``name`` is the handler."""

    def get(message: Any, values: list[Any]) -> Any:
        if root not in repo:
            if initial is None:
                raise ContextError(
                    f"{path!r} is not in the context of {name} "
                    f"(context.set_global({root!r}, ...) sets it; or give a default)"
                )
            repo.set_global(root, initial() if callable(initial) else initial)
        return follow(repo.get(root), rest, path) if rest else repo.get(root)

    return get


def place(address: Address, name: str, annotation: Any) -> Getter:
    """What stands in the address of a message in the place of ``{name}``."""
    find = address.getter(name)
    if annotation is str or annotation is Any:
        return lambda m, v: find(m.destination)
    convert = converter(annotation)
    what = f"the value of {{{name}}}"

    def get(message: Any, values: list[Any]) -> Any:
        try:
            return convert(find(message.destination))
        except Exception as error:
            raise as_decode_error(error, what) from error

    return get


def header(name: str, default: Any, convert: Convert | None, exact: bool) -> Getter:
    """A header by its name in any case; unless ``exact``, ``_`` may stand for ``-``."""
    names = (name,) if exact else tuple(dict.fromkeys((name, name.replace("_", "-"))))
    what = f"the header {name!r}"

    def get(message: Any, values: list[Any]) -> Any:
        headers = message.headers
        for key in names:
            if key in headers:
                break
        else:
            wanted = {key.lower() for key in names}
            key = next((k for k in headers if k.lower() in wanted), "")
            if not key:
                if default is MISSING:
                    raise DecodeError(f"{what} is missing", path=name, expected="a header")
                return default
        if convert is None:
            return headers[key]
        try:
            return convert(headers[key])
        except Exception as error:
            raise as_decode_error(error, what) from error

    return get
