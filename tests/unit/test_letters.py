"""Dead letters and their replay, in memory; the ages that health tells."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream import (
    AckPolicy,
    Batch,
    Dedup,
    Message,
    Millstream,
    Retry,
    SetupError,
    VirtualClock,
)
from millstream.driver import Driver
from millstream.errors import NoLetters, NoResponders
from millstream.letters import UNFIT, Letter, many_lines, one_line, replay
from millstream.memory import MemoryBroker, MemoryPublish
from millstream.message import BatchMessage
from millstream.nats import NatsBroker
from millstream.nats.testing import TestNatsBroker
from tests.cost.fake import FakeDriver
from tests.helpers import eventually

ONCE = Retry(attempts=1)


@given(st.text(st.characters(exclude_categories=())))
def test_a_text_survives_being_a_header(text: str) -> None:
    line = one_line(text)
    assert not UNFIT.search(line)
    assert many_lines(line) == text


async def read(driver: Driver, address: str, *args: Any) -> list[Letter]:
    return [letter async for letter in driver.letters(address).read(*args)]


async def test_letters_in_memory() -> None:
    broker = MemoryBroker(logger=None)

    @broker.subscriber("in.{kind}", durable="d", retry=ONCE)
    async def handler(value: int) -> None:
        raise ValueError("a\nb")

    await broker.start()
    letters = broker.driver.letters("in.kind.dlq")
    with pytest.raises(NoLetters):
        await letters.count()
    assert await broker.driver.dead_letter(broker.subscriptions[0].spec, None, declare=False) == (
        "in.kind.dlq"
    )
    with pytest.raises(NoLetters):
        await letters.count()
    for n in range(3):
        await broker.publish(n, "in.x")
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 3)
    first, second, _ = await read(broker.driver, "in.kind.dlq")
    assert (first.handler, first.origin, first.error) == ("handler@in.{kind}", "in.x", "a\nb")
    assert [x.message.body for x in await read(broker.driver, "in.kind.dlq", 1, first.id)] == [b"1"]
    assert await letters.remove(second.id) and not await letters.remove(second.id)
    assert await letters.count() == 2
    await broker.stop()
    assert await FakeDriver().letters("in").remove("1") is False


async def test_others_skip_a_replay_whatever_their_kind() -> None:
    broker = MemoryBroker(logger=None)
    got: list[tuple[str, int]] = []
    works = False

    @broker.subscriber("in", durable="one", retry=ONCE)
    async def one(value: int) -> None:
        got.append(("one", value))
        if not works:
            raise ValueError

    @broker.subscriber("in")
    async def plain(value: int) -> None:
        got.append(("plain", value))

    @broker.subscriber("*", durable="two")
    async def two(value: int) -> None:
        got.append(("two", value))

    @broker.subscriber("in", durable="manual", ack_policy=AckPolicy.MANUAL)
    async def manual(value: int, message: Message[Any]) -> None:
        got.append(("manual", value))
        await message.ack()

    @broker.subscriber("in", durable="batch", batch=Batch(3, 0.05))
    async def batch(values: list[int], message: BatchMessage) -> None:
        assert len(values) == len(message.messages) == len(message.raw)
        got.extend(("batch", n) for n in values)

    @broker.subscriber("in", durable="lanes", concurrency=2, deduplicate=Dedup(lambda m: m.body))
    async def lanes(value: int) -> None:
        got.append(("lanes", value))

    names = ("batch", "lanes", "manual", "one", "plain", "two")
    await broker.start()
    await broker.publish(1, "in")
    await eventually(lambda: sorted(got) == [(name, 1) for name in names])
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    got.clear()
    works = True
    [letter] = await read(broker.driver, "in.dlq")
    assert await replay(broker.driver.letters("in.dlq"), letter)
    await broker.publish(2, "in")
    await broker.publish(3, "in")
    await eventually(lambda: all((name, 3) in got for name in names))
    assert [who for who, n in got if n == 1] == ["one"]
    assert await read(broker.driver, "in.dlq") == []
    await eventually(lambda: not any(s.unsettled for s in broker.driver.bus.stores.values()))  # type: ignore[attr-defined]
    await broker.stop()


async def test_a_batch_that_failed_gets_its_replay() -> None:
    broker = MemoryBroker(logger=None)
    got: list[list[int]] = []
    seen: list[str] = []

    @broker.subscriber("in", durable="b", batch=Batch(2, 0.05), retry=ONCE)
    async def batch(values: list[int], message: BatchMessage) -> None:
        got.append(values)
        seen.extend(h.get("ms-replays", "0") for h in message.batch_headers)
        if len(got) == 1:
            raise ValueError

    await broker.start()
    await broker.publish(1, "in")
    await broker.publish(2, "in")
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 2)
    for letter in await read(broker.driver, "in.dlq"):
        await replay(broker.driver.letters("in.dlq"), letter)
    await eventually(lambda: sorted(n for values in got for n in values) == [1, 1, 2, 2])
    assert sorted(seen) == ["0", "0", "1", "1"]
    await broker.stop()


async def test_what_fails_again_keeps_its_history() -> None:
    broker = MemoryBroker(logger=None)
    errors = iter([ValueError("first"), KeyError("second"), None])
    ids: list[str] = []

    @broker.subscriber("in", durable="d", retry=ONCE)
    async def handler(value: int, message: Message[Any]) -> None:
        ids.append(message.message_id)
        error = next(errors)
        if error is not None:
            raise error

    await broker.start()
    letters = broker.driver.letters("in.dlq")
    await broker.publish(1, "in", headers={"tenant": "acme", "ms-mine": "kept"})
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    [first] = await read(broker.driver, "in.dlq")
    await replay(letters, first)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 2)
    [second] = await read(broker.driver, "in.dlq")
    assert (second.error_type, second.replays, second.attempts) == ("KeyError", 1, 1)
    assert second.headers["tenant"] == "acme" and second.headers["ms-mine"] == "kept"
    assert "ms-replay-to" not in second.headers
    await replay(letters, second)
    await eventually(lambda: len(ids) == 3)
    assert len(set(ids)) == 1
    await broker.stop()


async def test_a_replay_that_nobody_would_get_stays() -> None:
    broker = MemoryBroker(logger=None)

    @broker.subscriber("in", retry=ONCE, dead_letter="dead")
    async def handler(value: int) -> None:
        raise ValueError

    await broker.start()
    await broker.publish(1, "in")
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    await broker.subscribers[0].stop()
    [letter] = await read(broker.driver, "dead")
    with pytest.raises(NoResponders):
        await replay(broker.driver.letters("dead"), letter)
    assert await broker.driver.letters("dead").count() == 1

    await broker.driver.publish(MemoryPublish(subject="dead"), b"x", None)
    bare = (await read(broker.driver, "dead"))[-1]
    assert (bare.handler, bare.attempts, bare.failed_at) == ("", 0, bare.stored)
    assert (datetime.now(UTC) - bare.stored).total_seconds() < 60
    with pytest.raises(SetupError, match="ms-origin"):
        await replay(broker.driver.letters("dead"), bare)
    await broker.stop()


async def test_a_replay_by_the_handlers_name_alone() -> None:
    """What others wrote tells no address."""
    broker = MemoryBroker(logger=None)
    got: list[str] = []

    @broker.subscriber("in")
    async def one(value: int) -> None:
        got.append("one")

    @broker.subscriber("in")
    async def two(value: int) -> None:
        got.append("two")

    await broker.start()
    await broker.publish(1, "in", headers={"ms-replay-to": "two"})
    await broker.publish(1, "in", headers={"ms-replay-to": "two@in"})
    await broker.publish(1, "in", headers={"ms-replay-to": "two@out"})
    await broker.publish(1, "in")
    await eventually(lambda: len(got) == 4)
    assert sorted(got) == ["one", "two", "two", "two"]
    await broker.stop()


async def test_replay_with_the_test_broker_of_nats() -> None:
    broker = NatsBroker()
    runs: list[int] = []

    @broker.subscriber("orders", stream="ORDERS", durable="d", retry=ONCE)
    async def order(body: int) -> None:
        runs.append(body)
        if len(runs) == 1:
            raise ValueError

    @broker.subscriber("orders", stream="ORDERS", durable="audit")
    async def audit(body: int) -> None:
        runs.append(-body)

    async with TestNatsBroker(broker) as running:
        with pytest.raises(ValueError):
            await running.publish(1, "orders", stream="ORDERS")
        letters = running.driver.letters("ORDERS.dlq")
        [letter] = [letter async for letter in letters.read()]
        assert letter.handler == "order@orders"
        await replay(letters, letter)
        await eventually(lambda: len(runs) == 3)
        assert sorted(runs) == [-1, 1, 1] and await letters.count() == 0


# Health


async def test_health_tells_what_is_open_and_what_waits() -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock, logger=None)
    app = Millstream(broker)
    gate = asyncio.Event()

    @broker.subscriber("in", durable="d", ack_deadline=8.0)
    async def handler(value: int) -> None:
        await gate.wait()

    await app.start()

    async def health() -> dict[str, Any]:
        found: dict[str, Any] = (await app.full_health())["brokers"][0]["subscriptions"][0]
        return found

    assert (await health())["oldest_unsettled"] is None
    assert (await health())["lag"] == 0
    for n in range(5):
        await broker.publish(n, "in")
    await clock.settle()
    assert (await health())["oldest_unsettled"] == 0.0
    assert (await health())["lag"] == 4
    await clock.advance(5)
    assert (await health())["oldest_unsettled"] == 5.0
    gate.set()
    await clock.settle()
    told = await health()
    assert (told["oldest_unsettled"], told["lag"], told["handled"]) == (None, 0, 5)
    await app.stop()


async def test_a_broker_that_does_not_answer_has_no_lag() -> None:
    broker = MemoryBroker(logger=None)
    app = Millstream(broker)

    @broker.subscriber("in", durable="d")
    async def handler(value: int) -> None: ...

    await app.start()

    async def hangs() -> int | None:
        return await asyncio.get_running_loop().create_future()

    broker.subscriptions[0].link.intake.lag = hangs  # type: ignore[method-assign, union-attr]
    told = await app.full_health(0.05)
    assert told["ready"] and told["brokers"][0]["subscriptions"][0]["lag"] is None
    await app.stop()
