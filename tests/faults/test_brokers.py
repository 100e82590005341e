"""Brokers that restart, crash, forget, fill up or say no: F13 to F16, F29, F32."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from nats.js.api import DiscardPolicy, RetentionPolicy

from millstream.errors import MillstreamError
from tests.faults.app import Order
from tests.faults.harness import Trial
from tests.faults.test_network import FETCHED, lossy
from tests.servers import NatsServer

ROUNDS = pytest.mark.parametrize(
    "rounds", [1, pytest.param(5, marks=[pytest.mark.faults, pytest.mark.timeout(240)])]
)
BOTH = pytest.mark.parametrize("source", ["jetstream", "nats-core"])


def server_of(trial: Trial) -> NatsServer:
    assert trial.server is not None
    return trial.server


@BOTH
@ROUNDS
@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_f13_f14_the_broker_goes_and_comes_back(
    tmp_path: Path, source: str, rounds: int, how: str
) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, server = await trial.worker(), server_of(trial)
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
            lost=lossy(trial, rounds * 75),
            duplicates=rounds * FETCHED,
            timeout=30 if trial.source.confirms else 2,
        )
        assert len(worker.output.splitlines()) < 10 + 4 * rounds, worker.output


async def test_f15_the_broker_comes_back_empty(tmp_path: Path) -> None:
    async with Trial("jetstream", tmp_path) as trial:
        worker, server = await trial.worker(), server_of(trial)
        await trial.send(20)
        await trial.quiet()
        async with trial.fault("emptied"):
            await asyncio.to_thread(server.stop)
            shutil.rmtree(server.folder / "store")
            await asyncio.to_thread(server.start)
        await trial.send(20)  # once the application has made its stream again
        await trial.verdict(
            "F15 broker comes back empty", "stream and consumer made again, no loss afterwards"
        )
        assert worker.process.count("WARNING .* is made again") == 1


async def test_f16_the_broker_is_away_at_the_start(tmp_path: Path) -> None:
    async with Trial("jetstream", tmp_path) as trial:
        server = server_of(trial)
        await asyncio.to_thread(server.stop)
        worker = await trial.worker(ready=False)
        await trial.until(lambda: worker.process.count("next try in") >= 2)
        begin = time.monotonic()
        await asyncio.to_thread(server.start)
        await worker.ready()
        assert time.monotonic() - begin < 5 + 2
        assert worker.process.count("next try in") < 8
        await trial.send(10)
        await trial.verdict("F16 broker away at the start", "waits, says so, begins")


@pytest.mark.faults
@pytest.mark.timeout(180)
@BOTH
async def test_f16_the_broker_is_away_for_long(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        worker, server = await trial.worker(), server_of(trial)
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


@pytest.mark.parametrize("what", ["consumer", "stream"])
async def test_f29_an_operator_deletes_it(tmp_path: Path, what: str) -> None:
    async with Trial("jetstream", tmp_path) as trial:
        worker = await trial.worker()
        await trial.send(20)
        broker, name = await trial.connect(), trial.setup.name
        if what == "consumer":
            async with trial.load(pace=0.02):
                await trial.working(5)
                async with trial.fault("deleted"):
                    await broker.js.delete_consumer(name, "workers")
                await trial.working(20)
        else:
            await trial.quiet()
            async with trial.fault("deleted"):
                await broker.js.delete_stream(name)
            await trial.send(20)
        await trial.verdict(
            f"F29 {what} deleted while running", "made again, said, no loss", duplicates=FETCHED
        )
        assert worker.process.count("WARNING .* is made again") == 1, worker.output


USERS = """
server_name: {name}
authorization {{ users: [
  {{ user: sender, password: pw }}
  {{ user: worker, password: pw, permissions: {{ publish: {{ deny: [{deny}] }} }} }}
] }}
"""


LOGINS = ("worker:pw@", "sender:pw@")


def permit(trial: Trial, deny: str) -> None:
    """Deny the worker to publish to something, from now on."""
    server = server_of(trial)
    server.config = USERS.format(name=server.server_name, deny=deny)
    if server.running:
        (server.folder / "nats.conf").write_text(server.config)
        os.kill(server.pid, signal.SIGHUP)


@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "deny"),
    [("fetch", '"$JS.API.CONSUMER.MSG.NEXT.>"'), ("acknowledge", '"$JS.ACK.>"')],
    ids=["fetch", "ack"],
)
async def test_f29_a_permission_is_revoked(tmp_path: Path, what: str, deny: str) -> None:
    trial = Trial("jetstream", tmp_path, users=LOGINS, work=0.05, attempts=50)
    permit(trial, "")
    async with trial:
        worker = await trial.worker()
        async with trial.load(pace=0.06):
            await trial.working(5)
            async with trial.fault("revoked"):
                permit(trial, deny)
                await trial.until(lambda: worker.process.count("ermissions violation"), 20)
                await asyncio.sleep(3)
                permit(trial, "")
            await trial.working(10, 40)
        # A request that nobody answers is noticed after two missing signs of life, 11 s.
        await trial.verdict(
            f"F29 permission to {what} revoked and given back",
            "said, goes on by itself, no loss",
            duplicates=200 if what == "acknowledge" else FETCHED,
            recovery=15,
            timeout=60,
        )
        assert worker.process.count("ermissions violation") <= 10 + 6, worker.output


@pytest.mark.faults
async def test_lost_acknowledgements_are_no_crashes(tmp_path: Path) -> None:
    trial = Trial("jetstream", tmp_path, users=LOGINS, attempts=2, ack_wait=1.0)
    permit(trial, "")
    async with trial:
        worker = await trial.worker()
        async with trial.fault("revoked"):
            permit(trial, '"$JS.ACK.>"')
            await trial.send(3)
            await trial.until(lambda: worker.process.count("ermissions violation") >= 8, 20)
            permit(trial, "")
        await trial.verdict(
            "Acknowledgements lost twice", "handled, so no dead letter", duplicates=12
        )


async def test_f32_the_store_is_full(tmp_path: Path) -> None:
    settings = {
        "max_bytes": 20_000,
        "discard": DiscardPolicy.NEW,
        "retention": RetentionPolicy.WORK_QUEUE,
    }
    async with Trial("jetstream", tmp_path, stream=settings) as trial:
        worker = await trial.worker()
        await trial.send(5)
        await worker.stop()
        broker, refused = await trial.connect(), 0
        async with trial.fault("full"):
            for n in range(200):
                order = Order(id=f"full{n}", key="k", seq=n)
                trial.ledger.write("sent", order.id)
                options = trial.source.publication(trial.setup, order.id)
                try:
                    await broker.publish(order, trial.setup.subject, **options)
                except MillstreamError as error:
                    refused += 1
                    assert "was not stored" in str(error) and "maximum bytes" in str(error)
                else:
                    trial.ledger.write("confirmed", order.id)
            assert 0 < refused < 200
            await trial.worker()
        await trial.send(20)  # there is room again
        await trial.verdict("F32 store full", "an error and no false confirmation, then goes on")
