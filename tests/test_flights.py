"""The flights example: what it calls broken, and the whole of it with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from examples.flights.data import TOTAL, flights
from examples.flights.model import Flight

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_what_is_broken() -> None:
    """The figures that model.py gives its reasons for."""
    kinds: Counter[str] = Counter()
    for record in flights():
        try:
            flight = msgspec.convert(record, Flight)
        except msgspec.ValidationError as error:
            kinds[str(error)] += 1
        else:
            kinds["cancelled" if flight.cancelled else "flown"] += 1
    assert kinds == {
        "flown": 327_346,
        "cancelled": 8_255,
        "departed, but has no arrival time": 458,
        "arrived, but nobody knows how late": 717,
    }
    assert sum(kinds.values()) == TOTAL


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_demo(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.flights.demo", "--flights", "3000", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert "published 3,000 = processed 2,982 + dead-lettered 18   adds up" in out, out
    assert "out of order or delivered twice 0" in out
    assert "busiest carriers" in out
    assert not done.stderr, done.stderr
    page = (tmp_path / "build" / "flights.html").read_text()
    assert '"counted":2982' in page
