"""``millstream health``: asks the processes that ``answering`` answers for."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from .answering import directory
from .inspect import console_of_stdout, plain_table, print_json
from .output import fail

#: Exit codes.
READY, NOT_READY, NOBODY = 0, 1, 2


def _ask(path: Path, timeout: float) -> dict[str, Any] | None:
    """What a process says of itself; None if there is none.

    Raises:
        TimeoutError: it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout)
            sock.connect(str(path))
            found = b""
            while data := sock.recv(65536):
                found += data
        return dict(msgspec.json.decode(found))
    except TimeoutError:
        raise
    except (OSError, msgspec.DecodeError):
        return None  # it ended, perhaps just now


def _sockets(given: str | None) -> list[Path]:
    """The sockets to ask: at a path, or of its workers, or all of this user's processes."""
    if given is None:
        return sorted(directory().glob("*.sock"))
    path = Path(given)
    if path.exists():
        return [path]
    name = re.escape(path.name)
    return sorted(p for p in path.parent.glob("*") if re.fullmatch(rf"{name}\.\d+", p.name))


def health(path: str | None, timeout: float, *, json: bool) -> int:
    """Print the health of running processes; returns the exit code."""
    found: list[dict[str, Any]] = []
    for place in _sockets(path):
        try:
            answer = _ask(place, timeout)
        except TimeoutError:
            problem = f"no answer within {timeout:g} s: its event loop is blocked, or it is stopped"
            answer = {"live": False, "ready": False, "socket": str(place), "problem": problem}
        if answer is not None:
            found.append(answer)
    if json:
        print_json(found if path is None or len(found) != 1 else found[0])
    else:
        console = console_of_stdout()
        for one in found:
            _print(console, one)
    if not found:
        where = f"at {path}" if path is not None else f"under {directory()}"
        return fail(f"nobody answers {where}", NOBODY)
    return READY if all(one["ready"] for one in found) else NOT_READY


def _print(console: Console, one: dict[str, Any]) -> None:
    good = "[green]ready[/]" if one["ready"] else "[red]not ready[/]"
    if "problem" in one:
        console.print(f"[bold]{escape(one['socket'])}[/] {good}: {escape(one['problem'])}")
        return
    worker = "" if one["worker"] is None else f", worker {one['worker']}"
    console.print(f"[bold]{escape(one['target'])}[/] {good} [dim](pid {one['pid']}{worker})[/]")
    for broker in one["brokers"]:
        up = "" if broker["connected"] else ", [red]not connected[/]"
        console.print(f"  {escape(broker['broker'])} {broker['state']}{up}")
        columns = ("  source", "handler", "state", "running", "oldest", "last", "waiting", "failed")
        table = plain_table(*columns, right=columns[3:])
        for s in broker["subscriptions"]:
            table.add_row(
                f"  {escape(s['source'])}",
                escape(s["handler"]),
                escape(s["state"]),
                str(s["in_flight"]),
                _seconds(s["oldest_unsettled"]),
                _seconds(s["seconds_since_last_message"]),
                "-" if s["lag"] is None else str(s["lag"]),
                str(s["failed"]),
            )
        if broker["subscriptions"]:
            console.print(table)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
