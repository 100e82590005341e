"""``millstream dlq``: the commands and their options; what they do stands in ``letters``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .arguments import AppDir, Factory, Json, TargetArg, guarded, leave

dlq = typer.Typer(
    name="dlq",
    help="Dead letters: list them, look at them, replay or drop them.",
    no_args_is_help=True,
)

_WHICH = "Which letters"
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
Rate = Annotated[
    str | None, typer.Option(metavar="N/s", help="At most so many a second (or N/m, N/h).")
]


def _which(help: str, metavar: str, **options: Any) -> Any:
    return typer.Option(metavar=metavar, rich_help_panel=_WHICH, help=help, **options)


def _common(
    target: TargetArg,
    address: Annotated[
        list[str] | None,
        _which("Instead of those of TARGET's subscriptions; may be repeated.", "ADDRESS"),
    ] = None,
    handler: Annotated[str | None, _which("That this handler failed on.", "NAME")] = None,
    error: Annotated[str | None, _which("With an exception of this class.", "TYPE")] = None,
    older: Annotated[str | None, _which("Failed longer ago: 30s, 10m, 2h, 3d.", "AGE")] = None,
    newer: Annotated[str | None, _which("Failed since then.", "AGE")] = None,
    id: Annotated[
        list[str] | None,
        _which("ADDRESS:ID, or ID where there is one address; may be repeated.", "ID"),
    ] = None,
    limit: Annotated[int | None, _which("So many, the oldest first.", "N", min=1)] = None,
    json: Json = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the broker.")] = 5.0,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> Any:
    """What all commands are told."""
    from .letters import Desk, Filter, age

    which = Filter(
        handler=handler,
        error=error,
        older=age("--older", older),
        newer=age("--newer", newer),
        ids=tuple(id or ()),
        limit=limit,
    )
    return Desk(
        target=target,
        app_dir=app_dir,
        factory=factory,
        addresses=tuple(address or ()),
        which=which,
        json=json,
        timeout=timeout,
    )


def _command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command: its own options, and those of ``_common`` for its first argument."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        common = inspect.signature(_common, eval_str=True).parameters
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def command(**given: Any) -> None:
            shared = {key: given.pop(key) for key in common}
            leave(guarded(lambda: function(_common(**shared), **given)))

        parameters = [*common.values(), *own]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = function.__doc__
        dlq.command(name)(command)
        return function

    return register


@_command("ls")
def list_(desk: Any) -> int:
    """Count dead letters by address, handler and error."""
    return int(desk.ls())


@_command("show")
def show(desk: Any) -> int:
    """Print letters, 10 by default: cause, traceback, headers, body."""
    return int(desk.show())


@_command("replay")
def replay(
    desk: Any,
    to_all: Annotated[
        bool,
        typer.Option(
            "--to-all", help="For every subscription of the origin, not only for that which failed."
        ),
    ] = False,
    dry_run: DryRun = False,
    rate: Rate = None,
) -> int:
    """Send letters back to where they failed; each is removed once that is confirmed."""
    return int(desk.replay(to_all=to_all, dry_run=dry_run, rate=rate))


@_command("drop")
def drop(
    desk: Any,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    rate: Rate = None,
) -> int:
    """Delete letters for good, after asking."""
    return int(desk.drop(yes=yes, dry_run=dry_run, rate=rate))
