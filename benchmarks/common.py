"""What all brokers' sections share: bodies and handlers' needs, workers, rounds, tables."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent

ORDER = json.dumps(
    {
        "id": 7,
        "customer": "Ada Lovelace",
        "items": [{"name": f"part {i}", "price": 12.5 * i} for i in range(3)],
    }
).encode()

#: Messages of a round, by contender: slower ones need fewer for the same precision.
FEWER = {"faststream": 4_000, "fetch": 10_000}


# On the side of a contender

#: Yields the work of one round where the contender drives itself; None where messages come.
Contender = AsyncIterator[Callable[[int], Awaitable[None]] | None]

log = logging.getLogger("bench")
log.setLevel(logging.WARNING)


class Item(msgspec.Struct):
    name: str
    price: float


class Order(msgspec.Struct):
    id: int
    customer: str
    items: list[Item]


class ItemModel(BaseModel):
    name: str
    price: float


class OrderModel(BaseModel):
    id: int
    customer: str
    items: list[ItemModel]


class Counter:
    """Counts handled messages down; the one thing every handler does."""

    def __init__(self) -> None:
        self.left = 0
        self.done = asyncio.Event()

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()

    def expect(self, n: int) -> None:
        self.left = n
        self.done.clear()


handled = Counter()


def tenant() -> str:
    return "t"


# On the side that compares


class Failed(RuntimeError):
    """A contender lost messages or died."""


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

    def round(self, n: int, feed: Callable[[], None] | None) -> tuple[float, float]:
        """CPU microseconds per message, and messages per second; ``feed`` sends them."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        self._read()
        if feed is not None:
            feed()
        result = self._read()
        return result["cpu"] / n * 1e6, n / result["wall"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


Rows = dict[str, tuple[float, float]]


def medians(samples: dict[str, list[tuple[float, float]]]) -> Rows:
    return {
        name: (statistics.median(c for c, _ in rows), statistics.median(r for _, r in rows))
        for name, rows in samples.items()
    }


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"{text} …", file=sys.stderr, flush=True)


class Section:
    """The contenders of one broker, and how many messages they get.

    Args:
        broker: the module that has the contenders.
        url: of its server.
        peer: a Python that has FastStream, or None.
        rounds: each contender's turns, after one to warm up.
        scale: the share of the usual messages.
    """

    def __init__(self, broker: str, url: str, peer: str | None, rounds: int, scale: float) -> None:
        self.broker, self.url = broker, url
        self.peer, self.rounds, self.scale = peer, rounds, scale

    def contenders(self, *names: str) -> list[str]:
        """Those of them that can run."""
        return [n for n in names if not n.startswith("faststream") or self.peer is not None]

    def worker(self, name: str, scenario: str, address: str) -> Worker:
        python = self.peer if name.startswith("faststream") else None
        return Worker(python or sys.executable, self.broker, name, scenario, address, self.url)

    def count(self, name: str, most: int) -> int:
        """Messages of a round; slower contenders need fewer for the same precision."""
        return max(int(min(FEWER.get(name, most), most) * self.scale), 50)

    def turns(
        self,
        scenario: str,
        names: list[str],
        most: int,
        feed: Callable[[str, int], None] | None,
    ) -> Rows:
        """All contenders of one scenario in turn, each reading an address of its own.

        ``feed`` sends n messages to an address; None where contenders drive themselves.
        """
        with ExitStack() as stack:
            workers = []
            for name in names:
                worker = self.worker(name, scenario, f"bench.{scenario}.{name}")
                stack.callback(worker.close)
                workers.append(worker)
            samples: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
            for turn in range(self.rounds + 1):
                for worker in workers:
                    n = self.count(worker.name, most)
                    figures = worker.round(n, partial(feed, worker.address, n) if feed else None)
                    if turn:  # the first round warms up
                        samples[worker.name].append(figures)
        return medians(samples)
