"""Streams: groups, what a consumer left behind, trimming, healing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream import AckPolicy
from millstream.driver import Batch
from millstream.errors import NackMessage, SetupError
from millstream.redis import RedisBroker, RedisStreamMessage, StreamSub
from millstream.retry import Retry
from tests.helpers import eventually


async def pending(client: Redis, name: str, group: str = "g") -> int:
    return int((await client.xpending(name, group))["pending"])


async def test_a_group_begins_with_what_is_there_and_acknowledges(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []
    await client.xadd(name, {"__data__": "1"})

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int, message: RedisStreamMessage) -> None:
        got.append(body)
        assert message.destination == f"stream://{name}" and message.get_delivery_count() == 1
        assert message.message_id == message.raw.id.decode() and message.timestamp is not None

    await broker.start()
    id = await broker.publish(2, stream=name)
    await eventually(lambda: got == [1, 2])
    assert (await client.xrange(name, id, id))[0][1] == {b"__data__": b"2"}
    await eventually(lambda: _none(pending(client, name)))
    assert await broker.subscriptions[0]._intake.lag() == 0  # type: ignore[union-attr]


async def _none(count: Any) -> bool:
    return await count == 0


@pytest.mark.parametrize(("last_id", "wanted"), [("$", [2]), ("0", [1, 2]), (None, [1, 2])])
async def test_where_a_new_group_begins(
    broker: RedisBroker, client: Redis, name: str, last_id: str | None, wanted: list[int]
) -> None:
    got: list[int] = []
    await client.xadd(name, {"__data__": "1"})

    @broker.subscriber(stream=StreamSub(name, group="g", last_id=last_id))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(2, stream=name)
    await eventually(lambda: got == wanted)


async def test_without_a_group_each_reader_gets_what_is_new(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    new: list[int] = []
    everything: list[int] = []
    await client.xadd(name, {"__data__": "1"})

    @broker.subscriber(stream=name)
    async def reads_new(body: int) -> None:
        new.append(body)

    @broker.subscriber(stream=StreamSub(name, last_id="0"))
    async def reads_all(body: int) -> None:
        everything.append(body)

    await broker.start()
    await broker.publish(2, stream=name)
    await eventually(lambda: (new, everything) == ([2], [1, 2]))


async def test_no_ack_is_at_most_once(broker: RedisBroker, client: Redis, name: str) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g", no_ack=True))
    async def handler(body: int) -> None:
        got.append(body)
        raise ValueError("is not tried again")

    assert broker.subscribers[0].spec.guarantee == "at-most-once"
    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: got == [1])
    assert await pending(client, name) == 0


async def test_the_delay_of_a_retry_and_its_count_survive_the_process(
    redis: Any, client: Redis, name: str
) -> None:
    first, second = RedisBroker(redis.url), RedisBroker(redis.url)
    attempts: list[tuple[int, float]] = []
    loop = asyncio.get_running_loop()
    sub = StreamSub(name, group="g")

    @first.subscriber(stream=sub, retry=Retry(delay=1.5))
    async def fails(body: int, message: RedisStreamMessage) -> None:
        attempts.append((message.attempt, loop.time()))
        raise ValueError("no stock")

    @second.subscriber(stream=sub)
    async def works(body: int, message: RedisStreamMessage) -> None:
        attempts.append((message.attempt, loop.time()))

    await first.start()
    await first.publish(1, stream=name)
    await eventually(lambda: attempts)
    await eventually(lambda: first.subscriptions[0].in_flight == 0)
    await first.stop()
    await second.start()
    await eventually(lambda: len(attempts) == 2)
    assert [count for count, _ in attempts] == [1, 2]
    assert attempts[1][1] - attempts[0][1] >= 1.4
    await second.stop()
    assert await pending(client, name) == 0


async def test_what_a_dead_process_left_is_taken_over_and_a_live_one_keeps_its_own(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    """The owner's signs of life count, and not for how long an entry has been idle."""
    got: list[tuple[int, int]] = []
    gate = asyncio.Event()
    sub = StreamSub(name, group="g", ack_wait=1.0)
    await client.xgroup_create(name, "g", mkstream=True)
    await client.xadd(name, {"__data__": "1"})
    # A member that said that it lives, took an entry and fell silent.
    await client.xreadgroup("g", "dead-1", {name: ">"})
    await client.zadd(f"{{{name}}}:ms:g:alive", {"dead-1": 1000.0})

    @broker.subscriber(stream=sub, concurrency=2)
    async def handler(body: int, message: RedisStreamMessage) -> None:
        got.append((body, message.delivery_count))
        if body == 2:
            await gate.wait()

    await broker.start()
    await eventually(lambda: got == [(1, 2)])
    await broker.publish(2, stream=name)
    await eventually(lambda: len(got) == 2)
    await asyncio.sleep(3.0)  # three times as long as a dead member would keep it
    assert got == [(1, 2), (2, 1)]
    gate.set()
    await eventually(lambda: _none(pending(client, name)))
    names = [c["name"] for c in await client.xinfo_consumers(name, "g")]
    assert b"dead-1" not in names


async def test_entries_of_a_foreign_consumer_are_taken_over_by_their_age(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []
    await client.xgroup_create(name, "g", mkstream=True)
    await client.xadd(name, {"__data__": "1"})
    await client.xreadgroup("g", "somebody", {name: ">"})

    @broker.subscriber(stream=StreamSub(name, group="g", claim_min_idle_time=1500))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await asyncio.sleep(0.7)
    assert not got
    await eventually(lambda: got == [1])


async def test_a_claiming_subscriber_reads_nothing_new(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []
    await client.xgroup_create(name, "g", mkstream=True)
    await client.xadd(name, {"__data__": "1"})
    await client.xreadgroup("g", "somebody", {name: ">"})

    @broker.subscriber(stream=StreamSub(name, group="g", min_idle_time=100))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(2, stream=name)
    await eventually(lambda: got == [1])
    await asyncio.sleep(1.5)
    assert got == [1]


async def test_acknowledgements_leave_together(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    for i in range(1000):
        await client.xadd(name, {"__data__": str(i)})
    before = (await client.info("commandstats")).get("cmdstat_xack", {"calls": 0})["calls"]
    await broker.start()
    await eventually(lambda: len(got) == 1000, 10)
    await eventually(lambda: _none(pending(client, name)))
    assert got == list(range(1000))
    after = (await client.info("commandstats"))["cmdstat_xack"]["calls"]
    assert after - before < 60


async def test_a_batch_is_read_and_settled_as_one(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[list[int]] = []

    @broker.subscriber(stream=StreamSub(name, group="g", batch=True, max_records=50))
    async def handler(bodies: list[int]) -> None:
        got.append(bodies)

    await broker.start()
    assert broker.subscriptions[0].spec.batch == Batch(50, 0.1)
    await broker.publish_batch(*range(100), stream=name)
    await eventually(lambda: sum(map(len, got)) == 100)
    assert len(got) <= 4
    await eventually(lambda: _none(pending(client, name)))


async def test_trimming(broker: RedisBroker, client: Redis, name: str) -> None:
    await broker.start()
    for i in range(500):
        await broker.publish(i, stream=StreamSub(name, maxlen=100))
    assert 100 <= await client.xlen(name) < 300
    for i in range(300):
        await broker.publish(i, stream=name, maxlen=10)
    assert 10 <= await client.xlen(name) < 200
    for i in range(150):  # whole nodes of a hundred entries are cut off
        await client.xadd(f"{name}-old", {"__data__": "1"}, id=f"1000-{i}")
    for i in range(150):
        await broker.publish(i, stream=f"{name}-old", max_age=60)
    assert (await client.xinfo_stream(f"{name}-old"))["first-entry"][0] != b"1000-0"


async def test_a_trimmed_entry_that_was_pending_is_no_trouble(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)
        if got == [1]:
            raise NackMessage(delay=0.3)

    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: got == [1])
    await client.xtrim(name, maxlen=0, approximate=False)
    await broker.publish(2, stream=name)
    await eventually(lambda: _none(pending(client, name)))
    assert got == [1, 2]


async def test_a_message_can_be_deleted(broker: RedisBroker, client: Redis, name: str) -> None:
    done: list[bool] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int, message: RedisStreamMessage) -> None:
        await message.ack()
        done.append(await message.delete())

    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: done == [True])
    assert await client.xlen(name) == 0


async def test_manual_settlement(broker: RedisBroker, client: Redis, name: str) -> None:
    seen: list[RedisStreamMessage] = []

    @broker.subscriber(stream=StreamSub(name, group="g"), ack_policy=AckPolicy.MANUAL)
    async def handler(body: int, message: RedisStreamMessage) -> None:
        seen.append(message)

    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: seen)
    assert await pending(client, name) == 1
    await seen[0].ack()
    await eventually(lambda: _none(pending(client, name)))


@pytest.mark.parametrize("what", ["stream", "group"])
async def test_what_an_operator_deleted_is_made_again(
    broker: RedisBroker, client: Redis, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish_batch(1, 2, stream=name)
    await eventually(lambda: got == [1, 2])
    if what == "stream":
        await client.delete(name)
    else:
        await client.xgroup_destroy(name, "g")
    await broker.publish(3, stream=name)
    await eventually(lambda: got == [1, 2, 3])
    assert sum("is made again" in line for line in caplog.messages) == 1
    assert broker.health()["subscriptions"][0]["state"] == "running"


async def test_declarations_that_cannot_work_say_why(broker: RedisBroker, name: str) -> None:
    for options, text in (
        ({}, "neither channel nor list nor stream"),
        ({"channel": "a", "list": "b"}, "channel and list"),
        ({"stream": StreamSub(name, no_ack=True)}, "no_ack without a group"),
        ({"stream": StreamSub(name, group="g", ack_wait=0)}, "ack_wait"),
        ({"stream": ""}, "has no name"),
    ):

        async def handler(body: int) -> None: ...

        with pytest.raises(SetupError, match=text):
            broker.subscriber(**options)(handler)  # type: ignore[arg-type]
            broker.compile()
        broker.subscribers.clear()


async def test_a_group_that_is_not_to_be_made_has_to_be_there(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g", declare=False))
    async def handler(body: int) -> None:
        got.append(body)

    with pytest.raises(SetupError, match=r"(?s)has no group 'g'.*XGROUP CREATE"):
        await broker.start()
    await client.xgroup_create(name, "g", mkstream=True)
    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: got == [1])
