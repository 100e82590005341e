"""Networks that break, fall silent, or stop in the middle of a frame: F17 to F22."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from pathlib import Path

import pytest

from tests.faults.harness import Trial
from tests.faults.registry import on

REMOTE = on(processes=True)
STORED = on(confirms=True, processes=True)
#: Messages that may be fetched and not acknowledged when a connection breaks.
FETCHED = 16
#: Bytes that may live longer by chance.
MARGIN = 64 * 1024


@REMOTE
async def test_f17_reset(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker = await trial.worker()
        async with trial.load(pace=0.02):
            for _ in range(3):
                await trial.working(10)
                async with trial.fault("reset"):
                    trial.proxy.reset()
            await trial.working(20)
        await trial.verdict(
            "F17 connection reset, 3 times",
            "no loss" if trial.source.confirms else "loss only while away",
            lost=trial.lossy(3 * 75),
            duplicates=3 * FETCHED,
            timeout=15 if trial.source.confirms else 2,
        )
        assert worker.process.count("connection lost") == worker.process.count("connected again")


@REMOTE
@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ways", [("up", "down"), ("up",), ("down",)], ids="-".join)
@pytest.mark.parametrize("seconds", [5.0, 15.0])
async def test_f18_f19_black_hole(
    tmp_path: Path, source: str, ways: tuple[str, ...], seconds: float
) -> None:
    async with Trial(source, tmp_path) as trial:
        worker = await trial.worker()
        async with trial.load(pace=0.02):
            await trial.working(10)
            async with trial.fault("black hole"):
                trial.proxy.hold(up="up" in ways, down="down" in ways)
                # Noticed by missing answers: two pings, one second apart.
                await trial.until(lambda: worker.process.count("connection lost"), 6)
                await asyncio.sleep(seconds - 4)
                trial.proxy.heal()
            await trial.working(20)
        what = "both ways" if len(ways) == 2 else f"{ways[0]} only"
        await trial.verdict(
            f"F18/F19 black hole {what}, {seconds:g} s",
            "noticed, no loss" if trial.source.confirms else "noticed, loss only while away",
            lost=trial.lossy(50 * int(seconds + 10)),
            duplicates=FETCHED,
            timeout=60 if trial.source.confirms else 2,
        )


@STORED
async def test_f19_the_peer_is_gone_without_a_word(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, watched=True, ack_wait=1.0) as trial:
        worker = await trial.worker()
        async with trial.load(pace=0.03):
            await trial.working(10)
            # New connections work at once: the rest is the time to notice.
            async with trial.fault("half open"):
                trial.proxy.drop()
            await trial.until(lambda: worker.process.count("connected again"), 10)
            await trial.working(20)
        notice = 3 * trial.setup.ping  # two pings unanswered, seen with the third
        bound = notice + trial.setup.reconnect + trial.setup.ack_wait
        await trial.verdict(
            "F19 half-open connection",
            "noticed, no loss",
            duplicates=FETCHED,
            recovery=bound,
            linger=bound,  # what is handled before it is noticed cannot be acknowledged
        )


@STORED
@pytest.mark.faults
@pytest.mark.timeout(240)
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
async def test_f20_cut_at_every_place_of_a_frame(tmp_path: Path, source: str, up: bool) -> None:
    async with Trial(source, tmp_path, work=0.0, reconnect=0.1, ack_wait=1.0) as trial:
        worker = await trial.worker()
        cuts = 0
        async with trial.load(pace=0.005):
            # One frame of ours has some 150 bytes; the step does not divide it.
            for after in range(1, 400, 13):
                await trial.working(1)
                async with trial.fault("cut"):
                    trial.proxy.cut(after, up=up)
                    await trial.until(lambda: not trial.proxy.cuts)
                    cuts += 1
            await trial.working(20)
        await trial.verdict(
            f"F20 cut in the middle of a frame, {'up' if up else 'down'}, {cuts} offsets",
            "no loss, nothing half decoded",
            duplicates=cuts * FETCHED,
            linger=2.0,  # what was fetched when the connection broke may wait its turn
            timeout=60,
        )
        assert "DecodeError" not in worker.output, worker.output


@STORED
@pytest.mark.faults
@pytest.mark.timeout(240)
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
async def test_f20_cut_while_connecting(tmp_path: Path, source: str, up: bool) -> None:
    async with Trial(source, tmp_path, reconnect=0.1, ack_wait=1.0) as trial:
        worker, proxy = await trial.worker(), trial.proxy
        cuts = [1, 3, 4, 5, *range(6, 700, 23)]
        async with trial.load(pace=0.01):
            for after in cuts:
                await trial.working(1)
                async with trial.fault("cut"):
                    proxy.reset()
                    proxy.cut(after, up=up)
                    await trial.until(lambda: not proxy.cuts)
            await trial.working(20)
        await trial.verdict(
            f"F20 cut while it connects, {'up' if up else 'down'}, {len(cuts)} offsets",
            "no loss, connects again",
            duplicates=len(cuts) * FETCHED,
            linger=2.0,
            timeout=60,
        )
        assert "DecodeError" not in worker.output, worker.output


@STORED
@pytest.mark.faults
@pytest.mark.timeout(180)
async def test_f21_a_slow_network(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, concurrency=4) as trial:
        trial.proxy.latency = 0.15
        worker = await trial.worker()
        await trial.send(300)
        await trial.verdict("F21 300 ms round trip", "no loss, no reconnect", timeout=60)
        assert not worker.process.count("connection lost")


@STORED
@pytest.mark.faults
@pytest.mark.timeout(240)
async def test_f22_flapping(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, proxy = await trial.worker(), trial.proxy
        async with trial.load(pace=0.03):
            await trial.working(10)
            async with trial.fault("flapping"):
                for _ in range(15):
                    await proxy.refuse()
                    proxy.reset()
                    await asyncio.sleep(1.0)
                    await proxy.start()
                    await asyncio.sleep(1.0)
            await trial.working(20)
        await trial.verdict(
            "F22 flapping, 1 s up and 1 s down, 15 times",
            "no loss, few lines",
            duplicates=15 * FETCHED,
        )
        # A line for each change of the connection, and no other ones.
        lines = worker.output.splitlines()
        assert len(lines) < 15 * 2 + 15, worker.output


def allocated() -> int:
    """Bytes that live in the process, without those of the tests and their ledgers."""
    gc.collect()
    tests = str(Path(__file__).parents[1] / "*")
    leave_out = [
        tracemalloc.Filter(False, name) for name in (tests, tracemalloc.__file__, "*pytest*")
    ]
    taken = tracemalloc.take_snapshot().filter_traces(leave_out)
    return sum(trace.size for trace in taken.traces)


async def tasks_and_links(trial: Trial) -> tuple[int, int]:
    await asyncio.sleep(0.3)
    return len(asyncio.all_tasks()), trial.proxy.live


@STORED
async def test_i7_everything_is_back_to_where_it_was(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, reconnect=0.1) as trial:
        await trial.inside()

        async def resets(count: int) -> None:
            for _ in range(count):
                async with trial.fault("reset"):
                    trial.proxy.reset()
                await trial.send(50)
                await trial.quiet()

        tracemalloc.start()
        try:
            await resets(2)  # the first ones fill what is filled once
            before, memory = await tasks_and_links(trial), allocated()
            await resets(8)
            after, grown = await tasks_and_links(trial), allocated() - memory
        finally:
            tracemalloc.stop()
        await trial.verdict(
            "I7 10 resets",
            "as many tasks, connections and bytes as before",
            duplicates=10 * FETCHED,
        )
        assert after == before
        # 400 messages and 8 connections: a leak of either would be far more.
        assert grown < MARGIN, f"{grown} bytes more than before"
