"""The memory driver, by itself: what it hands to sinks and what becomes of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.ack import Settlement
from millstream.address import AddressSyntax
from millstream.clock import VirtualClock
from millstream.errors import (
    AddressError,
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishTimeout,
    RequestTimeout,
    SetupError,
)
from millstream.memory import (
    MemoryBroker,
    MemoryBus,
    MemoryDriver,
    MemoryPublish,
    MemorySubscription,
)
from millstream.memory.bus import Delivery, MemoryIntake
from tests.helpers import eventually


class Taker:
    """A sink that remembers, and holds on to a message while ``gate`` is closed."""

    def __init__(self) -> None:
        self.got: list[Delivery] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.intake: MemoryIntake
        self.lost: list[Exception] = []

    async def __call__(self, raw: Delivery) -> None:
        self.got.append(raw)
        await self.gate.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [d.record.body for d in self.got]

    async def ack(self, index: int = -1) -> None:
        await self.intake.settle(self.got[index], Settlement.ACK, None)

    async def nack(self, index: int = -1, delay: float | None = None) -> None:
        await self.intake.settle(self.got[index], Settlement.NACK, delay)


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.driver = MemoryDriver(clock=self.clock)

    async def take(self, subject: str, queue: str = "", **options: Any) -> Taker:
        taker = Taker()
        spec = MemorySubscription(subject, queue, **options)
        taker.intake = await self.driver.subscribe(spec, taker, taker.lost.append)
        return taker

    async def send(self, subject: str, body: bytes = b"x", **options: Any) -> None:
        headers = options.pop("headers", None)
        await self.driver.publish(MemoryPublish(None, subject, **options), body, headers)
        await self.clock.settle()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.driver.connect()
    yield world
    await world.driver.close()


# Plain subscriptions


async def test_each_subscription_gets_each_message_in_order(world: World) -> None:
    first, second = await world.take("orders.*"), await world.take("orders.>")
    for i in range(5):
        await world.send("orders.eu", b"%d" % i, headers={"n": str(i)})
    assert first.bodies == second.bodies == [b"0", b"1", b"2", b"3", b"4"]
    assert first.got[3].record.headers == {"n": "3"}
    assert first.got[3].record.destination == "orders.eu"
    assert [d.record.sequence for d in first.got] == [1, 2, 3, 4, 5]


async def test_only_matching_addresses_are_delivered(world: World) -> None:
    taker = await world.take("orders.{region}.created")
    await world.send("orders.eu.created")
    await world.send("orders.eu.deleted")
    await world.send("orders.created")
    assert len(taker.got) == 1


async def test_addresses_follow_the_syntax_of_the_driver() -> None:
    class Mqtt(MemoryDriver):
        syntax = AddressSyntax(separator="/", one="+", rest="#", rest_empty=True)

    world = World()
    world.driver = Mqtt(clock=world.clock)
    await world.driver.connect()
    taker = await world.take("house/+/temperature/#")
    await world.send("house/kitchen/temperature")
    await world.send("house/kitchen/temperature/oven")
    await world.send("house/kitchen/light")
    assert len(taker.got) == 2
    await world.driver.close()


async def test_members_of_a_queue_share_fairly(world: World) -> None:
    members = [await world.take("work", "q") for _ in range(3)]
    other = await world.take("work", "other")
    for i in range(9):
        await world.send("work", b"%d" % i)
    assert [len(m.got) for m in members] == [3, 3, 3]
    assert len(other.got) == 9


async def test_a_busy_member_gets_less(world: World) -> None:
    busy, free = await world.take("work", "q"), await world.take("work", "q")
    busy.gate.clear()
    for i in range(10):
        await world.send("work", b"%d" % i)
    assert len(busy.got) == 1
    assert len(free.got) >= 8


async def test_plain_messages_are_not_kept(world: World) -> None:
    await world.send("orders", b"early")
    taker = await world.take("orders")
    await world.send("orders", b"now")
    assert taker.bodies == [b"now"]


async def test_a_sink_that_waits_holds_the_next_message_back(world: World) -> None:
    taker = await world.take("orders")
    taker.gate.clear()
    await world.send("orders", b"1")
    await world.send("orders", b"2")
    assert taker.bodies == [b"1"]
    taker.gate.set()
    await eventually(lambda: taker.bodies == [b"1", b"2"])


async def test_pause_gives_a_plain_sink_what_arrived_first(world: World) -> None:
    taker = await world.take("orders")
    taker.gate.clear()
    for i in range(3):
        await world.send("orders", b"%d" % i)
    pausing = asyncio.create_task(taker.intake.pause())
    await world.clock.settle()
    assert not pausing.done()
    await world.send("orders", b"late")
    taker.gate.set()
    assert await pausing == 0
    assert taker.bodies == [b"0", b"1", b"2"]


async def test_close_cancels_the_sink(world: World) -> None:
    taker = await world.take("orders")
    taker.gate.clear()
    await world.send("orders", b"1")
    await world.send("orders", b"2")
    await taker.intake.close()
    taker.gate.set()
    await world.clock.settle()
    assert taker.bodies == [b"1"]


async def test_a_publisher_waits_for_room_and_says_whom_it_waits_for() -> None:
    world = World()
    world.driver = MemoryDriver(MemoryBus(backlog=2), clock=world.clock)
    await world.driver.connect()
    taker = await world.take("orders")
    taker.gate.clear()
    for i in range(3):
        await world.send("orders", b"%d" % i)
    waiting = asyncio.create_task(world.send("orders", b"3", timeout=10.0))
    await world.clock.advance(9.0)
    assert not waiting.done()
    taker.gate.set()
    await waiting
    await eventually(lambda: len(taker.got) == 4)

    taker.gate.clear()
    for i in range(3):
        await world.send("orders", b"%d" % i)
    waiting = asyncio.create_task(world.send("orders", b"3", timeout=10.0))
    await world.clock.advance(10.0)
    with pytest.raises(PublishTimeout, match="wait for 'orders'"):
        await waiting
    await world.driver.close()


async def test_a_failing_sink_is_reported_as_lost(world: World) -> None:
    lost: list[Exception] = []

    async def sink(raw: Any) -> None:
        raise ZeroDivisionError

    await world.driver.subscribe(MemorySubscription("orders"), sink, lost.append)
    await world.send("orders")
    assert [type(e) for e in lost] == [ZeroDivisionError]
    await world.send("orders")


# Durable subscriptions


async def test_a_message_waits_for_its_durable(world: World) -> None:
    spec = MemorySubscription("orders", durable="d")
    await world.driver.declare([spec])
    await world.send("orders", b"early")
    taker = await world.take("orders", durable="d")
    await world.send("orders", b"now")
    assert taker.bodies == [b"early", b"now"]


async def test_an_acknowledged_message_is_gone(world: World) -> None:
    taker = await world.take("orders", durable="d")
    await world.send("orders")
    await taker.ack()
    await world.clock.advance(120.0)
    assert len(taker.got) == 1
    assert not world.driver.bus.stores["d"].unsettled


async def test_an_unsettled_message_comes_again_after_its_deadline(world: World) -> None:
    taker = await world.take("orders", durable="d", ack_deadline=10.0)
    await world.send("orders")
    await world.clock.advance(9.9)
    assert len(taker.got) == 1
    await world.clock.advance(0.2)
    assert [d.count for d in taker.got] == [1, 2]


async def test_touch_pushes_the_deadline_back(world: World) -> None:
    taker = await world.take("orders", durable="d", ack_deadline=10.0)
    await world.send("orders")
    await world.clock.advance(8.0)
    await taker.intake.touch(taker.got[0])
    await world.clock.advance(8.0)
    assert len(taker.got) == 1
    await world.clock.advance(2.0)
    assert len(taker.got) == 2


async def test_an_ack_after_the_deadline_still_counts(world: World) -> None:
    taker = await world.take("orders", durable="d", ack_deadline=10.0)
    taker.gate.clear()
    await world.send("orders")
    await world.clock.advance(11.0)
    await taker.ack(0)
    taker.gate.set()
    await world.clock.advance(60.0)
    assert len(taker.got) == 1


async def test_nack_comes_again_at_once_or_after_its_delay(world: World) -> None:
    taker = await world.take("orders", durable="d")
    await world.send("orders")
    await taker.nack()
    await world.clock.settle()
    assert [d.count for d in taker.got] == [1, 2]
    await taker.nack(delay=5.0)
    await world.clock.advance(4.9)
    assert len(taker.got) == 2
    await world.clock.advance(0.2)
    assert taker.got[-1].count == 3


async def test_a_second_nack_of_one_delivery_is_ignored(world: World) -> None:
    taker = await world.take("orders", durable="d")
    await world.send("orders")
    await taker.nack(0)
    await world.clock.settle()
    await taker.nack(0)
    await world.clock.settle()
    assert len(taker.got) == 2


async def test_a_rejected_message_is_gone(world: World) -> None:
    taker = await world.take("orders", durable="d")
    await world.send("orders")
    await taker.intake.settle(taker.got[0], Settlement.REJECT, None)
    await world.clock.advance(120.0)
    assert len(taker.got) == 1


async def test_a_redelivery_comes_before_what_waits(world: World) -> None:
    taker = await world.take("orders", durable="d")
    taker.gate.clear()
    for i in range(6):
        await world.send("orders", b"%d" % i)
    await taker.nack(0)
    taker.gate.set()
    await world.clock.settle()
    again = taker.bodies[1:].index(b"0") + 1
    assert again < 5
    assert sorted(taker.bodies) == [b"0", b"0", b"1", b"2", b"3", b"4", b"5"]


async def test_members_of_a_durable_share_fairly(world: World) -> None:
    members = [await world.take("work", durable="d") for _ in range(3)]
    for i in range(9):
        await world.send("work", b"%d" % i)
    assert [len(m.got) for m in members] == [3, 3, 3]
    everything = Counter(body for m in members for body in m.bodies)
    assert set(everything.values()) == {1}


async def test_two_durables_each_get_everything(world: World) -> None:
    one, two = await world.take("work", durable="a"), await world.take("work", durable="b")
    await world.send("work")
    assert len(one.got) == len(two.got) == 1


async def test_a_member_fetches_no_more_than_its_prefetch(world: World) -> None:
    taker = await world.take("work", durable="d")
    taker.gate.clear()
    for i in range(10):
        await world.send("work", b"%d" % i)
    assert taker.bodies == [b"0"]
    assert len(taker.intake.waiting) == taker.intake.spec.prefetch == 2
    assert len(world.driver.bus.stores["d"].ready) == 7


async def test_pause_hands_back_what_was_fetched(world: World) -> None:
    taker = await world.take("work", durable="d")
    taker.gate.clear()
    for i in range(6):
        await world.send("work", b"%d" % i)
    assert await taker.intake.pause() == 2
    second = await world.take("work", durable="d")
    await world.clock.settle()
    assert second.bodies == [b"1", b"2", b"3", b"4", b"5"]
    assert {d.count for d in second.got} == {1}
    taker.gate.set()
    await world.clock.settle()
    assert taker.bodies == [b"0"]
    await taker.ack()


async def test_what_a_closed_consumer_left_unsettled_goes_to_the_next(world: World) -> None:
    taker = await world.take("work", durable="d", ack_deadline=10.0)
    await world.send("work", b"1")
    await taker.intake.close()
    second = await world.take("work", durable="d", ack_deadline=10.0)
    assert not second.got
    await world.clock.advance(10.0)
    assert second.bodies == [b"1"]
    assert second.got[0].count == 2


# Requests, dead letters, errors


async def test_a_request_gets_the_first_reply(world: World) -> None:
    async def sink(raw: Delivery) -> None:
        for answer in (b"one", b"two"):
            await world.driver.publish(MemoryPublish(None, raw.record.reply_to), answer, {"a": "b"})

    await world.driver.subscribe(MemorySubscription("ask"), sink, lambda error: None)
    reply = await world.driver.request(MemoryPublish(None, "ask"), b"?", None, 1.0)
    assert (reply.record.body, reply.record.headers) == (b"one", {"a": "b"})


async def test_a_request_to_nobody_fails_at_once(world: World) -> None:
    with pytest.raises(NoResponders, match="'ask'"):
        await world.driver.request(MemoryPublish(None, "ask"), b"?", None, 1.0)


async def test_a_request_without_an_answer_ends_in_time(world: World) -> None:
    await world.take("ask")
    asking = asyncio.create_task(world.driver.request(MemoryPublish(None, "ask"), b"?", None, 2.0))
    await world.clock.advance(1.9)
    assert not asking.done()
    await world.clock.advance(0.2)
    with pytest.raises(RequestTimeout, match="within 2 s"):
        await asking
    assert not world.driver.bus.inboxes


async def test_dead_letters_are_kept_and_can_be_consumed_later(world: World) -> None:
    spec = MemorySubscription("orders.{region}", durable="d")
    address = await world.driver.dead_letter(spec, None)
    assert address == "orders.region.dlq"
    await world.send(address, b"poison", headers={"ms-error": "no"})
    assert [r.body for r in world.driver.bus.records(address)] == [b"poison"]
    taker = await world.take(address, durable="dead")
    await world.clock.settle()
    assert taker.bodies == [b"poison"]
    assert await world.driver.dead_letter(spec, "trash") == "trash"


async def test_kept_dead_letters_are_bounded() -> None:
    world = World()
    world.driver = MemoryDriver(MemoryBus(kept=3), clock=world.clock)
    await world.driver.connect()
    address = await world.driver.dead_letter(MemorySubscription("a", durable="d"), None)
    for i in range(5):
        await world.send(address, b"%d" % i)
    assert [r.body for r in world.driver.bus.records(address)] == [b"2", b"3", b"4"]


async def test_publishing_without_a_connection_says_so() -> None:
    driver = MemoryDriver()
    with pytest.raises(NotConnected, match="not connected"):
        await driver.publish(MemoryPublish(None, "a"), b"", None)
    assert not await driver.ping(1.0)


@pytest.mark.parametrize("subject", ["", "a.*", "a.>"])
async def test_a_message_cannot_be_sent_to_a_pattern(world: World, subject: str) -> None:
    with pytest.raises(AddressError):
        await world.send(subject)


async def test_a_message_over_the_maximum_is_refused(world: World) -> None:
    world.driver.max_payload = 10
    await world.send("a", b"0123456789")
    with pytest.raises(MessageTooLarge, match="11 bytes to 'a': the broker takes 10"):
        await world.send("a", b"0123456789x")


async def test_drivers_share_nothing_but_a_common_bus() -> None:
    bus = MemoryBus()
    worlds = [World() for _ in range(3)]
    worlds[0].driver, worlds[1].driver = MemoryDriver(bus), MemoryDriver(bus)
    for world in worlds:
        await world.driver.connect()
    takers = [await world.take("a") for world in worlds]
    await worlds[0].send("a")
    assert [len(t.got) for t in takers] == [1, 1, 0]
    for world in worlds:
        await world.driver.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"durable": ""}, "has no name"),
        ({"durable": "d", "queue": "q"}, "exclude each other"),
        ({"durable": "d", "ack_deadline": 0.0}, "ack_deadline=0.0"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        MemorySubscription("a", **options).check()


async def test_a_subscription_that_was_lost_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    got: list[int] = []

    @broker.subscriber("orders", durable="d")
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    [intake] = broker.driver._intakes  # type: ignore[attr-defined]
    intake.lost(ConnectionError("gone"))
    await broker.publish(1, "orders")
    await clock.advance(5.0)
    await broker.publish(2, "orders")
    await clock.settle()
    assert got == [1, 2]
    assert "subscribing anew" in caplog.text
    await broker.stop()
