"""What the command line said about a run, as it travels to the process that does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..errors import SetupError
from ..logging import level_of
from .target import TargetError


class RunOptions(msgspec.Struct, kw_only=True):
    """The options of ``run`` and ``dev``; ``extra`` are those that the command does not know."""

    target: str
    app_dir: str = "."
    factory: bool = False
    host: str | None = None
    port: int | None = None
    uds: str | None = None
    loop: str = "auto"
    reload_dir: list[str] | None = None
    ext: list[str] | None = None
    log_level: str | None = None
    log_config: str | None = None
    log_json: bool = False
    health_socket: str | None = None
    no_health_socket: bool = False
    extra: list[str] = []
    worker_id: int | None = None
    dev: bool = False

    def check(self) -> None:
        """Find what is wrong before anything starts.

        Raises:
            TargetError: an option has a value that means nothing.
        """
        if not Path(self.app_dir).is_dir():
            raise TargetError(f"--app-dir {self.app_dir}: no such directory")
        for directory in self.reload_dir or ():
            if not Path(directory).is_dir():
                raise TargetError(f"--reload-dir {directory}: no such directory")
        if self.loop not in ("auto", "uvloop", "asyncio"):
            raise TargetError(f"--loop {self.loop}: auto, uvloop or asyncio")
        if self.log_level is not None:
            try:
                level_of(self.log_level)
            except SetupError as error:
                raise TargetError(f"--log-level: {error.what}, {error.fix}") from None
        parse_extra(self.extra)

    def startup(self) -> dict[str, Any]:
        """The keyword arguments of a plain application's start."""
        known = {"host": self.host, "port": self.port, "uds": self.uds}
        given = {name: str(value) for name, value in known.items() if value is not None}
        return given | parse_extra(self.extra) | {"worker_id": self.worker_id}


def parse_extra(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of the user's own, as keyword arguments.

    ``--env prod`` and ``--env=prod`` give a string, ``--debug`` True, ``--no-debug`` False;
    several values (``--tag a b``, or ``--tag a --tag b``) give a list; ``-`` in names becomes
    ``_``.

    Raises:
        TargetError: a value that belongs to no option.
    """
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for argument in arguments:
        if argument.startswith("-") and len(argument) > 1 and not _is_number(argument):
            name, equals, value = argument.lstrip("-").partition("=")
            values = found.setdefault(name.replace("-", "_"), [])
            if equals:
                values.append(value)
                values = None
        elif values is None:
            raise TargetError(f"{argument!r} belongs to no option")
        else:
            values.append(argument)
    extra: dict[str, Any] = {}
    for name, given in found.items():
        if given:
            extra[name] = given[0] if len(given) == 1 else given
        elif name.startswith("no_"):
            extra[name.removeprefix("no_")] = False
        else:
            extra[name] = True
    return extra


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def split_known(
    extra: Mapping[str, Any], call: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The extra options that ``call`` has parameters for, as numbers where it wants those, and
    the others."""
    parameters = inspect.signature(call).parameters
    known: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in extra.items():
        if name not in parameters:
            others[name] = value
            continue
        kind = str(parameters[name].annotation)
        if isinstance(value, str) and "int" in kind and value.lstrip("-").isdigit():
            known[name] = int(value)
        elif isinstance(value, str) and "float" in kind and _is_number(value):
            known[name] = float(value)
        else:
            known[name] = value
    return known, others
