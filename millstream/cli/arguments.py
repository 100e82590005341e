"""What several commands share: the target, and the way from a function to a command."""

from __future__ import annotations

import asyncio
import inspect
import os
import typing
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from ..errors import MillstreamError
from .output import USAGE, fail
from .target import Target, TargetError, find

#: For commands that hand on what they do not know.
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def option(name: str, *others: str, panel: str | None = None, **more: Any) -> Any:
    """An option that an environment variable sets as well: ``MILLSTREAM_`` and its name."""
    variable = "MILLSTREAM_" + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, *others, envvar=variable, rich_help_panel=panel, **more)


class Wanted(msgspec.Struct, kw_only=True):
    """The target, as the command line tells it."""

    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="[bold]module:name[/] of the application.")
    ]
    app_dir: Annotated[
        str, option("--app-dir", metavar="DIR", help="Where modules are looked for.")
    ] = "."
    factory: Annotated[bool, option("--factory", "-f", help="TARGET is a function to call.")] = (
        False
    )

    def run(self, work: Callable[[Target], Awaitable[int]]) -> int:
        """Import the target and do something with it on an event loop; returns the exit code.

        Raises:
            TargetError: there is no such target.
            UserCodeError: the target's own code failed.
        """
        found = find(self.target, app_dir=self.app_dir, factory=self.factory)

        async def both() -> int:
            return await work(await found.build())

        return asyncio.run(both())


class Commands(TyperGroup):
    """Commands that return their exit code; errors that were foreseen become one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
        except TargetError as error:
            code = fail(error, USAGE)
        except MillstreamError as error:
            code = fail(error)
        except KeyboardInterrupt:
            code = 130
        raise typer.Exit(code or 0)


def command(
    group: typer.Typer, name: str | None = None, **settings: Any
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command whose first parameter is a Struct: each field of it is an option."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        (first, struct), *_ = typing.get_type_hints(function).items()
        shared = _parameters(struct)
        own = [p for p in _parameters(function) if p.name != first]

        def run(**given: Any) -> int:
            told = {p.name: given.pop(p.name) for p in shared}
            return function(struct(**told), **given)

        parameters = [p for p in (*shared, *own) if p.default is p.empty]
        parameters += [p for p in (*own, *shared) if p.default is not p.empty]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        group.command(name, **settings)(run)
        return function

    return register


def _parameters(call: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(call, include_extras=True)
    return [
        p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY)
        for p in inspect.signature(call).parameters.values()
    ]


def posix(what: str) -> None:
    """Raise a :class:`TargetError` where ``what`` is not to be had."""
    if os.name != "posix":
        raise TargetError(f"{what}: only on Linux and macOS")
