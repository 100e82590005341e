"""Some thousand schedules with every test run, what they once found, and whether they would."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from millstream import AckPolicy, Retry, Settlement
from millstream.ack import TABLE, Row
from millstream.breaker import Circuit
from millstream.failure import Failures
from millstream.lanes import Lanes
from millstream.subscription import Subscription
from tests.simulation.explore import explore, run, shrink
from tests.simulation.findings import FINDINGS
from tests.simulation.loop import SimLoop

SEEDS = [
    (int(line.split()[0]), line.strip())
    for line in Path(__file__).with_name("seeds.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
#: Seeds of one test, and how many such tests there are.
CHUNK, CHUNKS = 400, 4
#: Seeds within which a broken engine has to be caught.
BOUND = 300


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_schedules(chunk: int, record_property: Callable[[str, object], None]) -> None:
    begin = time.perf_counter()
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        outcome = explore(seed)
        assert not outcome.violations, str(shrink(outcome))
    rate = CHUNK / (time.perf_counter() - begin)
    record_property("schedules_per_second", round(rate))
    print(f"{rate:.0f} schedules a second")


@pytest.mark.parametrize(("seed", "line"), SEEDS)
def test_seeds_that_once_failed(seed: int, line: str) -> None:
    outcome = explore(seed)
    assert not outcome.violations, f"{line}\n{outcome}"


@pytest.mark.parametrize("name", FINDINGS)
def test_findings(name: str) -> None:
    plan, seed = FINDINGS[name]
    for other in range(seed, seed + 5):
        outcome = run(plan, other)
        assert not outcome.violations, str(outcome)


@pytest.mark.parametrize("seed", [3, 17, 129, 715])
def test_a_seed_is_one_run(seed: int) -> None:
    first, second = explore(seed), explore(seed)
    assert (first.trace, first.steps) == (second.trace, second.steps)


# The scheduler


def test_the_loop_permutes_tasks_and_keeps_what_code_relies_on() -> None:
    orders = set()
    for seed in range(50):
        loop = SimLoop(random.Random(seed), 0.0)
        got: list[Any] = []

        async def note(name: int, got: list[Any] = got) -> None:
            got.append(name)

        def told(name: str, _: Any, got: list[Any] = got) -> None:
            got.append(name)

        async def main(got: list[Any] = got, loop: SimLoop = loop) -> None:
            future: asyncio.Future[None] = loop.create_future()
            for name in ("first", "second", "third"):
                future.add_done_callback(partial(told, name))
            tasks = [loop.create_task(note(n)) for n in range(4)]
            future.set_result(None)
            for name in ("a", "b"):
                loop.call_soon(got.append, name)
            await asyncio.sleep(0)  # comes back after all that was ready
            got.append("back")
            await asyncio.wait(tasks)
            begin = loop.time()
            await asyncio.sleep(3600)
            assert loop.time() >= begin + 3600

        loop.run_until_complete(main())
        loop.close()
        assert got[-1] == "back"
        assert [n for n in got if n in ("first", "second", "third")] == ["first", "second", "third"]
        assert [n for n in got if n in ("a", "b")] == ["a", "b"]
        orders.add(tuple(n for n in got if isinstance(n, int)))
    assert len(orders) > 10


# Broken engines: each has to be caught


def _acknowledged_first(patch: pytest.MonkeyPatch) -> None:
    none = Settlement.NONE
    patch.setitem(TABLE, AckPolicy.RETRY, Row(Settlement.ACK, none, none, none, none))


def _no_delay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Retry, "backoff", lambda self, attempt: 0.0)


def _letter_after_settlement(patch: pytest.MonkeyPatch) -> None:
    bury = Failures._bury

    async def first(self: Any, message: Any, error: Any, attempt: int) -> None:
        await message.settle(Settlement.ACK)
        message.settled = None
        await bury(self, message, error, attempt)

    patch.setattr(Failures, "_bury", first)


def _no_keys(patch: pytest.MonkeyPatch) -> None:
    init = Lanes.__init__

    def without(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "key": None})

    patch.setattr(Lanes, "__init__", without)


def _no_keeper(patch: pytest.MonkeyPatch) -> None:
    async def keep(self: Any, interval: float) -> None: ...

    patch.setattr(Subscription, "_keep", keep)


def _no_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Subscription, "_lost", lambda self, error: None)


def _endless_attempts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Retry, "again", lambda self, error, attempt: True)


def _probes_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Circuit, "_free", lambda self: None)


def _waits_for_the_deaf(patch: pytest.MonkeyPatch) -> None:
    async def close(self: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    patch.setattr(Lanes, "close", close)


def _hands_nothing_back(patch: pytest.MonkeyPatch) -> None:
    async def abandoned(self: Any, message: Any) -> None:
        await message.settle(Settlement.ACK)

    patch.setattr(Failures, "abandoned", abandoned)


@pytest.mark.parametrize(
    "break_engine",
    [
        _acknowledged_first,
        _no_delay,
        _letter_after_settlement,
        _no_keys,
        _no_keeper,
        _no_recovery,
        _endless_attempts,
        _probes_for_ever,
        _waits_for_the_deaf,
        _hands_nothing_back,
    ],
)
def test_a_broken_engine_is_caught(
    break_engine: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_engine(monkeypatch)
    for seed in range(BOUND):
        outcome = explore(seed)
        if outcome.violations:
            print(f"caught by seed {seed}: {outcome.violations[0]}")
            return
    pytest.fail(f"not caught in {BOUND} seeds")
