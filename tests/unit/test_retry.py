"""Errors: retries in place, policies, batches, timeouts, and sources that cannot settle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from millstream import (
    AckMessage,
    AckPolicy,
    Batch,
    DeadLetter,
    Exponential,
    Message,
    NackMessage,
    RejectMessage,
    Retry,
    Settlement,
    SetupError,
    SkipMessage,
)
from millstream.memory import MemoryBroker
from millstream.testing import TestBroker


def test_the_backoff_grows_to_its_cap_and_jitter_only_lengthens() -> None:
    exact = Exponential(1, cap=60, jitter=0)
    assert [exact(n) for n in (1, 2, 3, 7, 8, 10_000)] == [1, 2, 4, 60, 60, 60]
    for n in range(1, 20):
        assert exact(n) <= Exponential(1, cap=60, jitter=0.5)(n) <= exact(n) * 1.5


def test_a_retry_is_checked_when_it_is_written() -> None:
    with pytest.raises(SetupError, match="attempts"):
        Retry(attempts=0)
    with pytest.raises(SetupError, match="delay"):
        Retry(delay=-1)


async def test_a_retry_in_place_keeps_the_order() -> None:
    broker = MemoryBroker()
    got: list[tuple[int, int]] = []

    @broker.subscriber("in", durable="d", retry=Retry(attempts=3, delay=10, where="lane"))
    async def handler(value: int) -> None:
        got.append((value, len(got)))
        if value == 1 and len([v for v, _ in got if v == 1]) < 3:
            raise ValueError("not yet")

    test = TestBroker(broker)
    async with test as running:
        await running.publish(1, "in")
        await running.publish(2, "in")
        assert [v for v, _ in got] == [1]
        await test.clock.advance(21)
        assert [v for v, _ in got] == [1, 1, 1, 2]


async def test_a_plain_source_retries_only_if_asked() -> None:
    broker = MemoryBroker()
    plain: list[int] = []
    asked: list[int] = []

    @broker.subscriber("plain")
    async def never(value: int) -> None:
        plain.append(value)
        raise ValueError

    @broker.subscriber("asked", retry=Retry(attempts=2, delay=1), dead_letter="buried")
    async def twice(value: int) -> None:
        asked.append(value)
        raise ValueError("still")

    buried: list[Any] = []

    @broker.subscriber("buried")
    async def letters(value: int, message: Message[Any]) -> None:
        buried.append((value, message.headers["ms-error"], message.headers["ms-handler"]))

    test = TestBroker(broker)
    async with test as running:
        with pytest.raises(ValueError):
            await running.publish(1, "plain")
        await running.publish(2, "asked")
        await test.clock.advance(2)
    assert (plain, asked) == ([1], [2, 2])
    assert buried == [(2, "still", "twice")]


async def test_an_error_that_is_not_worth_a_retry_is_buried_at_once() -> None:
    broker = MemoryBroker()
    runs: list[int] = []

    @broker.subscriber("in", durable="d", retry=Retry(on=(OSError,)))
    async def handler(value: int) -> None:
        runs.append(value)
        raise ValueError

    async with TestBroker(broker) as running:
        with pytest.raises(ValueError):
            await running.publish(1, "in")
        assert broker.subscriptions[0].failing.dead_lettered == 1
    assert runs == [1]


@pytest.mark.parametrize(
    ("policy", "error", "settled"),
    [
        (AckPolicy.ACK, ValueError(), Settlement.ACK),
        (AckPolicy.REJECT_ON_ERROR, ValueError(), Settlement.REJECT),
        (AckPolicy.NACK_ON_ERROR, ValueError(), Settlement.NACK),
        (AckPolicy.RETRY, ValueError(), Settlement.NACK),
        (AckPolicy.MANUAL, ValueError(), None),
        (AckPolicy.ACK_FIRST, ValueError(), Settlement.ACK),
        (AckPolicy.RETRY, AckMessage(), Settlement.ACK),
        (AckPolicy.ACK, NackMessage(delay=5), Settlement.NACK),
        (AckPolicy.ACK, RejectMessage(), Settlement.REJECT),
        (AckPolicy.ACK, SkipMessage(), None),
        (AckPolicy.MANUAL, None, None),
        (AckPolicy.RETRY, None, Settlement.ACK),
    ],
)
async def test_the_policy_table(policy: AckPolicy, error: Any, settled: Any) -> None:
    broker = MemoryBroker()
    seen: list[Message[Any]] = []

    @broker.subscriber("in", durable="d", ack_policy=policy)
    async def handler(message: Message[Any]) -> None:
        seen.append(message)
        if error is not None:
            raise error

    async with TestBroker(broker) as running:
        with contextlib.suppress(ValueError):
            await running.publish(b"", "in")
        assert seen[0].settled is settled


async def test_a_settlement_by_hand_wins_over_the_policy() -> None:
    broker = MemoryBroker()
    answers: list[bool] = []

    @broker.subscriber("in", durable="d")
    async def handler(message: Message[Any]) -> None:
        answers.append(await message.reject())
        answers.append(await message.reject())
        answers.append(await message.ack())

    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
    assert answers == [True, True, False]


@pytest.mark.parametrize(
    ("then", "destination"), [(DeadLetter("own"), "own"), (Settlement.REJECT, None)]
)
def test_what_follows_the_last_attempt(then: Any, destination: str | None) -> None:
    broker = MemoryBroker()

    @broker.subscriber("in", durable="d", retry=Retry(then=then))
    async def handler() -> None: ...

    broker.compile()
    letter = broker.subscriptions[0].failing.dead_letter
    assert (letter.destination if letter else None) == destination


async def test_without_a_dead_letter_the_drop_is_an_error_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = MemoryBroker(dead_letter=None)

    @broker.subscriber("in", durable="d", retry=Retry(attempts=1))
    async def handler() -> None:
        raise ValueError("boom")

    async with TestBroker(broker) as running:
        with pytest.raises(ValueError):
            await running.publish(b"", "in")
    lines = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(lines) == 1
    assert "dropped" in lines[0].getMessage()
    assert "boom" in lines[0].getMessage()
    assert lines[0].exc_info is not None


async def test_a_bad_item_of_a_batch_is_buried_and_the_good_ones_are_handled() -> None:
    broker = MemoryBroker()
    got: list[list[int]] = []
    buried: list[Any] = []

    @broker.subscriber("in", durable="d", batch=Batch(3, wait=60))
    async def handler(values: list[int]) -> None:
        got.append(values)

    @broker.subscriber("in.dlq")
    async def letters(value: bytes, message: Message[Any]) -> None:
        buried.append((value, message.headers["ms-error-type"]))

    async with TestBroker(broker) as running:
        await running.publish(1, "in")
        await running.publish(b"bad", "in")
        with contextlib.suppress(ValueError):
            await running.publish(3, "in")
    assert got == [[1, 3]]
    assert buried == [(b"bad", "DecodeError")]


async def test_a_handler_that_runs_too_long_is_cancelled() -> None:
    broker = MemoryBroker()

    @broker.subscriber("in", handler_timeout=20)
    async def handler() -> None:
        await asyncio.Event().wait()

    test = TestBroker(broker)
    async with test as running:
        publishing = asyncio.ensure_future(running.publish(b"", "in"))
        await test.clock.advance(21)
        with pytest.raises(TimeoutError, match="longer than 20 s"):
            await publishing


def test_a_policy_that_the_source_cannot_keep() -> None:
    broker = MemoryBroker()
    broker.subscriber("in", ack_policy=AckPolicy.NACK_ON_ERROR)(lambda: None)
    with pytest.raises(SetupError, match="cannot acknowledge"):
        broker.compile()


async def test_filters_choose_the_handler() -> None:
    broker = MemoryBroker()
    got: list[Any] = []
    subscriber = broker.subscriber("in")

    @subscriber
    async def rest(value: Any) -> None:
        got.append(("rest", value))

    @subscriber(filter=lambda message: message.headers.get("kind") == "a")
    async def a(value: int) -> None:
        got.append(("a", value))

    async def is_b(message: Message[Any]) -> bool:
        return message.headers.get("kind") == "b"

    @subscriber(filter=is_b)
    async def b(value: str) -> None:
        got.append(("b", value))

    async with TestBroker(broker) as running:
        await running.publish(1, "in", headers={"kind": "a"})
        await running.publish("x", "in", headers={"kind": "b"})
        await running.publish([1], "in")
    assert got == [("a", 1), ("b", "x"), ("rest", [1])]


async def test_a_message_that_no_filter_takes_is_an_error() -> None:
    broker = MemoryBroker()
    subscriber = broker.subscriber("in")
    subscriber(filter=lambda message: False)(lambda: None)
    async with TestBroker(broker) as running:
        with pytest.raises(Exception, match="no handler of 'in' accepts"):
            await running.publish(b"", "in")


def test_two_handlers_that_take_everything() -> None:
    broker = MemoryBroker()
    subscriber = broker.subscriber("in")
    subscriber(lambda: None)
    subscriber(lambda: None)
    with pytest.raises(SetupError, match="take every message"):
        broker.compile()
