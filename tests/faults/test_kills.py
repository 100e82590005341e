"""Processes that die: F01, F02, F03, F05."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from millstream.driver import Capability
from tests.faults.harness import Trial
from tests.faults.registry import on

STORED = on(confirms=True, processes=True)
COUNTED = on(confirms=True, processes=True, capabilities=Capability.DELIVERY_COUNT)


@on(processes=True, capabilities=Capability.GROUPS)
async def test_f01_a_worker_is_killed_in_the_middle(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, work=0.05) as trial:
        worker = await trial.worker(2)
        async with trial.load(pace=0.01 if trial.source.confirms else 0.03):
            await trial.working(10)
            await worker.kill(random.choice(worker.pids))
            await trial.working(20)
        # At most once: what the dead process had, and nothing else.
        await trial.verdict(
            "F01 worker killed mid-handler",
            "no loss" if trial.source.confirms else "loss only of what it held",
            lost=trial.lossy(10),
            duplicates=1,
            timeout=30 if trial.source.confirms else 3,
        )


@STORED
@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [1, 4])
async def test_f01_workers_are_killed_again_and_again(
    tmp_path: Path, source: str, count: int
) -> None:
    async with Trial(source, tmp_path, work=0.03, concurrency=2) as trial:
        worker = await trial.worker(max(count, 2))
        async with trial.load(pace=0.01):
            for _ in range(3):
                await trial.working(20)
                for pid in random.sample(worker.pids, 1 if count == 1 else 3):
                    await worker.kill(pid)
                await worker.ready()
        await trial.verdict(
            f"F01 workers killed 3 times, {max(count, 2)} processes",
            "no loss",
            duplicates=len(trial.faults) * 2,
        )


POINTS = (
    "before_handler",
    "after_handler",
    "before_publish",
    "after_publish",
    "before_settle",
    "after_settle",
)


async def killed_at(point: str, tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, results=True, ack_wait=1.0) as trial:
        first = await trial.worker(kill_at=f"{point}:5")
        await trial.send(12)
        await first.killed()
        assert len(trial.effects()) in (4, 5)
        await trial.worker()
        # The message itself comes twice, or the one before it, whose acknowledgement had not
        # left the process yet.
        found = await trial.verdict(
            f"F02/F03 killed at {point}", "no loss, no result lost", duplicates=1
        )
        if point not in ("before_handler", "after_settle"):
            assert 1 <= found.duplicated <= 1 + trial.untold
        results = await trial.results()
        assert {r.id for r in trial.records("settled")} <= set(results)
        # Published twice, except for one that was not published when it was killed.
        unpublished = point == "before_publish"
        if Capability.NACK_DELAY in trial.source.capabilities:
            unpublished |= point == "after_handler"  # elsewhere a retry in the lane is around both
        assert len(results) - 12 == found.duplicated - unpublished


@STORED
async def test_f03_killed_between_publish_and_ack(tmp_path: Path, source: str) -> None:
    await killed_at("after_publish", tmp_path, source)


@STORED
@pytest.mark.parametrize("point", [point for point in POINTS if point != "after_publish"])
async def test_f02_f03_killed_at_a_named_point(tmp_path: Path, source: str, point: str) -> None:
    await killed_at(point, tmp_path, source)


@STORED
async def test_f02_dedup_makes_it_one_effect(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, dedup=True, ack_wait=1.0) as trial:
        first = await trial.worker(kill_at="before_settle:5")
        await trial.send(12)
        await first.killed()
        await trial.worker()
        await trial.verdict("F02 killed before the ack, with Dedup", "one effect")


@STORED
@pytest.mark.parametrize("point", ["before_dead_letter", "after_dead_letter"])
async def test_f03_killed_around_a_dead_letter(tmp_path: Path, source: str, point: str) -> None:
    async with Trial(source, tmp_path, attempts=2, ack_wait=1.0) as trial:
        first = await trial.worker(kill_at=f"{point}:1")
        [bad] = await trial.send(1, do="raise")
        await trial.send(5)
        await first.killed()
        await trial.worker()
        await trial.verdict(f"F03 killed at {point}", "no loss")
        letters = [trial.id_of(body) for body, _ in await trial.letters()]
        assert set(letters) == {bad}
        assert len(letters) == (2 if point == "after_dead_letter" else 1)


@COUNTED
async def test_f05_a_message_that_kills_its_process(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, attempts=2, ack_wait=1.0, work=0.05) as trial:
        await trial.worker(2)
        await trial.send(3)
        await trial.until(lambda: len(trial.effects()) == 3)
        [bad] = await trial.send(1, do="abort")
        await trial.send(20, pace=0.1)
        await trial.until(lambda: trial.settled(bad), 25)
        for pid in {r.pid for r in trial.records("start") if r.id == bad}:
            trial.died(pid)
        await trial.verdict(
            "F05 message that aborts its process", "dead letter after its attempts", duplicates=2
        )
        letters = {trial.id_of(body): headers for body, headers in await trial.letters()}
        assert letters.keys() == {bad}
        assert letters[bad]["ms-error-type"] == "CrashedWorker"
        assert sum(r.id == bad for r in trial.records("start")) == 2
        # What the broker counts: a delivery to a process that is gone already is one as well.
        assert int(letters[bad]["ms-attempts"]) >= 2


@COUNTED
async def test_f05_messages_beside_it_are_no_crashes(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, attempts=2, ack_wait=1.0, work=0.05) as trial:
        await (await trial.worker()).stop()
        # The backlog is there before the worker, so that it fetches more than the first one.
        [bad] = await trial.send(1, do="abort")
        await trial.send(20)
        for _ in range(2):
            await (await trial.worker(ready=False)).wait()
        await trial.worker()
        await trial.until(lambda: trial.settled(bad))
        for pid in {r.pid for r in trial.records("start") if r.id == bad}:
            trial.died(pid)
        await trial.verdict(
            "F05 fetched along with a killer", "only the killer is a dead letter", duplicates=2
        )
