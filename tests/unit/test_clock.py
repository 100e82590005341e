"""Virtual time: timers in order, tasks woken, nothing moves by itself."""

from __future__ import annotations

import asyncio
import time

from millstream.clock import LoopClock, VirtualClock


async def test_time_stands_still_until_it_is_moved() -> None:
    clock = VirtualClock(start=100.0)
    fired: list[str] = []
    clock.call_later(0.001, fired.append, "x")
    await asyncio.sleep(0.01)
    assert (fired, clock.now(), clock.wall()) == ([], 100.0, 100.0)


async def test_timers_run_in_order_of_their_time_each_at_its_own() -> None:
    clock = VirtualClock()
    fired: list[tuple[str, float]] = []
    for delay, name in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (1.0, "a2"), (9.0, "never")):
        clock.call_later(delay, lambda name=name: fired.append((name, clock.now())))
    await clock.advance(5.0)
    assert fired == [("a", 1.0), ("a2", 1.0), ("b", 2.0), ("c", 3.0)]
    assert clock.now() == 5.0


async def test_a_cancelled_timer_does_not_run() -> None:
    clock = VirtualClock()
    fired: list[int] = []
    clock.call_later(1.0, fired.append, 1).cancel()
    clock.call_later(1.0, fired.append, 2)
    await clock.advance(2.0)
    assert fired == [2]


async def test_a_negative_delay_is_due_at_once() -> None:
    clock = VirtualClock(start=10.0)
    fired: list[int] = []
    clock.call_later(-5.0, fired.append, 1)
    await clock.advance(0.0)
    assert (fired, clock.now()) == ([1], 10.0)


async def test_sleepers_wake_and_may_sleep_again_within_one_advance() -> None:
    clock = VirtualClock()
    woken: list[float] = []

    async def sleeper() -> None:
        for _ in range(3):
            await clock.sleep(1.0)
            woken.append(clock.now())

    task = asyncio.create_task(sleeper())
    await clock.advance(2.5)
    assert woken == [1.0, 2.0]
    await clock.advance(0.5)
    await asyncio.wait_for(task, 1.0)
    assert woken == [1.0, 2.0, 3.0]


async def test_a_cancelled_sleeper_leaves_no_timer_behind() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(clock.sleep(1.0))
    await clock.settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await clock.advance(2.0)
    assert task.cancelled()


async def test_the_clock_of_the_loop_is_real_time() -> None:
    clock = LoopClock()
    fired = asyncio.Event()
    before = clock.now()
    clock.call_later(0.02, fired.set)
    cancelled = clock.call_later(0.0, lambda: 1 / 0)
    cancelled.cancel()
    await asyncio.wait_for(fired.wait(), 5.0)
    assert clock.now() - before >= 0.019
    await clock.sleep(0.01)
    assert clock.now() - before >= 0.029
    assert abs(clock.wall() - time.time()) < 5.0
