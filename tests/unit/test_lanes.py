"""Lanes: concurrency, order per key, back-pressure, batches by size and time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millstream import Batch, VirtualClock
from millstream.lanes import Batches, Lanes


class Work:
    """A deliver function whose calls end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.gates: dict[Any, asyncio.Event] = {}

    async def __call__(self, item: Any) -> None:
        self.begun.append(item)
        gate = self.gates.setdefault(str(item), asyncio.Event())
        await gate.wait()

    def end(self, item: Any) -> None:
        self.gates.setdefault(str(item), asyncio.Event()).set()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def test_any_free_worker_takes_the_next_item(clock: VirtualClock) -> None:
    work = Work()
    lanes = Lanes(work, 2, limit=2, clock=clock)
    for item in range(4):
        await lanes.submit(item)
    await settle()
    assert work.begun == [0, 1]
    assert (lanes.busy, lanes.waiting) == (2, 2)
    work.end(1)
    await settle()
    assert work.begun == [0, 1, 2]
    assert lanes.take_back() == [3]
    await lanes.close()


async def test_submit_waits_for_room(clock: VirtualClock) -> None:
    work = Work()
    lanes = Lanes(work, 1, limit=1, clock=clock)
    await lanes.submit(0)
    await settle()
    await lanes.submit(1)
    third = asyncio.ensure_future(lanes.submit(2))
    await settle()
    assert not third.done()
    work.end(0)
    await settle()
    assert third.done()
    await lanes.close()


async def test_order_is_kept_per_key_and_keys_do_not_wait_for_each_other(
    clock: VirtualClock,
) -> None:
    work = Work()
    lanes = Lanes(work, 2, limit=10, clock=clock, key=lambda item: item[0])
    for item in [(0, "a"), (0, "b"), (1, "c"), (1, "d")]:
        await lanes.submit(item)
    await settle()
    assert work.begun == [(0, "a"), (1, "c")]
    work.end((1, "c"))
    await settle()
    assert work.begun[-1] == (1, "d")
    assert not lanes.idle
    await lanes.close()


async def test_a_batch_is_full_or_its_time_is_over(clock: VirtualClock) -> None:
    got: list[list[int]] = []

    async def deliver(items: list[int]) -> None:
        got.append(items)

    lanes = Batches(deliver, 1, Batch(3, wait=5), clock=clock)
    for item in range(4):
        await lanes.submit(item)
    await settle()
    assert got == [[0, 1, 2]]
    await clock.advance(4.9)
    assert len(got) == 1
    await clock.advance(0.2)
    assert got == [[0, 1, 2], [3]]
    await settle()
    assert lanes.idle
    await lanes.close()


async def test_closing_cancels_what_runs(clock: VirtualClock) -> None:
    cancelled: list[int] = []

    async def deliver(item: int) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    lanes = Lanes(deliver, 2, limit=2, clock=clock)
    await lanes.submit(1)
    await lanes.submit(2)
    await settle()
    await lanes.close()
    assert sorted(cancelled) == [1, 2]
