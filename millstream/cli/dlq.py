"""``millstream dlq``: the commands and their options; what they do stands in ``letters``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .arguments import Json, Wanted, command

dlq = typer.Typer(
    name="dlq",
    help="Dead letters: list them, look at them, replay or drop them.",
    no_args_is_help=True,
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
Rate = Annotated[
    str | None, typer.Option(metavar="N/s", help="At most so many a second (or N/m, N/h).")
]


def _filter(help: str, metavar: str, **options: Any) -> Any:
    panel = "Which letters"
    return typer.Option(metavar=metavar, rich_help_panel=panel, help=help, **options)


class Which(Wanted, kw_only=True):
    """What all commands are told."""

    address: Annotated[
        list[str] | None,
        _filter("Instead of those of TARGET's subscriptions; may be repeated.", "ADDRESS"),
    ] = None
    handler: Annotated[str | None, _filter("That this handler failed on.", "NAME")] = None
    error: Annotated[str | None, _filter("With an exception of this class.", "TYPE")] = None
    older: Annotated[str | None, _filter("Failed longer ago: 30s, 10m, 2h, 3d.", "AGE")] = None
    newer: Annotated[str | None, _filter("Failed since then.", "AGE")] = None
    id: Annotated[
        list[str] | None,
        _filter("ADDRESS:ID, or ID where there is one address; may be repeated.", "ID"),
    ] = None
    limit: Annotated[int | None, _filter("So many, the oldest first.", "N", min=1)] = None
    json: Json = False
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the broker.")] = 5.0


def _desk(*told: Any) -> Any:
    from .letters import Desk  # which needs more than the help does

    return Desk(*told)


@command(dlq, "ls")
def list_(which: Which) -> int:
    """Count dead letters by address, handler and error."""
    return which.run(_desk(which).ls)


@command(dlq)
def show(which: Which) -> int:
    """Print letters, 10 by default: cause, traceback, headers, body."""
    return which.run(_desk(which).show)


@command(dlq)
def replay(
    which: Which,
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
    desk = _desk(which, dry_run, rate)
    return which.run(lambda target: desk.replay(target, to_all=to_all))


@command(dlq)
def drop(
    which: Which,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    rate: Rate = None,
) -> int:
    """Delete letters for good, after asking."""
    desk = _desk(which, dry_run, rate)
    return which.run(lambda target: desk.drop(target, yes=yes))
