"""What several commands share: arguments, and the way from a call to an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from ..errors import MillstreamError
from .output import fail

USAGE = 2

TargetArg = Annotated[
    str, typer.Argument(metavar="TARGET", help="[bold]module:name[/] of the application.")
]
AppDir = Annotated[
    str,
    typer.Option(envvar="MILLSTREAM_APP_DIR", metavar="DIR", help="Where modules are looked for."),
]
Factory = Annotated[
    bool,
    typer.Option(
        "--factory", "-f", envvar="MILLSTREAM_FACTORY", help="TARGET is a function to call."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def posix(what: str) -> None:
    """End the command where ``what`` is not to be had."""
    if os.name != "posix":
        leave(fail(f"{what}: only on Linux and macOS", USAGE))


def guarded(call: Callable[[], int | None]) -> int:
    """The command's exit code; errors that were foreseen become one message."""
    from .target import TargetError

    try:
        return call() or 0
    except TargetError as error:
        return fail(error, USAGE)
    except MillstreamError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def leave(code: int) -> NoReturn:
    """End the command."""
    raise typer.Exit(code)
