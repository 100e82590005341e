"""Publishers and callers in trouble: F34, F36, F43."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from millstream.errors import (
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishTimeout,
    RequestTimeout,
)
from tests.faults.app import Order
from tests.faults.checker import Verdict
from tests.faults.harness import Trial
from tests.faults.test_brokers import server_of
from tests.helpers import eventually


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_f34_publishing_into_an_outage_is_bounded(tmp_path: Path, how: str) -> None:
    async with Trial("jetstream", tmp_path) as trial:
        await trial.worker()
        await trial.send(5)
        await trial.quiet()
        broker, server = await trial.connect(), server_of(trial)
        async with trial.fault(how):
            await asyncio.to_thread(server.stop if how == "stopped" else server.suspend)
            begin = time.monotonic()

            async def one(n: int) -> None:
                order = Order(id=f"late{n}")
                trial.ledger.write("sent", order.id)
                with pytest.raises((NotConnected, PublishTimeout)):
                    options = trial.source.publication(trial.setup, order.id)
                    await broker.publish(order, trial.setup.subject, timeout=1.0, **options)

            # Many at once wait for as long as one, and nothing piles up without end.
            await asyncio.gather(*(one(n) for n in range(200)))
            assert 0.9 < time.monotonic() - begin < 2.5
            await asyncio.to_thread(server.start if how == "stopped" else server.resume)
        await trial.send(5)
        await trial.verdict(
            f"F34 publishing while the broker is {how}", "an error after the timeout, no false one"
        )


async def test_f36_a_payload_over_the_limit(tmp_path: Path) -> None:
    async with Trial("jetstream", tmp_path, config="max_payload: 10000\n") as trial:
        await trial.worker()
        broker = await trial.connect()
        with pytest.raises(MessageTooLarge, match="10,000"):
            await broker.publish(b"x" * 10_001, trial.setup.subject, stream=trial.setup.name)
        assert broker.connection.stats["reconnects"] == 0
        await trial.send(5)
        await trial.verdict("F36 payload over the limit", "an error, the connection survives")


async def test_f43_the_responder_is_killed(tmp_path: Path) -> None:
    async with Trial("nats-core", tmp_path, answers=True) as trial:
        worker = await trial.worker()
        broker = await trial.connect()
        ask = f"{trial.setup.name}.ask"

        async def request(timeout: float, **do: object) -> str:
            order = Order(id=f"r{time.monotonic()}", **do)  # type: ignore[arg-type]
            return str(await broker.request(order, ask, timeout=timeout, response_model=str))

        assert await request(2.0)
        begin = time.monotonic()
        waiting = [asyncio.create_task(request(2.0, do="sleep", seconds=30.0)) for _ in range(100)]
        await trial.until(lambda: trial.count("asked") == 2)
        await worker.kill()

        async def nobody() -> bool:
            try:
                await request(0.2)
            except NoResponders:
                return True
            except RequestTimeout:  # the server has not seen the end of the connection yet
                return False
            raise AssertionError("a dead process answered")

        await eventually(nobody)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, RequestTimeout) for end in ends)
        assert 1.9 < time.monotonic() - begin < 4.0
        # Nobody waits for an answer any more.
        await eventually(lambda: not broker.driver._replies._waiting)
        await trial.worker()
        healed = time.monotonic()
        assert await request(2.0)
        trial.record(
            "F43 responder killed",
            "every caller has its error in time",
            Verdict(sent=103),
            time.monotonic() - healed,
            [],
        )
