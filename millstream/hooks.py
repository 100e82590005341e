"""Functions that are no handlers and have their parameters filled as if they were."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from .codec import JSON, as_decode_error, converter
from .context import ContextRepo
from .errors import SetupError
from .log import default_logger
from .message import current
from .params import Context
from .plan import Site, compile_function
from .signature import is_dependency, name_of, read_params, where_is


def compile_hook(
    function: Callable[..., Any], site: Site
) -> Callable[[Any, BaseException], Awaitable[Any]]:
    """A function called with a message and an exception, which is its first parameter."""
    names = [param.name for param in read_params(function)[0][:1]]
    run = compile_function(function, site, names)
    return lambda message, error: run(message, dict.fromkeys(names, error))


async def call_with(function: Callable[..., Any], site: Site, extra: Mapping[str, Any]) -> Any:
    """Call a hook: parameters by name from ``extra``, cast to their annotations; else filled.

    Raises:
        SetupError: a parameter has no value, or a value that does not fit.
    """
    params, _ = read_params(function)
    given: dict[str, Any] = {}
    for param in params:
        if param.name in extra and not any(
            isinstance(m, Context) or is_dependency(m) for m in param.markers
        ):
            try:
                given[param.name] = converter(param.declared)(extra[param.name])
            except Exception as error:
                raise SetupError(
                    f"the option {param.name!r} of {name_of(function)}(): "
                    f"{as_decode_error(error, 'value')}",
                    code="MS112",
                    where=where_is(function),
                ) from error
    run = compile_function(
        function,
        msgspec.structs.replace(site, name=name_of(function), where=where_is(function)),
        tuple(given),
    )
    return await run(current.get(), given)


def apply_types(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Fill the marked parameters of any function: Context, Depends, Logger, the message.

    What the caller gives is cast to its annotation; inside a handler the running message is
    the one that ``Context("message")`` means.
    """
    params, _ = read_params(function)

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        message = current.get()
        site = Site(
            name=name_of(function),
            where=where_is(function),
            codec=JSON(),
            context=ContextRepo(),
            logger=default_logger("app"),
        )
        if message is not None and message.link.site is not None:
            site = msgspec.structs.replace(message.link.site, name=site.name, where=site.where)
        named = dict(zip((p.name for p in params), args, strict=False))
        return await call_with(function, site, {**named, **kwargs})

    return call
