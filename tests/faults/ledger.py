"""What really happened: one append-only file per process that outlives the process.

Each record is one line of JSON, written by a single ``write`` to a file opened with
``O_APPEND`` and synced, so that a killed process leaves whole records only. Times are
``time.monotonic()``, which all processes of one machine share.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One thing that happened.

    Fields:
        at: when, in seconds of the monotonic clock.
        pid: the process it happened in.
        event: ``sent``, ``confirmed``, ``start``, ``effect``, ``failed``, ``end``, ``settled``,
            ``dead`` (found among the dead letters), ``moves``, ``moved`` (before and after it is
            published anew, to be acknowledged then), ``up``, ``down``, ``died``.
        id: the message, if it is about one.
        more: ``key``, ``seq``, ``run`` (one attempt), ``how`` and the like.
    """

    at: float
    pid: int
    event: str
    id: str
    more: dict[str, Any]


class Ledger:
    """The ledger of this process."""

    def __init__(self, folder: Path, role: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{role}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
        self._file = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def write(self, event: str, id: str = "", /, **more: Any) -> None:
        """Record something; it is on the disk when this returns."""
        line = json.dumps([time.monotonic(), os.getpid(), event, id, more])
        os.write(self._file, line.encode() + b"\n")
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read(folder: Path) -> list[Record]:
    """All records of all processes, in the order of their times."""
    return sorted(_lines(folder), key=lambda record: record.at)


def _lines(folder: Path) -> Iterator[Record]:
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # a reader may come in the middle of a write
                    yield Record(*json.loads(line))
