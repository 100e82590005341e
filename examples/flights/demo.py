"""The demo: a broker, the service of main.py, and the flights sent through both.

python -m examples.flights.demo                    # the first 20,000 flights, through NATS
python -m examples.flights.demo --full             # all 336,776
python -m examples.flights.demo --broker redis     # through another broker
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Table

from examples.flights.brokers import KINDS, Kind
from examples.flights.data import TOTAL, flights

SHORT = 20_000
#: Messages on their way to the server at once.
WINDOW = 500
#: Seconds without any progress after which something is wrong.
PATIENCE = 30.0

OUT = Path("build")
LOG = OUT / "flights.log"
console = Console()


def free_port(preferred: int) -> int:
    """The preferred port of this machine, or any free one if somebody has it."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no port is free")


class Speed(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> str:
        speed = task.finished_speed or task.speed
        return f"{speed:,.0f}/s" if speed else ""


class Stuck(RuntimeError):
    """The flights do not come through."""


class Service:
    """The service, running in a process of its own."""

    def __init__(self, name: str, kind: Kind, url: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-m", "millstream", "run", "examples.flights.main:app"]
        command += ["--port", str(port), "--log-level", "warning"]
        OUT.mkdir(exist_ok=True)
        environment = {"BROKER": name, kind.variable: url, "FLIGHTS": kind.run}
        with LOG.open("w") as log:  # an ERROR line for each broken record
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=log
            )

    def statistics(self) -> dict[str, Any]:
        """What the page shows."""
        with urllib.request.urlopen(self.url + "statistics", timeout=10) as answer:
            result: dict[str, Any] = msgspec.json.decode(answer.read())
        return result

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                sys.exit(f"The service ended with code {code}:\n{LOG.read_text()[-2000:]}")
            try:
                self.statistics()
            except OSError:
                time.sleep(0.05)
            else:
                return
        sys.exit(f"The service does not answer; see {LOG}.")

    def stop(self) -> None:
        """Let it finish what it handles."""
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def server(kind: Kind) -> Iterator[str]:
    """The broker's address: the one of the environment, or of a server for this run alone."""
    given = os.environ.get(kind.variable)
    if given:
        yield given
        return
    embedded = kind.embedded
    if embedded is None or embedded.find() is None:
        hint = f" (or install {embedded.program})" if embedded is not None else ""
        sys.exit(
            f"There is no {kind.title} for the demo. Start one and say where it is{hint}:\n"
            f"  docker compose up -d --wait {kind.service}\n"
            f"  export {kind.variable}={kind.usual}"
        )
    with (
        tempfile.TemporaryDirectory(prefix="millstream-") as folder,
        embedded(0, store=Path(folder) / "server") as running,
    ):
        yield running.url


@contextmanager
def service(name: str, kind: Kind, url: str, port: int) -> Iterator[Service]:
    running = Service(name, kind, url, port)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


async def send(kind: Kind, url: str, total: int, progress: Progress, bar: TaskID) -> None:
    """Publish the flights, each confirmed by the server, a window at a time."""
    records = flights(total)
    target = kind.writes("recorded")
    async with kind.broker(url) as broker:
        while window := list(islice(records, WINDOW)):
            await broker.publish_batch(*window, **target)
            progress.advance(bar, len(window))


async def watch(running: Service, total: int, progress: Progress, bar: TaskID) -> dict[str, Any]:
    """Follow the service until every flight is counted or in the dead letters."""
    done, since = -1, time.monotonic()
    while True:
        statistics = await asyncio.to_thread(running.statistics)
        now = statistics["counted"] + statistics["broken"]
        progress.update(bar, completed=now)
        if now >= total:
            return statistics
        if now != done:
            done, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            enriched, again = statistics["enriched"], statistics["repeated"]
            raise Stuck(
                f"Nothing moved for {PATIENCE:.0f} s at {now:,} flights ({enriched:,} enriched, "
                f"{again:,} out of order or delivered twice); see {LOG}."
            )
        await asyncio.sleep(0.2)


async def stream(
    kind: Kind, url: str, running: Service, total: int
) -> tuple[dict[str, Any], float]:
    """Send everything and wait until it is handled; the statistics and the seconds it took."""
    # Printed only now that the loop runs: whoever reads it may end the demo at once, and an
    # interrupt while the loop is being made would leave half a loop and its complaint.
    console.print(f"{kind.title} at {url.rpartition('@')[2]}; open {running.url} to watch\n")
    columns = (TextColumn("{task.description:<10}"), BarColumn(40), MofNCompleteColumn(), Speed())
    with Progress(*columns, console=console) as progress:
        sent = progress.add_task("published", total=total)
        handled = progress.add_task("handled", total=total)
        start = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(kind, url, total, progress, sent))
            watching = tasks.create_task(watch(running, total, progress, handled))
        return watching.result(), time.monotonic() - start


def report(statistics: dict[str, Any], total: int, seconds: float) -> bool:
    """Print the result; whether the counts add up."""
    enriched, counted, broken = (statistics[k] for k in ("enriched", "counted", "broken"))
    carriers = sorted(statistics["carriers"].values(), key=lambda c: -int(c["flights"]))
    table = Table("busiest carriers", "flights", "cancelled", "mean delay", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for carrier in carriers[:5]:
        figures = carrier["flights"], carrier["cancelled"]
        table.add_row(
            carrier["name"], *(f"{n:,}" for n in figures), f"{carrier['mean_delay']:.1f} min"
        )
    console.print(table)
    console.print()
    flights = sum(int(c["flights"]) for c in carriers)
    right = total == counted + broken and counted == flights
    console.print(
        f"published {total:,} = processed {counted:,} + dead-lettered {broken:,}"
        f"   {'[green]adds up' if right else '[red]DOES NOT ADD UP'}"
    )
    for cause, times in sorted(statistics["causes"].items(), key=lambda item: -item[1]):
        console.print(f"  {times:,} × {cause}")
    again = statistics["repeated"]
    console.print(f"enriched {enriched:,}; out of order or delivered twice {again:,}")
    console.print(
        f"{seconds:.1f} s, {total / seconds:,.0f} flights a second through three subscribers"
    )
    return bool(right)


def save(running: Service, statistics: dict[str, Any]) -> Path:
    """Keep the page with its last figures, to be opened when the service is gone."""
    with urllib.request.urlopen(running.url, timeout=10) as answer:
        page = answer.read().decode()
    figures = msgspec.json.encode(statistics).decode()
    path = OUT / "flights.html"
    path.write_text(page.replace("const snapshot = null;", f"const snapshot = {figures};"))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=KINDS, default="nats", help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help=f"all {TOTAL:,} flights")
    parser.add_argument(
        "--flights", type=int, default=SHORT, help="the first so many (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the page open until Ctrl+C")
    parser.add_argument("--port", type=int, default=8013, help="of the page (%(default)s)")
    options = parser.parse_args()
    # Ended from outside it takes its service and its server along, as with Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    total = TOTAL if options.full else min(options.flights, TOTAL)
    port = free_port(options.port)
    kind = KINDS[options.broker]()
    if os.environ.get(kind.variable):
        # Somebody's server may keep what an earlier run has left there.
        kind.run = f"flights_{secrets.token_hex(4)}"
    with server(kind) as url, service(options.broker, kind, url, port) as running:
        try:
            statistics, seconds = asyncio.run(stream(kind, url, running, total))
        except* Stuck as group:
            sys.exit(str(group.exceptions[0]))
        right = report(statistics, total, seconds)
        path = save(running, statistics)
        if options.keep:
            console.print(f"\nopen {running.url} for the page; Ctrl+C ends the demo")
            with suppress(KeyboardInterrupt):
                running.process.wait()
        else:
            console.print(f"\nopen {path} for the page (the service is stopped now;")
            console.print("`make demo KEEP=1` keeps it running)")
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
