"""The flights example: what it calls broken, and the whole of it with real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from examples.flights.brokers import KINDS
from examples.flights.data import TOTAL, flights
from examples.flights.model import Flight
from millstream.embedded import answers

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


def demo(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the demo with the addresses of servers in the environment, and no others."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-m", "examples.flights.demo", "--port", "0", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
    )


VARIABLES = {"BROKER", "FLIGHTS", *(kind.variable for kind in KINDS.values())}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_demo(tmp_path: Path) -> None:
    done = demo(tmp_path, "--flights", "3000")
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert "published 3,000 = processed 2,982 + dead-lettered 18   adds up" in out, out
    assert "out of order or delivered twice 0" in out
    assert "busiest carriers" in out
    assert not done.stderr, done.stderr
    page = (tmp_path / "build" / "flights.html").read_text()
    assert '"counted":2982' in page


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("broker", KINDS)
def test_the_same_flights_on_every_broker(
    broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue(broker).url
    kind = KINDS[broker]
    for _ in range(2):  # what the first run left behind is not in the way of the second
        done = demo(tmp_path, "--broker", broker, "--flights", "600", **{kind.variable: url})
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{kind.title} at {url.rpartition('@')[2]};" in done.stdout
        assert "published 600 = processed 598 + dead-lettered 2   adds up" in done.stdout
        assert "out of order or delivered twice 0" in done.stdout
        assert not done.stderr, done.stderr


@pytest.mark.slow
def test_ended_from_outside_it_takes_its_processes_along(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.flights.demo", "--port", "0", "--full"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.match(r"NATS at \S+:(\d+); open \S+:(\d+)/", process.stdout.readline())
    assert found  # both run
    process.terminate()
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 130 and not errors, errors
    assert not any(answers("127.0.0.1", int(port)) for port in found.groups())


@pytest.mark.slow
def test_a_broker_that_is_not_there(tmp_path: Path) -> None:
    done = demo(tmp_path, "--broker", "kafka")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "docker compose up -d --wait kafka\n  export KAFKA_URL=127.0.0.1:9092" in done.stderr
    done = demo(tmp_path, "--broker", "pigeons")
    assert done.returncode == 2 and "invalid choice: 'pigeons'" in done.stderr
