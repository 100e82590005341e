"""Processes that are asked to stop, stop in time and lose nothing: F06 to F10."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from millstream.driver import Capability
from tests.faults.harness import Trial
from tests.faults.registry import on

#: Seconds from a signal to the end that are allowed beyond the drain's own.
MARGIN = 1.0
STORED = on(confirms=True, processes=True)


@on(processes=True, capabilities=Capability.GROUPS)
@pytest.mark.parametrize(
    "count", [1, pytest.param(4, marks=[pytest.mark.faults, pytest.mark.timeout(120)])]
)
async def test_f06_sigterm_under_load(tmp_path: Path, source: str, count: int) -> None:
    async with Trial(source, tmp_path, work=0.02, concurrency=4, grace=3.0) as trial:
        worker = await trial.worker(count)
        await trial.send(100)
        await trial.until(lambda: trial.count("effect") >= 20)
        assert await worker.stop() < trial.setup.grace + MARGIN
        assert trial.count("down") == count
        if trial.source.confirms:
            async with trial.fault("stopped"):
                await trial.worker(count)
        # Zero duplicates, since all had the time; an at-most-once source finishes what it has.
        await trial.verdict(
            f"F06 SIGTERM under load, {count} worker" + "s" * (count > 1),
            "no loss, no duplicate, exit in time",
        )


@STORED
async def test_f07_a_handler_longer_than_the_drain(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, grace=1.0) as trial:
        worker = await trial.worker()
        await trial.send(1, do="sleep", seconds=30.0, first=True)
        await trial.until(lambda: trial.count("start"))
        took = await worker.stop()
        assert took < trial.setup.grace + MARGIN
        assert [r.more["how"] for r in trial.records("end")] == ["cancelled"]
        async with trial.fault("stopped"):
            await trial.worker()
        await trial.verdict(
            "F07 handler longer than the drain", "cancelled, not acked, comes again", recovery=0.5
        )


@STORED
@pytest.mark.parametrize("do", ["swallow", "thread"])
async def test_f08_a_handler_that_cannot_be_cancelled(tmp_path: Path, source: str, do: str) -> None:
    async with Trial(source, tmp_path, grace=1.0, ack_wait=3.0) as trial:
        worker = await trial.worker()
        await trial.send(1, do=do, seconds=30.0, first=True)
        await trial.until(lambda: trial.count("start"))
        # The exit code says that it had to be left behind.
        assert await worker.stop(code=1) < trial.setup.grace + MARGIN
        if do == "swallow":
            assert worker.process.count("ERROR .* handle: still runs although it was cancelled")
        async with trial.fault("stopped"):
            await trial.worker()
        await trial.verdict(
            f"F08 handler that cannot be cancelled ({do})", "exit in time, not acked, comes again"
        )


@STORED
@pytest.mark.parametrize("count", [1, 2])
async def test_f09_the_second_signal_means_now(tmp_path: Path, source: str, count: int) -> None:
    async with Trial(source, tmp_path, grace=20.0) as trial:
        worker = await trial.worker(count)
        await trial.send(1, do="sleep", seconds=30.0, first=True)
        await trial.until(lambda: trial.count("start"))
        worker.send(signal.SIGTERM)
        await trial.until(lambda: trial.count("down") == count)
        assert await worker.stop() < 2.0
        async with trial.fault("stopped"):
            await trial.worker(count)
        await trial.verdict("F09 SIGTERM twice", "exit at once, not acked, comes again")


@on(processes=True, capabilities=Capability.GROUPS)
@pytest.mark.parametrize(
    "rolls", [1, pytest.param(5, marks=[pytest.mark.faults, pytest.mark.timeout(180)])]
)
async def test_f10_rolling_reload(tmp_path: Path, source: str, rolls: int) -> None:
    async with Trial(source, tmp_path, work=0.005) as trial:
        worker = await trial.worker(2)
        least = 2
        async with trial.load(pace=0.01):
            for roll in range(1, rolls + 1):
                old = set(worker.pids)
                worker.send(signal.SIGHUP)

                def renewed(old: set[int] = old, roll: int = roll) -> bool:
                    nonlocal least
                    least = min(least, len(worker.pids))
                    return (
                        worker.process.count("all workers are new") == roll
                        and len(worker.pids) == 2
                        and not old & set(worker.pids)
                    )

                await trial.until(renewed, 30)
            await trial.working(10)
        assert least >= 1
        await trial.verdict(
            f"F10 rolling reload, {rolls} time" + "s" * (rolls > 1),
            "no loss, no duplicate",
            timeout=30 if trial.source.confirms else 5,
        )
