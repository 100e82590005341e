"""Errors: retries in place, policies, batches, timeouts, and sources that cannot settle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
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
from millstream.errors import EncodeError
from millstream.memory import MemoryBroker, MemoryBus
from millstream.testing import TestBroker
from tests.helpers import eventually


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


async def test_a_retry_in_place_ends_where_the_message_became_another_process_s() -> None:
    bus, attempts = MemoryBus(), list[tuple[str, int]]()
    brokers = {name: MemoryBroker(bus=bus) for name in ("first", "second")}
    retry = Retry(attempts=2, delay=0.1, where="lane")

    def declare(name: str, broker: MemoryBroker) -> None:
        @broker.subscriber("in", durable="d", ack_deadline=0.2, retry=retry)
        async def handler(value: int, message: Message[Any]) -> None:
            attempts.append((name, message.attempt))
            if message.attempt == 1:
                time.sleep(0.5)  # nobody pushes the deadline back meanwhile
            raise ValueError("never")

    for name, broker in brokers.items():
        declare(name, broker)
        await broker.start()
    await brokers["first"].publish(1, "in")
    await eventually(lambda: bus.records("in.dlq"))
    await asyncio.sleep(0.2)  # as long as another attempt of the first would take
    for broker in brokers.values():
        await broker.stop()
    assert [number for _, number in attempts] == [1, 2]
    assert len({name for name, _ in attempts}) == 2
    [letter] = bus.records("in.dlq")
    assert letter.headers["ms-attempts"] == "2"


async def test_what_waited_in_a_lane_past_its_deadline_is_not_begun() -> None:
    broker, begun, fetched = MemoryBroker(), list[tuple[int, int]](), asyncio.Event()

    @broker.subscriber("in", durable="d", ack_deadline=0.2, ordered_by=lambda message: "one")
    async def handler(value: int, message: Message[Any]) -> None:
        begun.append((value, message.attempt))
        if len(begun) == 1:
            await fetched.wait()
            time.sleep(0.5)  # nobody pushes a deadline back meanwhile
            await asyncio.sleep(0.01)

    await broker.start()
    for value in range(3):
        await broker.publish(value, "in")
    [subscription] = broker.subscriptions
    lanes = subscription._lanes
    await eventually(lambda: lanes is not None and lanes.waiting == 2)
    fetched.set()
    await eventually(lambda: len(begun) == 3)
    await broker.stop()
    assert begun == [(0, 1), (1, 2), (2, 2)]


async def test_a_message_that_its_handler_settled_is_not_tried_again_in_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker, attempts = MemoryBroker(), list[int]()

    @broker.subscriber("in", durable="d", retry=Retry(attempts=3, delay=0, where="lane"))
    async def handler(value: int, message: Message[Any]) -> None:
        attempts.append(message.attempt)
        await message.ack()
        raise ValueError("too late")

    await broker.start()
    await broker.publish(1, "in")
    await eventually(lambda: attempts)
    await broker.stop()
    assert attempts == [1]
    assert "failed after it was settled" in caplog.text


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


async def test_a_result_that_cannot_be_encoded_is_not_tried_again(caplog: Any) -> None:
    broker = MemoryBroker()
    runs: list[int] = []

    @broker.subscriber("in", durable="d")
    @broker.publisher("out")
    async def handler(value: int) -> Any:
        runs.append(value)
        return object()

    async with TestBroker(broker) as running:
        with pytest.raises(EncodeError):
            await running.publish(1, "in")
        assert runs == [1]
        assert await broker.driver.letters("in.dlq").count() == 1
    [line] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "object cannot be written as JSON" in line.getMessage() and line.exc_info is None
