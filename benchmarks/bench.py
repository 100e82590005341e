"""What a message costs: raw nats-py, Millstream, Millstream in FastAPI, FastStream.

    make bench
    python benchmarks/bench.py [--rounds 7] [--scale 1.0] [--write docs/benchmarks.md]

Starts a nats-server of its own on loopback. Each contender runs in a process of its own; the
contenders of a scenario take turns in every round, so that a change of the machine's mood
hits all alike. The figure to compare is CPU time of the contender's process per message:
median of the rounds. Messages are sent by a socket that writes prepared bytes, so that the
sender costs next to nothing. A contender that does not handle every message fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from millstream.embedded import EmbeddedNats  # noqa: E402

ORDER = json.dumps(
    {
        "id": 7,
        "customer": "Ada Lovelace",
        "items": [{"name": f"part {i}", "price": 12.5 * i} for i in range(3)],
    }
).encode()

#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "publisher": "a `dict`, publishes a `dict`",
    "request": "request and reply, both sides",
}
NAMES = {
    "raw": "raw nats-py",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream",
    "fetch": "nats-py `fetch` + `ack`",
    "bare": "bare pull loop",
}
#: Messages of a round, by contender: slower ones need fewer for the same precision.
MESSAGES = {"faststream": 4_000, "fetch": 10_000}
MANY, REQUESTS = 30_000, 2_000


class Failed(RuntimeError):
    """A contender lost messages or died."""


class Wire:
    """A NATS client that only sends: prepared bytes on a socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self._socket.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\n')
        self._replies = 0

    def send(self, subject: str, body: bytes, n: int) -> None:
        """Send n messages; returns when the server has all of them."""
        one = b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(body), body)
        sender = threading.Thread(target=self._socket.sendall, args=(one * n + b"PING\r\n",))
        sender.start()
        while (line := self._lines.readline()) != b"PONG\r\n":
            if line == b"PING\r\n":
                self._socket.sendall(b"PONG\r\n")
            elif not line or line.startswith(b"-ERR"):
                raise Failed(f"the server said {line!r}")
        sender.join()

    def ask(self, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request to the server's JetStream API."""
        self._replies += 1
        inbox, data = f"_INBOX.bench.{self._replies}", json.dumps(body or {}).encode()
        call = f"SUB {inbox} 1\r\nUNSUB 1 1\r\nPUB {subject} {inbox} {len(data)}\r\n"
        self._socket.sendall(call.encode() + data + b"\r\n")
        while not (line := self._lines.readline()).startswith(b"MSG "):
            if line == b"PING\r\n":
                self._socket.sendall(b"PONG\r\n")
        result: dict[str, Any] = json.loads(self._lines.read(int(line.split()[-1])))
        self._lines.readline()
        return result

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Worker:
    """A contender's process."""

    def __init__(self, python: str, name: str, scenario: str, subject: str, url: str) -> None:
        self.name, self.scenario, self.subject = name, scenario, subject
        script = str(ROOT / "benchmarks" / "contenders.py")
        self._process = subprocess.Popen(
            [python, script, name, scenario, subject, url],
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


class Bench:
    def __init__(self, nats: EmbeddedNats, peer: str | None, rounds: int, scale: float) -> None:
        self.nats, self.peer, self.rounds, self.scale = nats, peer, rounds, scale
        self.wire = Wire(nats.port)

    def count(self, name: str, most: int) -> int:
        return max(int(min(MESSAGES.get(name, most), most) * self.scale), 50)

    def python(self, name: str) -> str:
        return self.peer or sys.executable if name == "faststream" else sys.executable

    def contenders(self, *names: str) -> list[str]:
        return [n for n in names if n != "faststream" or self.peer is not None]

    def core(self, scenario: str) -> Rows:
        """All contenders of one scenario on core NATS."""
        most = REQUESTS if scenario == "request" else MANY
        names = self.contenders("raw", "millstream", "fastapi", "faststream")
        with ExitStack() as stack:
            workers = []
            for name in names:
                subject = f"bench.{scenario}.{name}"
                worker = Worker(self.python(name), name, scenario, subject, self.nats.url)
                stack.callback(worker.close)
                workers.append(worker)
            samples: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
            for turn in range(self.rounds + 1):
                for worker in workers:
                    n = self.count(worker.name, most)
                    feed = partial(self.wire.send, worker.subject, ORDER, n)
                    figures = worker.round(n, feed if scenario != "request" else None)
                    if turn:  # the first round warms up
                        samples[worker.name].append(figures)
        return medians(samples)

    def jetstream(self) -> Rows:
        """Pull and acknowledge; a fresh stream for each contender and round."""
        names = self.contenders("fetch", "bare", "millstream", "faststream")
        samples: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
        config = {"name": "BENCH", "subjects": ["bench.js"], "storage": "memory"}
        for turn in range(max(self.rounds // 2, 1) + 1):
            for name in names:
                n = self.count(name, MANY)
                answer = self.wire.ask("$JS.API.STREAM.CREATE.BENCH", config)
                if "error" in answer:
                    raise Failed(str(answer["error"]))
                python = self.python(name)
                with closing(
                    Worker(python, name, "jetstream", "bench.js", self.nats.url)
                ) as worker:
                    figures = worker.round(n, partial(self.wire.send, "bench.js", ORDER, n))
                    self._all_acknowledged(name)
                self.wire.ask("$JS.API.STREAM.DELETE.BENCH")
                if turn:
                    samples[name].append(figures)
        return medians(samples)

    def _all_acknowledged(self, name: str) -> None:
        end = time.monotonic() + 10
        while True:
            info = self.wire.ask("$JS.API.CONSUMER.INFO.BENCH.d")
            left = info["num_ack_pending"] + info["num_pending"]
            if not left:
                return
            if time.monotonic() > end:
                raise Failed(f"{name} left {left} messages unacknowledged")
            time.sleep(0.02)


# Imports, memory, start

SERVICE = """
from millstream import Millstream
from millstream.nats import NatsBroker
broker = NatsBroker({url!r})
app = Millstream(broker)

@broker.subscriber("bench.first")
@broker.publisher("bench.first.done")
async def first(n: int) -> int:
    return n
"""


#: Modules are compiled once and kept, whatever this shell says.
PRODUCTION = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def import_times(python: str, modules: list[str]) -> dict[str, float]:
    """Best CPU milliseconds of each import, in fresh interpreters."""
    best: dict[str, float] = {}
    for _ in range(9):
        for module in modules:
            clock = "time.process_time()"
            code = f"import time; start = {clock}; import {module}; print({clock} - start)"
            out = subprocess.run(
                [python, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
                env=PRODUCTION,
            ).stdout
            best[module] = min(best.get(module, 1e9), float(out) * 1000)
    return best


@contextmanager
def service(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """An idle service under ``millstream run``."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "service.py").write_text(SERVICE.format(url=url))
        process = subprocess.Popen(
            [sys.executable, "-m", "millstream", "run", "service:app"],
            cwd=folder,
            env={**PRODUCTION, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


def first_message(nats: EmbeddedNats) -> tuple[float, float]:
    """Seconds from start to the first handled message, and MB of memory while idle."""
    with socket.create_connection(("127.0.0.1", nats.port)) as connection:
        lines = connection.makefile("rb")
        lines.readline()
        connection.sendall(b'CONNECT {"verbose":false}\r\nSUB bench.first.done 1\r\nPING\r\n')
        while lines.readline() != b"PONG\r\n":
            pass
        stop = threading.Event()

        def knock() -> None:
            while not stop.wait(0.002):
                connection.sendall(b"PUB bench.first 1\r\n1\r\n")

        start = time.perf_counter()
        with service(nats.url) as process:
            knocking = threading.Thread(target=knock)
            knocking.start()
            try:
                while not lines.readline().startswith(b"MSG"):
                    pass
                seconds = time.perf_counter() - start
            finally:
                stop.set()
                knocking.join()
            time.sleep(1)
            status = Path(f"/proc/{process.pid}/status")
            memory = 0.0
            if status.exists():
                found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
                memory = int(found[1]) / 1024 if found else 0.0
        return seconds, memory


# The report


def cost_table(results: dict[str, Rows]) -> list[str]:
    names = [n for n in ("raw", "millstream", "fastapi", "faststream") if n in results["dict"]]
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " | over raw | FastStream ÷ ours |"
    ]
    lines.append("|---|" + "--:|" * (len(names) + 2))
    for scenario, rows in results.items():
        raw, ours = rows["raw"][0], rows["millstream"][0]
        over = f"+{ours - raw:.1f} µs"
        if scenario == "request":
            over = f"× {ours / raw:.2f}"
        peer = f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–"
        cells = [f"{rows[n][0]:.1f}" for n in names]
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + f" | {over} | {peer} |")
    return lines


def rate_table(results: dict[str, Rows]) -> list[str]:
    names = list(results["dict"])
    lines = [
        "| handler | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for scenario, rows in results.items():
        lines.append(
            f"| {CORE[scenario]} | " + " | ".join(f"{rows[n][1]:,.0f}" for n in names) + " |"
        )
    return lines


def stream_table(rows: Rows) -> list[str]:
    lines = [
        "| JetStream pull, each acknowledged | CPU µs | messages/s | `fetch` ÷ it |",
        "|---|--:|--:|--:|",
    ]
    for name, (cpu, rate) in rows.items():
        lines.append(f"| {NAMES[name]} | {cpu:.1f} | {rate:,.0f} | {rows['fetch'][0] / cpu:.1f} |")
    return lines


def report(bench: Bench) -> str:
    results: dict[str, Rows] = {}
    for scenario in CORE:
        print(f"{scenario} …", file=sys.stderr, flush=True)
        results[scenario] = bench.core(scenario)
    print("jetstream …", file=sys.stderr, flush=True)
    stream = bench.jetstream()
    modules = ["nats.js, nats", "millstream", "millstream.nats", "millstream.nats.fastapi"]
    imports = import_times(sys.executable, modules)
    starts = [first_message(bench.nats) for _ in range(5)]
    out = [
        "CPU µs per message (median of the rounds; lower is better):",
        "",
        *cost_table(results),
        "",
    ]
    out += [
        "Messages per second (the sender and the server share the machine):",
        "",
        *rate_table(results),
        "",
    ]
    out += [*stream_table(stream), ""]
    out += ["| import | CPU ms |", "|---|--:|"]
    out += [f"| `{m}` | {ms:.0f} |" for m, ms in imports.items()]
    if bench.peer is not None:
        peer = import_times(bench.peer, ["faststream.nats"])
        out += [f"| `{m}` | {ms:.0f} |" for m, ms in peer.items()]
    seconds = statistics.median(s for s, _ in starts)
    memory = statistics.median(m for _, m in starts)
    out += [
        "",
        f"A service under `millstream run`: {seconds * 1000:.0f} ms from start to its first",
    ]
    out += [f"handled message, {memory:.0f} MB of memory while idle."]
    return "\n".join(out) + "\n"


BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def write(page: Path, text: str) -> None:
    """Put the figures between the marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{page} has no {BEGIN} … {END}")
    machine = (
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores"
    )
    page.write_text(f"{before}{BEGIN}\n\n{machine}, {platform.system()}.\n\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual messages")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has FastStream")
    parser.add_argument("--write", type=Path, help="put the figures into this page")
    options = parser.parse_args()
    has_peer = (
        subprocess.run(
            [options.peer, "-c", "import faststream.nats"], capture_output=True
        ).returncode
        == 0
    )
    if not has_peer:
        print("FastStream is not installed: it is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, EmbeddedNats(0, store=Path(folder)) as nats:
        bench = Bench(nats, options.peer if has_peer else None, options.rounds, options.scale)
        try:
            text = report(bench)
        except Failed as error:
            sys.exit(f"failed: {error}")
        finally:
            bench.wire.close()
    print(text)
    if options.write is not None:
        write(options.write, text)


if __name__ == "__main__":
    main()
