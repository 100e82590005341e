"""What compares: contenders' processes, who sends to them, rounds, tables."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parent.parent

ORDER = json.dumps(
    {
        "id": 7,
        "customer": "Ada Lovelace",
        "items": [{"name": f"part {i}", "price": 12.5 * i} for i in range(3)],
    }
).encode()

#: Scenario → what its handler does: those that every broker has.
READING = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
}
PUBLISHING = {"publisher": "a `dict`, publishes a `dict`"}
REQUEST = {"request": "request and reply, both sides"}

#: Contender → what it is called.
FRAMEWORKS = {
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
}

#: Messages of a round; of a round of some contenders, as slower ones need fewer for the same
#: precision.
MANY, REQUESTS = 30_000, 2_000
FEWER = {"faststream": 4_000, "faststream-aiokafka": 4_000, "fetch": 10_000}

#: Contender → CPU microseconds per message, messages per second.
Rows = dict[str, tuple[float, float]]


class Failed(RuntimeError):
    """A contender lost messages or died."""


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"{text} …", file=sys.stderr, flush=True)


def table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of Markdown: a row begins with its key, numbers stand on the right."""

    def line(cells: Sequence[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    return [
        line([corner, *columns]),
        "|---|" + "--:|" * len(columns),
        *(line([key, *cells]) for key, cells in rows.items()),
    ]


class Wire:
    """A client that only sends: prepared bytes on a socket."""

    def __init__(self, url: str) -> None:
        port = int(url.rstrip("/").rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.answers = self.socket.makefile("rb")

    @contextmanager
    def sending(self, data: bytes) -> Iterator[None]:
        """Send all of it while the caller reads answers: a server that cannot answer stops."""
        sender = threading.Thread(target=self.socket.sendall, args=(data,))
        sender.start()
        yield
        sender.join()

    def close(self) -> None:
        self.answers.close()
        self.socket.close()


class Worker:
    """A contender's process."""

    def __init__(
        self, python: str, broker: str, name: str, scenario: str, address: str, url: str
    ) -> None:
        self.name, self.scenario, self.address = name, scenario, address
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", broker, name, scenario, address, url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        timer = threading.Timer(120, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise Failed(f"{self.name} in {self.scenario!r} died, or did not get every message")
        return json.loads(line)

    def round(self, n: int, feed: Callable[[], float | None] | None) -> tuple[float, float]:
        """CPU microseconds per message, and messages per second; ``feed`` sends them.

        The seconds are those that the process says, or that ``feed`` returns.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        self._read()
        seconds = feed() if feed is not None else None
        result = self._read()
        return result["cpu"] / n * 1e6, n / (seconds or result["wall"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def medians(samples: dict[str, list[tuple[float, float]]]) -> Rows:
    return {
        name: (statistics.median(c for c, _ in rows), statistics.median(r for _, r in rows))
        for name, rows in samples.items()
    }


@dataclass
class Section:
    """The contenders of one broker, and how many messages they get.

    Args:
        sender: who sends the messages.
        url: of its server.
        peer: a Python that has FastStream, or None.
        rounds: each contender's turns, after one to warm up.
        scale: the share of the usual messages.
    """

    sender: Any
    url: str
    peer: str | None
    rounds: int
    scale: float

    #: The module that has the contenders.
    broker: ClassVar[str]
    #: Scenario → what its handler does; contender → what it is called. In the tables' order.
    scenarios: ClassVar[dict[str, str]]
    names: ClassVar[dict[str, str]]
    title: ClassVar = "CPU µs per message (median of the rounds; lower is better):"
    #: Who Millstream's cost is compared with, where it takes part, and what the tables call it.
    base: ClassVar[tuple[str, str]] = ("raw", "raw")
    #: Behind the difference to it.
    unit: ClassVar[str] = ""
    #: Whether rates are compared as well.
    ratio: ClassVar[bool] = True

    def present(self, scenario: str) -> list[str]:
        """The contenders of a scenario that can run."""
        return self.able(self.names)

    def able(self, names: Iterable[str]) -> list[str]:
        """Those of them that can run."""
        return [n for n in names if not n.startswith("faststream") or self.peer is not None]

    def prepare(self, scenario: str, addresses: list[str]) -> None:
        """Have what the contenders of a scenario read."""

    def send(self, scenario: str, address: str, n: int) -> float | None:
        """Send n messages; returns when the server has all of them.

        Where only whoever reads the results knows when they are there: how long that took.
        """
        raise NotImplementedError

    def run(self, scenario: str, most: int = MANY) -> Rows:
        """All contenders of one scenario; some drive themselves, to the others it is sent."""
        if scenario in ("request", "publish"):
            return self.turns(scenario, REQUESTS if scenario == "request" else most, None)
        return self.turns(scenario, most, partial(self.send, scenario))

    def worker(self, name: str, scenario: str, address: str) -> Worker:
        python = self.peer if name.startswith("faststream") else None
        return Worker(python or sys.executable, self.broker, name, scenario, address, self.url)

    def count(self, name: str, most: int) -> int:
        """Messages of a round."""
        return max(int(min(FEWER.get(name, most), most) * self.scale), 50)

    def turns(
        self, scenario: str, most: int, feed: Callable[[str, int], float | None] | None
    ) -> Rows:
        """All contenders of one scenario in turn, each reading an address of its own.

        ``feed`` sends n messages to an address; None where contenders drive themselves.
        """
        addresses = {name: f"bench.{scenario}.{name}" for name in self.present(scenario)}
        self.prepare(scenario, [*addresses.values()])
        with ExitStack() as stack:
            workers = []
            for name, address in addresses.items():
                worker = self.worker(name, scenario, address)
                stack.callback(worker.close)
                workers.append(worker)
            samples: dict[str, list[tuple[float, float]]] = {name: [] for name in addresses}
            for turn in range(self.rounds + 1):
                for worker in workers:
                    n = self.count(worker.name, most)
                    figures = worker.round(n, partial(feed, worker.address, n) if feed else None)
                    if turn:  # the first round warms up
                        samples[worker.name].append(figures)
        return medians(samples)

    def report(self) -> list[str]:
        """Run all scenarios and tell the tables."""
        results = {}
        for scenario in self.scenarios:
            progress(f"{self.broker}: {scenario}")
            results[scenario] = self.run(scenario)
        return [
            self.title,
            "",
            *self.costs(results),
            "",
            "Messages per second (the sender and the server share the machine):",
            "",
            *self.rates(results),
        ]

    def costs(self, results: dict[str, Rows]) -> list[str]:
        """CPU microseconds."""
        base, called = self.base
        lines = {}
        for scenario, rows in results.items():
            raw, ours = rows.get(base, rows["raw"])[0], rows["millstream"][0]
            over = f"{ours - raw:+.1f}{self.unit}"
            if scenario == "request":
                over = f"× {ours / raw:.2f}"
            peer = f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–"
            cells = [f"{rows[n][0]:.1f}" if n in rows else "–" for n in results["dict"]]
            lines[self.scenarios[scenario]] = [*cells, over, peer]
        names = [self.names[n] for n in results["dict"]]
        return table("handler", [*names, f"over {called}", "FastStream ÷ ours"], lines)

    def rates(self, results: dict[str, Rows]) -> list[str]:
        """Messages per second."""
        lines = {}
        for scenario, rows in results.items():
            cells = [f"{rows[n][1]:,.0f}" if n in rows else "–" for n in results["dict"]]
            if self.ratio:
                cells.append(f"{rows['millstream'][1] / rows['raw'][1]:.2f}")
            lines[self.scenarios[scenario]] = cells
        names = [self.names[n] for n in results["dict"]]
        return table("handler", [*names, "ours ÷ raw"] if self.ratio else names, lines)
