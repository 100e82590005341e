"""Processes that stand still, and handlers that are slow: F11, F12, F23, F24, F25, F26."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from tests.faults.app import Order
from tests.faults.harness import Trial, gaps
from tests.faults.registry import on


@on(confirms=True, processes=True)
async def test_f11_a_worker_stands_still_and_goes_on(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, ack_wait=1.0, work=0.05) as trial:
        worker = await trial.worker(2)
        async with trial.load(pace=0.04):
            await trial.working(5)
            frozen = worker.pids[0]
            async with trial.fault("stopped", [frozen]):
                worker.send(signal.SIGSTOP, frozen)
                await asyncio.sleep(2.5)
                worker.send(signal.SIGCONT, frozen)
                before = len(trial.effects())
            await trial.until(lambda: len(trial.effects()) > before + 20)
        # The message that ran, and those fetched beforehand whose deadline passed meanwhile.
        await trial.verdict(
            "F11 worker frozen past the ack deadline", "no loss, the others go on", duplicates=3
        )


@on(confirms=True, processes=True)
async def test_f12_a_handler_blocks_the_event_loop(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, ack_wait=1.0, work=0.05) as trial:
        worker = await trial.worker(2)
        async with trial.load(pace=0.02):
            await trial.working(5)
            async with trial.fault("blocked"):
                [bad] = await trial.send(1, do="block", seconds=3.0, first=True)
                await trial.until(
                    lambda: bad in trial.effects() or worker.process.count("is blocked for")
                )
                await asyncio.sleep(2.0)
            await trial.working(10)
        assert worker.process.count(r"the event loop is blocked for .* by the handler handle") == 1
        await trial.verdict(
            "F12 blocked event loop", "the watchdog names the handler, no loss", duplicates=3
        )


@on(confirms=True, deadline=True)
async def test_f23_a_handler_slower_than_the_ack_deadline(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, ack_wait=1.0) as trial:
        await trial.inside()
        await trial.send(1, do="sleep", seconds=3.0)
        await trial.send(5)
        await trial.verdict("F23 handler of three ack deadlines", "exactly one effect", recovery=3)
        assert trial.count("start") == 6


@on(confirms=True)
async def test_f24_a_handler_that_always_fails(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, attempts=4, delay=0.2) as trial:
        await trial.inside()
        [bad] = await trial.send(1, do="raise")
        await trial.send(20)
        await trial.until(lambda: trial.effects() and trial.settled(bad))
        found = gaps(trial.records(), bad)
        # No retry comes before its delay: 0.2, 0.4, 0.8 s and up to a tenth more.
        for gap, delay in zip(found, (0.2, 0.4, 0.8), strict=True):
            assert delay <= gap <= delay * 1.1 + 1.0, found
        await trial.verdict("F24 handler that always fails", "backoff kept, then dead letter")
        [(body, headers)] = await trial.letters()
        assert trial.id_of(body) == bad
        assert headers["ms-error-type"] == "ValueError" and headers["ms-attempts"] == "4"


@on(confirms=True)
async def test_f24_poison_goes_to_the_dead_letters_as_it_was(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path) as trial:
        await trial.inside()
        poison = b'\xff\x00{"id": nothing}'
        await trial.publish(poison, "poison")
        await trial.send(20)
        await trial.verdict("F24 poison body", "dead letter at once, bytes untouched")
        letters = await trial.letters()
        assert [body for body, _ in letters] == [poison]
        assert letters[0][1]["ms-error-type"] == "DecodeError"
        assert letters[0][1]["ms-attempts"] == "1"


@on(confirms=True, processes=True)
async def test_f24_a_storm_of_failures_is_no_storm_of_lines(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, attempts=2, delay=0.1, concurrency=8) as trial:
        worker = await trial.worker()
        await trial.send(200, do="raise", keys=50)  # no key holds up many
        await trial.verdict("F24 every message fails", "all dead letters, few lines")
        records = trial.records("start")
        seconds = records[-1].at - records[0].at
        lines = sum(" ERROR " in line for line in worker.output.splitlines())
        assert trial.count("start") == 400
        assert lines <= 10 + seconds + 2, f"{lines} lines in {seconds:.1f} s"


@on(has="refuse_letters", confirms=True)
async def test_f25_a_dead_letter_that_is_refused(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, attempts=2, delay=0.1, ack_wait=1.0) as trial:
        broker = await trial.connect()
        await trial.source.refuse_letters(broker, trial.setup)
        worker = await trial.worker()
        async with trial.fault("refused"):
            [bad] = await trial.send(1, do="raise")
            await trial.send(10)
            await trial.until(lambda: worker.process.count("and its dead letter too") >= 2)
            assert not trial.settled(bad)

            async def stays() -> bool:  # where nobody counts what a worker has, not in each moment
                return await trial.held() == 1

            await trial.until(stays)
            assert not trial.settled(bad)
            await trial.source.take_letters(broker, trial.setup)
        await trial.verdict(
            "F25 dead letter refused", "the original stays until it is taken", recovery=6
        )
        assert [trial.id_of(body) for body, _ in await trial.letters()] == [bad]


@on(confirms=True)
async def test_f26_what_is_sent_twice_is_handled_once(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, dedup=True, work=0.02) as trial:
        await trial.consume(2)
        for n in range(20):
            order = Order(id=f"m{n}", key="k")
            trial.ledger.write("sent", order.id)
            for copy in "ab":  # another id for the broker: it stores both
                await trial.publish(order, f"{copy}{n}")
            trial.ledger.write("confirmed", order.id)
        await trial.verdict("F26 every message sent twice, with Dedup", "one effect each")


@on(confirms=True)
async def test_i3_order_per_key_with_failures(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, ordered=True, concurrency=4, delay=0.1) as trial:
        await trial.inside()
        for _ in range(5):
            await trial.send(6)
            await trial.send(1, do="raise", first=True)
        await trial.verdict(
            "I3 failing messages among ordered ones", "order kept per key, no overlap", ordered=True
        )
