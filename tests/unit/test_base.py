"""What drivers share: reading ahead, waits between attempts, questions, tasks on the side."""

from __future__ import annotations

import asyncio
import logging

import pytest

from millstream.base import Feed, Questions, Tasks, Window, reconnect_delay
from millstream.errors import RequestTimeout
from tests.helpers import eventually

log = logging.getLogger("millstream.test")


def test_reconnect_delay_is_capped_and_jittered():
    assert reconnect_delay(0, 2.0) == 0
    for attempt, most in ((1, 0.1), (3, 0.4), (50, 2.0), (5000, 2.0)):
        delays = {reconnect_delay(attempt, 2.0) for _ in range(50)}
        assert len(delays) > 10 and all(most / 2 <= d <= most for d in delays)


def test_a_window_follows_the_speed_of_the_handler():
    window = Window(first=1, least=4, most=64)
    targets, now, given = [], 100.0, 0
    for pause, taken in [(0, 0), *[(0.01, 8)] * 6, *[(0.1, 8)] * 2, *[(1, 8)] * 5, (0.01, 0)]:
        now, given = now + pause, given + taken
        window.adapt(now, given)
        targets.append(window.target)
    assert targets == [1, 4, 8, 16, 32, 64, 64, 64, 64, 32, 16, 8, 4, 4, 4]


def test_a_window_never_exceeds_its_most():
    window = Window(first=9, least=8, most=3)
    assert window.target == 3
    for now in (1.0, 1.01, 1.02):
        window.adapt(now, int(now * 100))
    assert window.target == 3


async def test_a_feed_gives_in_order_and_survives_its_sink():
    seen: list[int] = []

    async def sink(raw: int) -> None:
        seen.append(raw)
        if raw == 2:
            raise ValueError(raw)

    feed = Feed("in", sink, log)
    for raw in range(4):
        feed.put(raw)
    await eventually(lambda: seen == [0, 1, 2, 3])
    feed.put(4)
    await eventually(lambda: seen[-1] == 4)
    await feed.finish()
    feed.put(5)
    assert seen == [0, 1, 2, 3, 4] and feed.given == 5


async def test_a_feed_leaves_other_tasks_their_turns():
    turns, seen = [], []

    async def sink(raw: int) -> None:
        seen.append(raw)

    async def other() -> None:
        while len(seen) < 1000:
            turns.append(len(seen))
            await asyncio.sleep(0)

    feed = Feed("in", sink, log)
    for raw in range(1000):
        feed.put(raw)
    await other()
    assert len(turns) >= 1000 // 128
    await feed.cut_off()


async def test_a_feed_leaves_a_sink_behind_that_swallows_its_cancellation():
    begun, release = asyncio.Event(), asyncio.Event()

    async def sink(raw: int) -> None:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    feed = Feed("in", sink, log)
    feed.put(1)
    await begun.wait()
    async with asyncio.timeout(5):
        await feed.cut_off()
    release.set()


async def test_questions_get_their_own_answers_or_time_out():
    questions: Questions[str, str] = Questions()
    with questions.ask("a", "x", 5) as one, questions.ask("b", "x", 5) as two:
        questions.answer("b", "to b")
        questions.answer("c", "to nobody")
        questions.answer("a", "to a")
        questions.answer("a", "too late")
        assert (await one, await two) == ("to a", "to b")
    assert "a" not in questions
    late = r"no reply from 'x' within 0\.01 s"
    with pytest.raises(RequestTimeout, match=late), questions.ask("a", "x", 0.01) as answer:
        await answer
    assert "a" not in questions


async def test_tasks_end_with_their_owner_and_say_what_failed(caplog):
    tasks = Tasks(log)
    waiting = tasks.spawn(asyncio.Event().wait())

    async def fails() -> None:
        raise ValueError("why")

    with caplog.at_level(logging.DEBUG, "millstream.test"):
        await asyncio.wait([tasks.spawn(fails())])
        await eventually(lambda: "why" in caplog.text)
    tasks.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
