"""Idempotent handlers, circuit breakers, crashed workers, batch outcomes, the watchdog."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from millstream import (
    BaseMiddleware,
    Batch,
    BatchFailed,
    Breaker,
    Dedup,
    MemoryDedup,
    Message,
    Retry,
    SetupError,
    SkipMessage,
    SqliteDedup,
    VirtualClock,
)
from millstream.dedup import DedupStore
from millstream.memory import MemoryBroker
from millstream.message import BatchMessage
from millstream.testing import TestBroker
from tests.helpers import eventually

# Deduplication


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DedupStore]:
    if request.param == "memory":
        yield MemoryDedup()
        return
    kept = SqliteDedup(str(tmp_path / "keys.db"))
    yield kept
    kept.close()


async def test_a_key_is_claimed_done_and_released(store: DedupStore) -> None:
    assert await store.claim("a", 60) == "mine"
    assert await store.claim("a", 60) == "busy"
    await store.release("a")
    assert await store.claim("a", 60) == "mine"
    await store.done("a", 60)
    assert await store.claim("a", 60) == "done"
    assert await store.claim("b", 0.0) == "mine"
    assert await store.claim("b", 60) == "mine"  # the lease was over
    await store.done("c", 0.0)
    assert await store.claim("c", 60) == "mine"  # forgotten


async def test_sqlite_keys_survive_and_are_shared(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.db")
    one, two = SqliteDedup(path), SqliteDedup(path)
    await one.done("a", 60)
    assert await two.claim("a", 60) == "done"
    wins = await asyncio.gather(*(s.claim("b", 60) for s in (one, two) * 5))
    assert sorted(wins) == ["busy"] * 9 + ["mine"]
    one.close()
    two.close()
    three = SqliteDedup(path)
    assert await three.claim("a", 60) == "done"
    three.close()


@pytest.mark.parametrize("limit", [5, 100])
async def test_the_memory_store_is_bounded(limit: int) -> None:
    clock = VirtualClock()
    store = MemoryDedup(clock, limit=limit)
    for n in range(1000):
        await store.done(str(n), 60)
    assert await store.claim("999", 60) == "done"
    assert await store.claim(str(1000 - limit), 60) == "done"
    assert await store.claim(str(999 - limit), 60) == "mine"  # the oldest are forgotten


async def test_a_message_that_comes_again_is_not_handled_again() -> None:
    broker = MemoryBroker()
    runs: list[Any] = []
    published: list[Any] = []

    @broker.subscriber("in", durable="d", deduplicate=Dedup(key="id"), retry=Retry(delay=1))
    @broker.publisher("out")
    async def handler(value: int, message: Message[Any]) -> int:
        runs.append((message.headers["id"], value))
        if value == 13 and len(runs) < 3:
            raise ValueError("first try")
        return value

    @broker.subscriber("out")
    async def out(value: int) -> None:
        published.append(value)

    test = TestBroker(broker)
    async with test as running:
        await running.publish(1, "in", headers={"id": "a"})
        await running.publish(2, "in", headers={"id": "a"})
        with pytest.raises(ValueError):
            await running.publish(13, "in", headers={"id": "b"})
        await test.clock.advance(2)
        await running.publish(13, "in", headers={"id": "b"})
    assert runs == [("a", 1), ("b", 13), ("b", 13)]
    assert published == [1, 13]


async def test_each_message_of_a_batch_has_a_key_of_its_own() -> None:
    broker = MemoryBroker()
    runs: list[list[int]] = []

    @broker.subscriber(
        "in",
        durable="d",
        batch=Batch(size=3, wait=1),
        deduplicate=Dedup(key="id"),
        retry=Retry(delay=1),
    )
    async def handler(values: list[int]) -> None:
        runs.append(values)
        if 2 in values and len(runs) == 1:
            raise BatchFailed({values.index(2): ValueError("not yet")})

    test = TestBroker(broker)
    async with test as running:
        for value in (1, 2, 3):
            await running.publish(value, "in", headers={"id": str(value)})
        await test.clock.advance(0)
        assert runs == [[1, 2, 3]]
        await running.publish(1, "in", headers={"id": "1"})  # done before
        await running.publish(4, "in", headers={"id": "4"})
        await running.publish(4, "in", headers={"id": "4"})  # its twin stands beside it
        await test.clock.advance(10)
        assert sorted(value for values in runs[1:] for value in values) == [2, 4]
        await running.publish(2, "in", headers={"id": "2"})
        await test.clock.advance(10)
        assert sum(values.count(2) for values in runs) == 2


async def test_a_twin_waits_until_the_first_is_decided() -> None:
    broker = MemoryBroker()
    gate = asyncio.Event()
    runs: list[int] = []

    @broker.subscriber("in", durable="d", concurrency=2, deduplicate=Dedup(lambda m: "same"))
    async def handler(value: int) -> None:
        runs.append(value)
        if value == 1:
            await gate.wait()
            raise ValueError("the first fails")

    await broker.start()
    await broker.publish(1, "in")
    await eventually(lambda: runs == [1])
    await broker.publish(2, "in")
    await eventually(lambda: broker.subscriptions[0].in_flight == 1)
    assert runs == [1]
    gate.set()
    await eventually(lambda: 2 in runs or runs.count(1) == 2)
    await broker.stop()


async def test_a_cancellation_that_a_handler_hides_ends_its_retries() -> None:
    broker = MemoryBroker(graceful_timeout=0.05)
    runs = 0

    @broker.subscriber("in", durable="d", retry=Retry(attempts=100, delay=0.01, where="lane"))
    async def handler(value: int) -> None:
        nonlocal runs
        runs += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("hidden") from None

    await broker.start()
    await broker.publish(1, "in")
    await eventually(lambda: runs == 1)
    await broker.stop()
    assert runs == 1
    assert len(asyncio.all_tasks()) == 1


# Circuit breaker


async def test_the_circuit_opens_probes_and_closes() -> None:
    broker = MemoryBroker()
    up = False
    runs: list[int] = []
    retry = Retry(attempts=1000, delay=0.1)

    @broker.subscriber(
        "in", durable="d", concurrency=4, retry=retry, breaker=Breaker(minimum=4, pause=10)
    )
    async def handler(value: int) -> None:
        runs.append(value)
        if not up:
            raise ConnectionError("down")

    test = TestBroker(broker)
    async with test as running:
        for n in range(10):
            with suppress(ConnectionError):
                await running.publish(n, "in")
        await test.clock.advance(1)
        (subscription,) = broker.subscriptions
        assert subscription.state.value == "paused"
        assert "circuit open" in subscription.health()["state"]
        tried = len(runs)
        await test.clock.advance(5)
        assert len(runs) == tried
        await test.clock.advance(6)  # one probe, which fails
        assert len(runs) == tried + 1
        assert subscription.state.value == "paused"
        up = True
        await test.clock.advance(60)
        assert subscription.state.value == "running"
        assert set(runs[tried + 1 :]) == set(range(10))
        assert subscription.failing.dead_lettered == 0


async def test_results_that_cannot_be_published_open_the_circuit() -> None:
    broker = MemoryBroker()
    up = False

    class Away(BaseMiddleware):
        async def publish_scope(self, call_next: Any, command: Any) -> Any:
            if command.destination == "out" and not up:
                raise ConnectionError("the other broker is away")
            return await call_next(command)

    @broker.subscriber(
        "in",
        durable="d",
        retry=Retry(attempts=1000, delay=0.1),
        breaker=Breaker(minimum=4, pause=10),
    )
    @broker.publisher("out", middlewares=[Away])
    async def handler(value: int) -> int:
        return value

    got: list[int] = []

    @broker.subscriber("out", durable="results")
    async def result(value: int) -> None:
        got.append(value)

    test = TestBroker(broker)
    async with test as running:
        for n in range(10):
            with suppress(ConnectionError):
                await running.publish(n, "in")
        await test.clock.advance(1)
        subscription = broker.subscriptions[0]
        assert subscription.state.value == "paused" and not got
        up = True
        await test.clock.advance(60)
        assert subscription.state.value == "running"
        assert sorted(got) == list(range(10))


async def test_a_subscription_resumed_early_has_its_circuit_probed_at_once() -> None:
    broker = MemoryBroker()
    runs: list[int] = []
    up = False

    @broker.subscriber(
        "in",
        durable="d",
        retry=Retry(attempts=1000, delay=0.1),
        breaker=Breaker(minimum=4, pause=100),
    )
    async def handler(value: int) -> None:
        runs.append(value)
        if not up:
            raise ConnectionError("down")

    test = TestBroker(broker)
    async with test as running:
        for n in range(10):
            with suppress(ConnectionError):
                await running.publish(n, "in")
        await test.clock.advance(1)
        (subscription,) = broker.subscriptions
        tried = len(runs)
        await subscription.resume()  # too early: one probe, and twice the pause from now on
        await test.clock.advance(150)
        assert len(runs) == tried + 1
        assert subscription.state.value == "paused"
        up = True
        await subscription.resume()
        await test.clock.advance(1)
        assert subscription.state.value == "running"
        assert len(runs) > tried + 1
        await test.clock.advance(200)  # some were put off when it opened
        assert set(runs[tried + 1 :]) == set(range(10))
        assert subscription.failing.dead_lettered == 0


def test_a_breaker_needs_a_source_that_keeps_messages() -> None:
    broker = MemoryBroker()
    broker.subscriber("in", breaker=Breaker())(lambda: None)
    with pytest.raises(SetupError, match="breaker"):
        broker.compile()
    with pytest.raises(SetupError, match="share"):
        Breaker(share=2)
    with pytest.raises(SetupError, match="pause"):
        Breaker(pause=0)


# Workers that die


async def test_a_message_that_took_its_workers_down_is_buried_before_it_runs_again() -> None:
    broker = MemoryBroker()
    runs: list[int] = []
    buried: list[Any] = []

    @broker.subscriber("in", durable="d", retry=Retry(attempts=2))
    async def handler(value: int) -> None:
        runs.append(value)
        raise SkipMessage  # for the broker the same as a process that died

    @broker.subscriber("in.dlq")
    async def letters(value: int, message: Message[Any]) -> None:
        buried.append((value, message.headers["ms-error-type"], message.headers["ms-attempts"]))

    test = TestBroker(broker)
    async with test as running:
        await running.publish(1, "in")
        await test.clock.advance(100)
    assert runs == [1, 1]
    assert buried == [(1, "CrashedWorker", "2")]


# Batches


async def test_each_message_of_a_batch_has_its_own_outcome() -> None:
    broker = MemoryBroker()
    got: list[list[int]] = []
    buried: list[int] = []

    @broker.subscriber("in", durable="d", batch=Batch(3, wait=5), retry=Retry(attempts=2, delay=1))
    async def handler(values: list[int], batch: BatchMessage) -> None:
        got.append(values)
        if len(values) > 1:
            await batch.ack(0)
        raise BatchFailed({i: ValueError(str(v)) for i, v in enumerate(values) if v == 2})

    @broker.subscriber("in.dlq")
    async def letters(value: int) -> None:
        buried.append(value)

    test = TestBroker(broker)
    async with test as running:
        for n in (1, 2, 3):
            with suppress(ValueError):
                await running.publish(n, "in")
        await test.clock.advance(20)
    assert got == [[1, 2, 3], [2]]
    assert buried == [2]


# The event loop


async def test_the_watchdog_names_the_handler_that_blocks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = MemoryBroker(watchdog=0.05)

    @broker.subscriber("in")
    async def rude() -> None:
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            pass

    with caplog.at_level(logging.WARNING):
        await broker.start()
        await broker.publish(b"", "in")
        await eventually(lambda: broker.subscriptions[0].handled == 1)
        await broker.stop()
    (line,) = [r.getMessage() for r in caplog.records if "blocked" in r.getMessage()]
    assert "rude" in line
    assert "test_safety.py" in line
