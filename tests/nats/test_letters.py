"""Dead letters in streams, their replay, and keys of handled messages in a bucket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream import Batch, Dedup, Message, Retry
from millstream.errors import (
    AddressError,
    NoLetters,
    NoResponders,
    SetupError,
    StateError,
)
from millstream.letters import Letter, replay
from millstream.nats import JStream, NatsBroker, NatsKvDedup
from tests.helpers import eventually, unique


@pytest.fixture
def name() -> str:
    return unique("letters")


@pytest.fixture
async def broker(nats: Any, name: str) -> AsyncIterator[NatsBroker]:
    broker = NatsBroker(nats.url, retry=Retry(attempts=1), logger=None)
    yield broker
    await broker.stop()


async def read(broker: NatsBroker, address: str, *args: Any) -> list[Letter]:
    return [letter async for letter in broker.driver.letters(address).read(*args)]


def keep(name: str) -> JStream:
    return JStream(name, subjects=[f"{name}.work.>"])


async def test_letters_are_read_without_being_consumed(broker: NatsBroker, name: str) -> None:
    @broker.subscriber(f"{name}.work.{{kind}}", stream=keep(name), durable="d")
    async def work(body: int) -> None:
        raise ValueError(f"not\n{body}")

    await broker.start()
    letters = broker.driver.letters(f"{name}.dlq")
    with pytest.raises(NoLetters, match=f"no stream keeps '{name}.dlq'"):
        await letters.count()
    for n in range(5):
        await broker.publish(n, f"{name}.work.a", stream=name, headers={"tenant": "ü"})
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 5)
    assert await letters.count() == 5
    found = await read(broker, f"{name}.dlq")
    assert [letter.message.body for letter in found] == [b"0", b"1", b"2", b"3", b"4"]
    assert [letter.id for letter in await read(broker, f"{name}.dlq", 2, found[1].id)] == [
        found[2].id,
        found[3].id,
    ]
    first = found[0]
    assert first.handler == f"work@{name}.work.{{kind}}"
    assert first.origin == f"{name}.work.a"
    assert (first.error_type, first.error) == ("ValueError", "not\n0")
    assert first.traceback.endswith("ValueError: not\n0\n") and "in work\n" in first.traceback
    assert (first.attempts, first.replays) == (1, 0)
    assert abs((first.failed_at - first.stored).total_seconds()) < 2
    assert first.headers["tenant"] == "ü"

    assert await letters.remove(found[1].id)
    assert not await letters.remove(found[1].id)
    assert not await letters.remove("999")
    assert await letters.count() == 4
    assert [letter.id for letter in await read(broker, f"{name}.dlq", 1, found[0].id)] == [
        found[2].id
    ]
    consumers = await broker.driver.outbox.api(f"CONSUMER.NAMES.{name}_dlq")
    assert not consumers["consumers"]
    with pytest.raises(AddressError):
        await broker.driver.letters("a.*").count()


async def test_the_address_can_be_told_without_making_a_stream(
    broker: NatsBroker, name: str
) -> None:
    @broker.subscriber(f"{name}.work.a", stream=keep(name), durable="d")
    async def work(body: int) -> None: ...

    await broker.start()
    spec = broker.subscriptions[0].spec
    assert await broker.driver.dead_letter(spec, None, declare=False) == f"{name}.dlq"
    assert await broker.driver.streams.owner(f"{name}.dlq") is None


async def test_a_replay_goes_to_the_handler_that_failed(broker: NatsBroker, name: str) -> None:
    works = False
    got: list[tuple[str, Any]] = []
    seen: list[dict[str, str]] = []
    options: dict[str, Any] = {"stream": name}

    @broker.subscriber(f"{name}.work.*", stream=keep(name), durable="one")
    async def work(body: int, message: Message[Any]) -> None:
        got.append(("work", body))
        seen.append(dict(message.headers))
        if not works:
            raise ValueError("still wrong")

    @broker.subscriber(f"{name}.work.*", durable="two", **options)
    async def other(body: int) -> None:
        got.append(("other", body))

    @broker.subscriber(f"{name}.work.*", durable="three", batch=Batch(10, 0.05), **options)
    async def batch(body: list[int]) -> None:
        got.extend(("batch", n) for n in body)

    @broker.subscriber(f"{name}.work.>")
    async def core(body: int) -> None:
        got.append(("core", body))

    filtered = broker.subscriber(f"{name}.work.a", durable="four", **options)

    @filtered(filter=lambda m: m.body == b"2")
    async def two(body: int) -> None:
        got.append(("two", body))

    @filtered
    async def rest(body: int) -> None:
        got.append(("rest", body))

    everybody = ("batch", 1), ("core", 1), ("other", 1), ("rest", 1), ("work", 1)
    await broker.start()
    letters = broker.driver.letters(f"{name}.dlq")
    await broker.publish(1, f"{name}.work.a", stream=name, message_id="mine")
    await eventually(lambda: sorted(got) == list(everybody))
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)

    [letter] = await read(broker, f"{name}.dlq")
    assert await replay(letters, letter)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 2)
    [again] = await read(broker, f"{name}.dlq")
    assert again.id != letter.id
    assert (again.replays, again.attempts, again.origin) == (1, 1, f"{name}.work.a")
    assert again.traceback and "ms-replay-to" not in again.headers

    works = True
    await broker.publish(2, f"{name}.work.a", stream=name)  # a mark behind the replay
    assert await replay(letters, again)
    await broker.publish(3, f"{name}.work.a", stream=name)
    for who in ("batch", "core", "other", "rest", "work"):
        await eventually(lambda who=who: (who, 3) in got)
    assert await letters.count() == 0
    ones = [who for who, n in got if n == 1]
    assert sorted(ones) == ["batch", "core", "other", "rest", "work", "work", "work"]
    replayed = next(headers for headers in seen if headers.get("ms-replays") == "2")
    assert replayed["message_id"] == "mine"
    assert replayed["ms-replay-to"] == replayed["ms-handler"] + f"@{name}.work.*"
    assert replayed["ms-error"] == "still wrong" and "ms-traceback" not in replayed
    # All is settled: nothing of it comes again.
    for durable in ("one", "two", "three", "four"):
        info = await broker.driver.outbox.api(f"CONSUMER.INFO.{name}.{durable}")
        assert (info["num_ack_pending"], info["num_pending"]) == (0, 0)


async def test_a_replay_for_all(broker: NatsBroker, name: str) -> None:
    got: list[str] = []

    @broker.subscriber(f"{name}.work.a", stream=keep(name), durable="one")
    async def work(body: int) -> None:
        got.append("work")
        if len(got) < 3:
            raise ValueError

    @broker.subscriber(f"{name}.work.a", stream=name, durable="two")
    async def other(body: int) -> None:
        got.append("other")

    await broker.start()
    await broker.publish(1, f"{name}.work.a", stream=name)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered and len(got) == 2)
    [letter] = await read(broker, f"{name}.dlq")
    await replay(broker.driver.letters(f"{name}.dlq"), letter, to_all=True)
    await eventually(lambda: sorted(got) == ["other", "other", "work", "work"])


async def test_the_same_letter_sent_twice_counts_once(broker: NatsBroker, name: str) -> None:
    got: list[int] = []

    @broker.subscriber(f"{name}.work.a", stream=keep(name), durable="one")
    async def work(body: int) -> None:
        got.append(body)
        if len(got) == 1:
            raise ValueError

    await broker.start()
    await broker.publish(1, f"{name}.work.a", stream=name)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    letters = broker.driver.letters(f"{name}.dlq")
    [letter] = await read(broker, f"{name}.dlq")
    await letters.resend(letter, {})  # and whoever did it was killed before it was removed
    await replay(letters, letter)
    await broker.publish(2, f"{name}.work.a", stream=name)
    await eventually(lambda: 2 in got)
    assert got == [1, 1, 2] and await letters.count() == 0


async def test_a_letter_of_core_nats_is_only_sent_to_somebody(nats: Any, name: str) -> None:
    broker = NatsBroker(nats.url, logger=None)
    got: list[tuple[str, int]] = []
    once = Retry(attempts=1)

    @broker.subscriber(f"{name}.in", retry=once, dead_letter=f"{name}.dead")
    async def work(body: int) -> None:
        got.append(("work", body))
        if len([n for who, n in got if who == "work"]) == 1:
            raise ValueError

    @broker.subscriber(f"{name}.in")
    async def other(body: int) -> None:
        got.append(("other", body))

    await broker.start()
    await broker.publish(1, f"{name}.in")
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    for subscriber in broker.subscribers:
        await subscriber.stop()
    letters = broker.driver.letters(f"{name}.dead")
    [letter] = await read(broker, f"{name}.dead")
    with pytest.raises(NoResponders):
        await replay(letters, letter)
    assert await letters.count() == 1
    for subscriber in broker.subscribers:
        await subscriber.start()
    await replay(letters, letter)
    await broker.publish(2, f"{name}.in")
    await eventually(lambda: ("other", 2) in got and ("work", 2) in got)
    assert sorted(got) == [("other", 1), ("other", 2), ("work", 1), ("work", 1), ("work", 2)]
    assert await letters.count() == 0
    await broker.stop()


async def test_a_letter_that_tells_nothing_stays(broker: NatsBroker, name: str) -> None:
    @broker.subscriber(f"{name}.work.a", stream=JStream(name, subjects=[f"{name}.>"]), durable="d")
    async def work(body: int) -> None: ...

    await broker.start()
    await broker.publish(1, f"{name}.other", stream=name)
    [letter] = await read(broker, f"{name}.other")
    assert (letter.handler, letter.origin, letter.failed_at) == ("", "", letter.stored)
    with pytest.raises(SetupError, match="ms-origin"):
        await replay(broker.driver.letters(f"{name}.other"), letter)
    assert len(await read(broker, f"{name}.other")) == 1


# Deduplication


async def test_keys_in_a_bucket(nats: Any) -> None:
    broker, bucket = NatsBroker(nats.url), unique("keys")
    async with broker:
        one, two = NatsKvDedup(bucket, broker), NatsKvDedup(bucket, broker)
        for key in ("a", "orders.{x}/h:..ü *>", "long" * 100):
            assert await one.claim(key, 60) == "mine"
            assert await two.claim(key, 60) == "busy"
            await one.release(key)
            assert await two.claim(key, 60) == "mine"
            await two.done(key, 60)
            await one.release(key)  # too late: it is done
            assert await one.claim(key, 60) == "done"
        assert await one.claim("b", 0.0) == "mine"
        assert await two.claim("b", 60) == "mine"  # the lease was over
        await one.done("c", 0.0)
        assert await two.claim("c", 60) == "mine"  # forgotten
        wins = await asyncio.gather(*(store.claim("d", 60) for store in (one, two) * 5))
        assert sorted(wins) == ["busy"] * 9 + ["mine"]


async def test_the_bucket_is_checked_and_made_again(nats: Any) -> None:
    broker, bucket = NatsBroker(nats.url), unique("keys")
    async with broker:
        short = NatsKvDedup(bucket, broker, max_age=60)
        assert await short.claim("a", 60) == "mine"
        with pytest.raises(SetupError, match="forgets after 60 s"):
            await NatsKvDedup(bucket, broker).claim("a", 60)
        await broker.js.delete_key_value(bucket)
        await eventually(lambda: _claimed(short, "b"))
    with pytest.raises(SetupError, match="forgets after 60 s"):
        Dedup(store=short)
    with pytest.raises(StateError, match="broker="):
        await NatsKvDedup(bucket).claim("a", 60)


async def _claimed(store: NatsKvDedup, key: str) -> bool:
    try:
        return await store.claim(key, 60) == "mine"
    except Exception as error:
        raise AssertionError from error


async def test_a_repeated_message_is_handled_once_by_two_processes(nats: Any, name: str) -> None:
    got: list[int] = []
    brokers = [NatsBroker(nats.url), NatsBroker(nats.url)]
    for broker in brokers:

        @broker.subscriber(
            f"{name}.work.a",
            stream=keep(name),
            durable="d",
            deduplicate=Dedup(key="id", store=NatsKvDedup(name)),
        )
        async def work(body: int) -> None:
            got.append(body)

        await broker.start()
    for n in range(20):
        headers = {"id": str(n % 10)}
        await brokers[0].publish(n % 10, f"{name}.work.a", stream=name, headers=headers)
    await eventually(lambda: sum(b.subscriptions[0].handled for b in brokers) == 20, 10)
    assert sorted(got) == list(range(10))
    for broker in brokers:
        await broker.stop()
