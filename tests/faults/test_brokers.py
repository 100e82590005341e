"""Brokers that restart, crash, forget, fill up or say no: F13 to F16, F29, F32."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from millstream.errors import PublishError
from tests.faults.app import Order
from tests.faults.harness import Trial
from tests.faults.registry import SOURCES, on
from tests.faults.sources.base import Source
from tests.faults.test_network import FETCHED

ROUNDS = pytest.mark.parametrize(
    "rounds", [1, pytest.param(5, marks=[pytest.mark.faults, pytest.mark.timeout(240)])]
)
REMOTE = on(processes=True)


@REMOTE
@ROUNDS
@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_f13_f14_the_broker_goes_and_comes_back(
    tmp_path: Path, source: str, rounds: int, how: str
) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, server = await trial.worker(), trial.server
        async with trial.load(pace=0.02):
            for _ in range(rounds):
                await trial.working(15)
                async with trial.fault(how):
                    await asyncio.to_thread(server.stop if how == "restarted" else server.kill)
                    await asyncio.to_thread(server.start)
                await trial.working(15)
        await trial.verdict(
            f"{'F13' if how == 'restarted' else 'F14'} broker {how} under load, {rounds} time"
            + "s" * (rounds > 1),
            "no loss, goes on" if trial.source.confirms else "goes on, loss only while away",
            lost=trial.lossy(rounds * 75),
            duplicates=rounds * FETCHED,
            timeout=30 if trial.source.confirms else 2,
        )
        assert len(worker.output.splitlines()) < 10 + 4 * rounds, worker.output


@on(has="wipe")
async def test_f15_the_broker_comes_back_empty(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, server = await trial.worker(), trial.server
        await trial.send(20)
        await trial.quiet()
        async with trial.fault("emptied"):
            await asyncio.to_thread(server.stop)
            trial.source.wipe(server)
            await asyncio.to_thread(server.start)
        await trial.send(20)  # once the application has made its stream again
        await trial.verdict(
            "F15 broker comes back empty", "what it needs is made again, no loss afterwards"
        )
        assert worker.process.count("WARNING .* is made again") == trial.source.notices


@REMOTE
async def test_f16_the_broker_is_away_at_the_start(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        server = trial.server
        await asyncio.to_thread(server.stop)
        worker = await trial.worker(ready=False)
        await trial.until(lambda: worker.process.count("next try in") >= 2)
        await asyncio.to_thread(server.start)  # until it answers
        begin = time.monotonic()
        await worker.ready()
        assert time.monotonic() - begin < 5 + 2
        assert worker.process.count("next try in") < 8
        await trial.send(10)
        await trial.verdict("F16 broker away at the start", "waits, says so, begins")


@pytest.mark.faults
@pytest.mark.timeout(180)
@REMOTE
async def test_f16_the_broker_is_away_for_long(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, server = await trial.worker(), trial.server
        await trial.send(20)
        await trial.quiet()
        async with trial.fault("away"):
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(30)
            lines = len(worker.output.splitlines())
            await asyncio.to_thread(server.start)
        await trial.until(lambda: worker.process.count("connected again"))
        await trial.send(20)
        await trial.verdict("F16 broker away for 30 s", "waits with backoff, few lines, goes on")
        assert lines < 8, worker.output


@on(has="delete_group")
async def test_f29_an_operator_deletes_the_group(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker = await trial.worker()
        await trial.send(20)
        async with trial.load(pace=0.02):
            await trial.working(5)
            async with trial.fault("deleted"):
                await trial.source.delete_group(await trial.connect(), trial.setup)
            await trial.working(20)
        await trial.verdict(
            "F29 consumer group deleted",
            "made again, said, no loss",
            duplicates=FETCHED,
        )
        assert worker.process.count("WARNING .* is made again") == 1, worker.output


@on(has="delete_group")
async def test_f29_who_makes_the_group_again_does_not_know_everything(
    tmp_path: Path, source: str
) -> None:
    async with Trial(source, tmp_path, delay=3.0) as trial:
        worker = await trial.worker(2)
        await trial.send(20)
        [failing] = await trial.send(1, do="raise", first=True)
        await trial.send(20)
        await trial.until(lambda: trial.count("effect") == 40)
        # The worker that handed it back, to have it again later, stands still; the other one
        # goes on behind what it had itself.
        [holder] = {r.pid for r in trial.records("start") if r.id == failing}
        assert len({r.pid for r in trial.records("effect")}) == 2
        async with trial.fault("deleted"):
            worker.send(signal.SIGSTOP, holder)
            await trial.source.delete_group(await trial.connect(), trial.setup)
            await trial.send(20)
            await trial.until(lambda: worker.process.count("WARNING .* is made again"))
            worker.send(signal.SIGCONT, holder)
        await trial.verdict(
            "F29 consumer group deleted, others have retries to come",
            "no loss",
            duplicates=60,
            recovery=5,  # the retry's own delay
            linger=3.0,  # until the one that stood still has looked
        )


@on(has="delete_group")
async def test_f29_the_group_is_deleted_after_a_worker_died(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, work=0.05, ack_wait=4.0) as trial:
        worker = await trial.worker(2)
        async with trial.load(pace=0.02):
            await trial.working(10)
            # What the dead one held is known to the group alone, until it comes again.
            await worker.kill(worker.pids[0])
            await asyncio.sleep(2.0)
            async with trial.fault("deleted"):
                await trial.source.delete_group(await trial.connect(), trial.setup)
                await trial.until(lambda: worker.process.count("WARNING .* is made again"))
            await trial.working(20)
        await trial.verdict(
            "F29 consumer group deleted after a worker died", "no loss", duplicates=300, linger=3.0
        )


@on(has="delete_source")
async def test_f29_an_operator_deletes_the_source(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker = await trial.worker()
        await trial.send(20)
        await trial.quiet()
        async with trial.fault("deleted"):
            await trial.source.delete_source(await trial.connect(), trial.setup)
        await trial.send(20)  # once the application has made it again
        await trial.verdict(
            "F29 stream or queue deleted while running", "made again, said, no loss"
        )
        assert worker.process.count("WARNING .* is made again") == 1, worker.output


@on(has="delete_source")
async def test_f29_then_the_group_is_deleted_too(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        if type(trial.source).delete_group is Source.delete_group:
            pytest.skip(f"{source} has no group to delete")
        worker, broker = await trial.worker(), await trial.connect()
        await trial.send(40)
        await trial.quiet()
        async with trial.fault("deleted"):
            await trial.source.delete_source(broker, trial.setup)
        await trial.send(5)  # with other numbers than before
        await trial.quiet()
        async with trial.fault("deleted"):
            await trial.source.delete_group(broker, trial.setup)
        await trial.send(10)
        await trial.verdict("F29 first what holds the messages deleted, then the group", "no loss")
        assert worker.process.count("WARNING .* is made again") == 2, worker.output


def forbidden(*what: str) -> pytest.MarkDecorator:
    """Every source on which one of these can be forbidden."""
    pairs = [(name, one) for name, kind in SOURCES.items() for one in kind.forbids if one in what]
    return pytest.mark.parametrize(("source", "what"), pairs)


@pytest.mark.faults
@pytest.mark.timeout(120)
@forbidden("fetch", "acknowledge")
async def test_f29_a_permission_is_revoked(tmp_path: Path, source: str, what: str) -> None:
    async with Trial(source, tmp_path, logins=True, work=0.05, attempts=50) as trial:
        worker, denied = await trial.worker(), trial.source.denied
        async with trial.load(pace=0.06):
            await trial.working(5)
            async with trial.fault("revoked"):
                trial.source.forbid(trial.server, what)
                await trial.until(lambda: worker.process.count(denied), 20)
                await asyncio.sleep(3)
                trial.source.forbid(trial.server, "")
            await trial.working(10, 40)
        # A request that nobody answers is noticed after two missing signs of life, 11 s.
        await trial.verdict(
            f"F29 permission to {what} revoked and given back",
            "said, goes on by itself, no loss",
            duplicates=200 if what == "acknowledge" else FETCHED,
            recovery=15,
            timeout=60,
        )
        assert worker.process.count(denied) <= 10 + 6, worker.output


@pytest.mark.faults
@forbidden("acknowledge")
async def test_lost_acknowledgements_are_no_crashes(tmp_path: Path, source: str, what: str) -> None:
    async with Trial(source, tmp_path, logins=True, attempts=2, ack_wait=1.0) as trial:
        worker = await trial.worker()
        async with trial.fault("revoked"):
            trial.source.forbid(trial.server, what)
            await trial.send(3)
            await trial.until(lambda: worker.process.count(trial.source.denied) >= 8, 20)
            trial.source.forbid(trial.server, "")
        await trial.verdict(
            "Acknowledgements lost twice", "handled, so no dead letter", duplicates=12
        )


@on(has="full")
async def test_f32_the_store_is_full(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, room=20_000) as trial:
        worker = await trial.worker()
        await trial.send(5)
        await worker.stop()
        refused = 0
        async with trial.fault("full"):
            for n in range(200):
                order = Order(id=f"full{n}", key="k", seq=n)
                trial.ledger.write("sent", order.id)
                try:
                    await trial.publish(order, order.id)
                except PublishError as error:
                    refused += 1
                    assert trial.source.full in str(error)
                else:
                    trial.ledger.write("confirmed", order.id)
            assert 0 < refused < 200
            await trial.worker()
        await trial.send(20)  # there is room again
        await trial.verdict("F32 store full", "an error and no false confirmation, then goes on")
