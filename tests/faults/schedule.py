"""Random faults against a running set-up: ``python -m tests.faults.schedule --seed 7``.

Each round starts a broker and two workers, sends all the time, and does damage by a schedule
that its seed alone decides. Then everything heals, and the ledgers are judged: where messages are
stored none may be lost; elsewhere none that is sent once everything has healed. A failure prints
its seed and what was done. ``--source`` chooses the kind of source.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.harness import Trial, Worker, remove_spare
from tests.faults.registry import SOURCES
from tests.faults.sources.base import Source

#: Seconds of damage in one round.
ROUND = 25.0
#: Messages that a worker may hold when something happens to it.
HELD = 32


class Chaos:
    """One round's damage."""

    def __init__(self, trial: Trial, worker: Worker, random: random.Random) -> None:
        self.trial, self.worker, self.random = trial, worker, random
        self.done: list[str] = []

    async def kill_worker(self) -> None:
        pids = self.worker.pids
        if pids:
            await self.worker.kill(self.random.choice(pids))

    async def freeze_worker(self) -> None:
        pids, seconds = self.worker.pids, self.random.uniform(0.5, 3.0)
        if pids:
            pid = self.random.choice(pids)
            try:
                self.worker.send(signal.SIGSTOP, pid)
                await asyncio.sleep(seconds)
                self.worker.send(signal.SIGCONT, pid)
            except ProcessLookupError:
                pass

    async def reload_workers(self) -> None:
        self.worker.send(signal.SIGHUP)

    async def restart_broker(self) -> None:
        await asyncio.to_thread(self.trial.server.restart)

    async def kill_broker(self) -> None:
        await asyncio.to_thread(self.trial.server.kill)
        await asyncio.sleep(self.random.uniform(0.0, 2.0))
        await asyncio.to_thread(self.trial.server.start)

    async def freeze_broker(self) -> None:
        self.trial.server.suspend()
        await asyncio.sleep(self.random.uniform(0.2, 3.0))
        self.trial.server.resume()

    async def reset(self) -> None:
        self.trial.proxy.reset()

    async def black_hole(self) -> None:
        proxy = self.trial.proxy
        way = self.random.choice(["up", "down", "both"])
        proxy.hold(up=way != "down", down=way != "up")
        await asyncio.sleep(self.random.uniform(0.5, 5.0))
        proxy.heal()

    async def cut(self) -> None:
        self.trial.proxy.cut(self.random.randrange(1, 3000), up=self.random.random() < 0.5)

    async def slow(self) -> None:
        self.trial.proxy.latency = self.random.uniform(0.0, 0.2)

    async def delete_group(self) -> None:
        broker = await self.trial.connect()
        # The broker may be on its way back.
        with suppress(Exception):
            await asyncio.wait_for(self.trial.source.delete_group(broker, self.trial.setup), 3.0)

    async def run(self, until: float) -> None:
        """Do damage until the given time of the monotonic clock."""
        choices: list[Callable[[], Awaitable[None]]] = [
            self.kill_worker,
            self.freeze_worker,
            self.reload_workers,
            self.restart_broker,
            self.kill_broker,
            self.freeze_broker,
            self.reset,
            self.black_hole,
            self.cut,
            self.slow,
        ]
        kind = type(self.trial.source)
        if kind.delete_group is not Source.delete_group:
            choices.append(self.delete_group)
        while time.monotonic() < until:
            await asyncio.sleep(self.random.uniform(0.3, 2.0))
            what = self.random.choice(choices)
            self.done.append(what.__name__)
            await what()
        self.trial.proxy.heal()


async def one(source: str, seed: int, folder: Path) -> None:
    """One round; raises AssertionError with everything that is known about it."""
    rng = random.Random(seed)
    async with Trial(
        source,
        folder,
        # Every crash counts as an attempt, and here it is never the message's fault.
        attempts=50,
        concurrency=rng.choice([1, 4]),
        work=rng.choice([0.0, 0.01, 0.03]),
        reconnect=0.5,
        dedup=rng.random() < 0.3,
    ) as trial:
        worker = await trial.worker(2)
        chaos = Chaos(trial, worker, rng)
        try:
            async with trial.load(pace=rng.choice([0.02, 0.05])), trial.fault("chaos"):
                await chaos.run(time.monotonic() + ROUND)
            if not trial.source.confirms:
                # What is sent before everybody is back may be lost.
                await worker.ready()
                await asyncio.sleep(trial.setup.reconnect + 3.0)
                await trial.send(20)
            found = await trial.verdict(
                "random schedule",
                "no loss" if trial.source.confirms else "goes on",
                lost=trial.lossy(sys.maxsize),
                duplicates=len(chaos.done) * HELD,
                recovery=15.0,
                linger=HELD * trial.setup.work + trial.setup.ack_wait,
                timeout=90 if trial.source.confirms else 3,
            )
        except BaseException as error:
            error.add_note(f"seed {seed}: {', '.join(chaos.done)}")
            raise
        print(
            f"{source}, seed {seed}: {found.sent} sent, {len(found.lost)} lost, "
            f"{found.duplicated} duplicated, {len(chaos.done)} faults, "
            f"recovery {max(found.recovery):.1f} s",
            flush=True,
        )


async def main() -> int:
    parser = argparse.ArgumentParser()
    remote = [name for name, kind in SOURCES.items() if kind.processes]
    parser.add_argument("--source", choices=remote, default="jetstream")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3))
    end = time.monotonic() + 60 * options.minutes
    try:
        while True:
            with tempfile.TemporaryDirectory(prefix="ms-faults-") as folder:
                try:
                    await one(options.source, seed, Path(folder))
                except AssertionError as error:
                    print(f"\nFAILED\n{error}")
                    print("\n".join(error.__notes__))
                    print(
                        f"again: make faults-random SOURCE={options.source} SEED={seed} MINUTES=0"
                    )
                    return 1
            if time.monotonic() >= end:
                return 0
            seed += 1
    finally:
        remove_spare()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
