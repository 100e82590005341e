"""Random faults against a running set-up: ``python -m tests.faults.schedule --seed 7``.

Each round starts a broker and two workers, sends all the time, and does damage by a schedule
that its seed alone decides. Then everything heals, and the ledgers are judged. A failure prints
its seed and what was done.
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
from pathlib import Path

from tests.faults.harness import Trial, Worker

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
        assert self.trial.server is not None
        await asyncio.to_thread(self.trial.server.restart)

    async def kill_broker(self) -> None:
        assert self.trial.server is not None
        await asyncio.to_thread(self.trial.server.kill)
        await asyncio.sleep(self.random.uniform(0.0, 2.0))
        await asyncio.to_thread(self.trial.server.start)

    async def freeze_broker(self) -> None:
        assert self.trial.server is not None
        self.trial.server.suspend()
        await asyncio.sleep(self.random.uniform(0.2, 3.0))
        self.trial.server.resume()

    async def reset(self) -> None:
        assert self.trial.proxy is not None
        self.trial.proxy.reset()

    async def black_hole(self) -> None:
        proxy = self.trial.proxy
        assert proxy is not None
        way = self.random.choice(["up", "down", "both"])
        proxy.hold(up=way != "down", down=way != "up")
        await asyncio.sleep(self.random.uniform(0.5, 5.0))
        proxy.heal()

    async def cut(self) -> None:
        assert self.trial.proxy is not None
        self.trial.proxy.cut(self.random.randrange(1, 3000), up=self.random.random() < 0.5)

    async def slow(self) -> None:
        assert self.trial.proxy is not None
        self.trial.proxy.latency = self.random.uniform(0.0, 0.2)

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
        while time.monotonic() < until:
            await asyncio.sleep(self.random.uniform(0.3, 2.0))
            what = self.random.choice(choices)
            self.done.append(what.__name__)
            await what()
        assert self.trial.proxy is not None
        self.trial.proxy.heal()


async def one(seed: int, folder: Path) -> None:
    """One round; raises AssertionError with everything that is known about it."""
    rng = random.Random(seed)
    async with Trial(
        "jetstream",
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
            found = await trial.verdict(
                "random schedule",
                "no loss",
                duplicates=len(chaos.done) * HELD,
                recovery=15.0,
                linger=HELD * trial.setup.work + trial.setup.ack_wait,
                timeout=90,
            )
        except BaseException as error:
            error.add_note(f"seed {seed}: {', '.join(chaos.done)}")
            raise
        print(
            f"seed {seed}: {found.sent} sent, {found.duplicated} duplicated, "
            f"{len(chaos.done)} faults, recovery {max(found.recovery):.1f} s",
            flush=True,
        )


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3))
    end = time.monotonic() + 60 * options.minutes
    while True:
        with tempfile.TemporaryDirectory(prefix="ms-faults-") as folder:
            try:
                await one(seed, Path(folder))
            except AssertionError as error:
                print(f"\nFAILED\n{error}")
                print("\n".join(error.__notes__))
                print(f"again: make faults-random SEED={seed} MINUTES=0")
                return 1
        if time.monotonic() >= end:
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
