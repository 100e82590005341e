"""What a message costs: the raw client, Millstream, Millstream in FastAPI, FastStream.

    make bench [BROKER=nats]
    python -m benchmarks.bench [nats …] [--rounds 7] [--scale 1.0] [--write docs/benchmarks.md]

Starts servers of its own on loopback. Each contender runs in a process of its own; the
contenders of a scenario take turns in every round, so that a change of the machine's mood
hits all alike. The figure to compare is CPU time of the contender's process per message:
median of the rounds. A contender that does not handle every message fails the run.
"""

from __future__ import annotations

import argparse
import importlib
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import ROOT, Failed, progress, table
from millstream.embedded import EmbeddedNats

#: A section for each.
BROKERS = ["nats", "redis", "rabbit", "kafka", "mqtt"]

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


def start(peer: str | None) -> list[str]:
    """Imports, the first message, memory."""
    progress("imports and start")
    modules = ["nats.js, nats", "millstream", "millstream.nats", "millstream.nats.fastapi"]
    imports = import_times(sys.executable, modules)
    if peer is not None:
        imports |= import_times(peer, ["faststream.nats"])
    with tempfile.TemporaryDirectory() as folder, EmbeddedNats(0, store=Path(folder)) as nats:
        starts = [first_message(nats) for _ in range(5)]
    seconds = statistics.median(s for s, _ in starts)
    memory = statistics.median(m for _, m in starts)
    return [
        *table("import", ["CPU ms"], {f"`{name}`": [f"{ms:.0f}"] for name, ms in imports.items()}),
        "",
        f"A NATS service under `millstream run`: {seconds * 1000:.0f} ms from start to its",
        f"first handled message, {memory:.0f} MB of memory while idle.",
    ]


# The report


def conditions(python: str, packages: Sequence[str], options: argparse.Namespace) -> str:
    """What the figures were measured with."""
    code = "import sys, importlib.metadata as m\n"
    code += "print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    machine = f"{platform.python_implementation()} {platform.python_version()}, "
    machine += f"{os.cpu_count()} cores, {platform.system()}"
    rounds = f"{options.rounds} rounds, {options.scale:.0%} of the usual messages"
    return f"{machine}; {found.stdout.strip()}; {rounds}."


def write(page: Path, name: str, text: str) -> None:
    """Put the figures between the marks that the page has for them."""
    begin, end = f"<!-- figures: {name} -->", f"<!-- end of figures: {name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page} has no {begin} … {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("brokers", nargs="*", help=f"of {', '.join(BROKERS)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual messages")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has FastStream")
    parser.add_argument("--write", type=Path, help="put the figures into this page")
    options = parser.parse_args()
    if unknown := set(options.brokers) - {*BROKERS, "start"}:
        parser.error(f"no section for {', '.join(sorted(unknown))}")
    found = subprocess.run([options.peer, "-c", "import faststream"], capture_output=True)
    peer = options.peer if found.returncode == 0 else None
    if peer is None:
        print("FastStream is not installed: it is left out", file=sys.stderr)
    for name in options.brokers or [*BROKERS, "start"]:
        packages = ["faststream"] if peer is not None else []
        try:
            if name == "start":
                lines = start(peer)
            else:
                module = importlib.import_module(f"benchmarks.{name}")
                packages += module.PACKAGES
                lines = module.section(peer, options.rounds, options.scale)
        except Failed as error:
            sys.exit(f"{name} failed: {error}")
        said = conditions(peer or sys.executable, packages, options)
        text = "\n".join([said, "", *lines])
        print(text, end="\n\n", flush=True)
        if options.write is not None:
            write(options.write, name, text)


if __name__ == "__main__":
    main()
