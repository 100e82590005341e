"""Subscriptions and brokers that start, pause, stop, and are used at the wrong time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from millstream.driver import Capability
from millstream.errors import MessageTooLarge, NotConnected, StopConsume
from millstream.message import Message
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs


async def test_publishing_before_connect_says_what_to_do(bench: Bench) -> None:
    with pytest.raises(NotConnected, match="connect"):
        await bench.broker.publish(1, bench.address("early"))


async def test_a_message_over_the_maximum_is_refused_and_nothing_breaks(bench: Bench) -> None:
    got: list[bytes] = []

    @bench.subscriber(bench.address("big"))
    async def handler(body: bytes) -> None:
        got.append(body)

    await bench.start()
    with pytest.raises(MessageTooLarge, match=r"\d"):
        await bench.broker.publish(b"x" * bench.kind.too_large, bench.address("big"))
    await bench.broker.publish(b"small", bench.address("big"))
    await bench.until(lambda: got)
    assert got == [b"small"]


async def test_a_dynamic_subscriber_starts_and_stops_on_demand(bench: Bench) -> None:
    got: list[int] = []
    subscriber = bench.subscriber(bench.address("dynamic"), persistent=False)

    @subscriber
    async def handler(body: int) -> None:
        got.append(body)

    await bench.start()
    await subscriber.start()
    await bench.broker.publish(1, bench.address("dynamic"))
    await bench.until(lambda: got == [1])
    await subscriber.stop()
    await bench.broker.publish(2, bench.address("dynamic"))
    await bench.quiet()
    assert got == [1]
    await subscriber.start()
    await bench.broker.publish(3, bench.address("dynamic"))
    await bench.until(lambda: got[-1] == 3)
    assert got == ([1, 2, 3] if bench.acks else [1, 3])


async def test_a_subscriber_declared_after_the_start(bench: Bench) -> None:
    got: list[int] = []
    await bench.start()
    subscriber = bench.subscriber(bench.address("late"))

    @subscriber
    async def handler(body: int) -> None:
        got.append(body)

    await subscriber.start()
    await bench.broker.publish(1, bench.address("late"))
    await bench.until(lambda: got)
    await subscriber.stop()


async def test_stop_consume_ends_the_subscription(bench: Bench) -> None:
    got: list[int] = []

    @bench.subscriber(bench.address("until"))
    async def handler(body: int) -> None:
        got.append(body)
        if body == 2:
            raise StopConsume

    await bench.start()
    for i in (1, 2):
        await bench.broker.publish(i, bench.address("until"))
    await bench.until(lambda: got == [1, 2])
    [subscription] = bench.broker.subscriptions
    await bench.until(lambda: "stopped" in str(subscription.state).lower())
    await bench.broker.publish(3, bench.address("until"))
    await bench.quiet(0.5)
    assert got == [1, 2]


@needs(Capability.ACK)
async def test_stop_consume_takes_nothing_that_waits_already(bench: Bench) -> None:
    got: list[int] = []
    all_there = asyncio.Event()

    @bench.subscriber(bench.address("waiting"))
    async def handler(body: int) -> None:
        got.append(body)
        await all_there.wait()
        raise StopConsume

    await bench.start()
    for i in range(20):
        await bench.broker.publish(i, bench.address("waiting"), **bench.stored)
    await bench.until(lambda: got)
    all_there.set()
    [subscription] = bench.broker.subscriptions
    await bench.until(lambda: "stopped" in str(subscription.state).lower())
    assert got == [0]


async def test_a_paused_subscription_takes_nothing_until_it_is_resumed(bench: Bench) -> None:
    got: list[int] = []

    @bench.subscriber(bench.address("pausing"))
    async def handler(body: int) -> None:
        got.append(body)

    await bench.start()
    [subscription] = bench.broker.subscriptions
    await bench.broker.publish(1, bench.address("pausing"))
    await bench.until(lambda: got == [1])
    await subscription.pause()
    await bench.broker.publish(2, bench.address("pausing"))
    await bench.quiet()
    assert got == [1]
    await subscription.resume()
    await bench.broker.publish(3, bench.address("pausing"))
    await bench.until(lambda: got[-1] == 3)
    assert got == ([1, 2, 3] if bench.acks else [1, 3])


async def test_get_one_takes_a_single_message(bench: Bench) -> None:
    subscriber = bench.subscriber(bench.address("single"), persistent=False)
    await bench.start()
    getting = asyncio.create_task(subscriber.get_one(timeout=5.0))
    await bench.quiet(0.2)
    await bench.broker.publish({"n": 1}, bench.address("single"))
    message: Message[Any] | None = await bench.within(getting)
    assert message is not None
    assert await message.decode() == {"n": 1}
    await message.ack()
    begin = bench.now()
    assert await bench.within(subscriber.get_one(timeout=0.2)) is None
    assert bench.now() - begin >= 0.15


async def test_what_is_read_from_may_be_started_and_stopped(bench: Bench) -> None:
    subscriber = bench.subscriber(bench.address("begun"), persistent=False)
    await bench.start()
    for n in range(2):
        async with subscriber:
            await bench.broker.publish(n, bench.address("begun"))
            message: Message[Any] | None = await bench.within(subscriber.get_one(timeout=5.0))
            assert message is not None and await message.decode() == n
            await message.ack()
        assert not subscriber.running
        assert subscriber not in [s.subscriber for s in bench.broker.subscriptions]


async def test_async_for_takes_messages_one_by_one(bench: Bench) -> None:
    subscriber = bench.subscriber(bench.address("loop"), persistent=False)
    got: list[int] = []
    await bench.start()

    async def consume() -> None:
        async for message in subscriber:
            got.append(await message.decode())
            await message.ack()
            if len(got) == 3:
                break

    consuming = asyncio.create_task(consume())
    await bench.quiet(0.2)
    for i in range(3):
        await bench.broker.publish(i, bench.address("loop"))
    await bench.within(consuming)
    assert got == [0, 1, 2]


async def test_a_stopped_broker_finishes_what_runs(bench: Bench) -> None:
    begun: list[int] = []
    finished: list[int] = []
    gate = asyncio.Event()

    @bench.subscriber(bench.address("running"))
    async def handler(body: int) -> None:
        begun.append(body)
        await gate.wait()
        finished.append(body)

    await bench.start()
    await bench.broker.publish(1, bench.address("running"))
    await bench.until(lambda: begun)
    stopping = asyncio.create_task(bench.stop())
    await bench.quiet(0.1)
    assert not stopping.done()
    gate.set()
    await bench.within(stopping)
    assert finished == [1]


async def test_ping_and_health_tell_the_state(bench: Bench) -> None:
    @bench.subscriber(bench.address("healthy"))
    async def handler(body: int) -> None: ...

    assert not await bench.broker.ping(timeout=0.5)
    await bench.start()
    assert await bench.broker.ping(timeout=5.0)
    assert bench.broker.health()


@needs(Capability.ACK)
async def test_what_is_published_while_nobody_listens_is_kept(bench: Bench) -> None:
    got: list[int] = []
    address = bench.address("kept")
    first = bench.subscriber(address, group="g", persistent=False)

    @first
    async def handler(body: int) -> None:
        got.append(body)

    await bench.start()
    await first.start()
    await first.stop()
    for i in range(5):
        await bench.broker.publish(i, address)
    await first.start()
    await bench.until(lambda: len(got) == 5)
    assert got == [0, 1, 2, 3, 4]
