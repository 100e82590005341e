"""Publishers and callers in trouble: F34, F36, F43."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from millstream.errors import (
    MessageTooLarge,
    NotConnected,
    PublishTimeout,
    RequestTimeout,
)
from tests.faults.app import Order
from tests.faults.checker import Verdict
from tests.faults.harness import Trial
from tests.faults.registry import on
from tests.helpers import eventually


@on(confirms=True, processes=True)
@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_f34_publishing_into_an_outage_is_bounded(
    tmp_path: Path, source: str, how: str
) -> None:
    async with Trial(source, tmp_path) as trial:
        await trial.worker()
        await trial.send(5)
        await trial.quiet()
        server = trial.server
        async with trial.fault(how):
            await asyncio.to_thread(server.stop if how == "stopped" else server.suspend)
            begin = time.monotonic()

            async def one(n: int) -> None:
                order = Order(id=f"late{n}")
                trial.ledger.write("sent", order.id)
                with pytest.raises((NotConnected, PublishTimeout)):
                    await trial.publish(order, order.id, timeout=1.0)

            # Many at once wait for as long as one, and nothing piles up without end.
            await asyncio.gather(*(one(n) for n in range(200)))
            assert 0.9 < time.monotonic() - begin < 2.5
            await asyncio.to_thread(server.start if how == "stopped" else server.resume)
        await trial.send(5)
        await trial.verdict(
            f"F34 publishing while the broker is {how}", "an error after the timeout, no false one"
        )


@on(has="max_message")
async def test_f36_a_payload_over_the_limit(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Trial(source, tmp_path) as trial:
        await trial.consume()
        limit = trial.source.max_message
        assert limit is not None
        with pytest.raises(MessageTooLarge, match=f"{limit}|{limit:,}"):
            await trial.publish(b"x" * (limit + 1), "large")
        await trial.send(5)
        assert "connection lost" not in caplog.text
        await trial.verdict("F36 payload over the limit", "an error, the connection survives")


@on(has="nobody")
async def test_f43_the_responder_is_killed(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, answers=True) as trial:
        worker = await trial.worker()
        broker = await trial.connect()
        ask, alone = trial.source.address(trial.setup, "ask"), trial.source.nobody
        assert alone is not None

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
            except (alone, RequestTimeout) as error:
                # A timeout: the server has not seen the end of the connection yet.
                return isinstance(error, alone)
            raise AssertionError("a dead process answered")

        await eventually(nobody)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, RequestTimeout) for end in ends)
        assert 1.9 < time.monotonic() - begin < 4.0
        # Nobody waits for an answer any more.
        await eventually(lambda: trial.source.asking(broker) == 0)
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
