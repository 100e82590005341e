"""Exactly-once: results and offsets at once, whatever happens in between."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition

from millstream import AckPolicy, Batch, Millstream, Retry
from millstream.errors import BatchFailed, Fenced, MessageTooLarge, SetupError, StateError
from millstream.kafka import KafkaBroker, KafkaMessage, TestKafkaBroker, Topic, reader
from tests.faults.harness import write_result
from tests.helpers import eventually, eventually_sync, unique

QUICK: dict[str, Any] = {"heartbeat_interval_ms": 100, "session_timeout_ms": 3000}


def make(kafka: Any, name: str, **options: Any) -> KafkaBroker:
    return KafkaBroker(kafka.url, transactional_id=name, metadata_max_age_ms=300, **options)


def read(kafka: Any, topic: str, level: str = "read_committed") -> list[str]:
    """What the raw client finds in a topic."""
    settings = {"bootstrap.servers": kafka.url, "group.id": "test", "isolation.level": level}
    consumer = Consumer({**settings, "enable.partition.eof": True})
    found: list[str] = []
    try:
        topics = consumer.list_topics(timeout=5).topics
        numbers = topics[topic].partitions if topic in topics else []
        for number in numbers:
            consumer.assign([TopicPartition(topic, number, 0)])
            while (message := consumer.poll(5)) is not None and message.error() is None:
                found.append((message.value() or b"").decode())
    finally:
        consumer.close()
    return found


def offset(kafka: Any, topic: str, group: str) -> int:
    """The sum of a group's committed offsets."""
    settings = {"bootstrap.servers": kafka.url, "group.id": group}
    consumer = Consumer({**settings, "isolation.level": "read_committed"})
    try:
        numbers = consumer.list_topics(timeout=5).topics[topic].partitions
        asked = [TopicPartition(topic, n) for n in numbers]
        return sum(max(p.offset, 0) for p in consumer.committed(asked, timeout=5))
    finally:
        consumer.close()


def topics(kafka: Any) -> Any:
    return Producer({"bootstrap.servers": kafka.url}).list_topics(timeout=5).topics


def fill(kafka: Any, topic: str, bodies: range) -> None:
    producer = Producer({"bootstrap.servers": kafka.url})
    for body in bodies:
        producer.produce(topic, str(body), key=f"k{body}")
    producer.flush(10)


async def test_results_and_offsets_become_visible_together(kafka: Any) -> None:
    topic, out, other = unique(), unique(), unique()
    broker = make(kafka, topic)

    @broker.subscriber(Topic(topic, 3), group_id=topic, concurrency=16)
    @broker.publisher(out)
    async def handler(body: int) -> int:
        receipt = await broker.publish(-body, other)
        assert receipt.topic == other and receipt.offset == -1
        await asyncio.sleep(0.001)
        return body

    await broker.start()
    try:
        assert (await broker.publish(0, topic)).offset == 0  # outside of a handler: at once
        await broker.publish_batch(*range(1, 1200), topic=topic)
        await eventually(lambda: asyncio.to_thread(lambda: len(read(kafka, out)) == 1200), 20)
    finally:
        await broker.stop()
    assert sorted(map(int, read(kafka, out))) == list(range(1200))
    assert sorted(-int(body) for body in read(kafka, other)) == list(range(1200))
    assert offset(kafka, topic, topic) == 1200


async def test_a_failed_attempt_publishes_nothing(kafka: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka, topic)
    attempts: Counter[str] = Counter()

    @broker.subscriber(topic, group_id=topic, retry=Retry(attempts=3, delay=0.01))
    async def handler(body: str) -> None:
        attempts[body] += 1
        await broker.publish(f"{body} {attempts[body]}", out)
        if body == "bad" or (body == "shaky" and attempts[body] < 3):
            raise ValueError(body)

    await broker.start()
    try:
        for body in ("good", "shaky", "bad", "last"):
            await broker.publish(body, topic)
        await eventually(lambda: asyncio.to_thread(lambda: "last 1" in read(kafka, out)), 10)
    finally:
        await broker.stop()
    # Nothing of the failed attempts was even sent.
    assert read(kafka, out, "read_uncommitted") == ["good 1", "shaky 3", "last 1"]
    assert len(read(kafka, f"{topic}.dlq")) == 1
    assert offset(kafka, topic, topic) == 4


async def test_copies_for_retries_are_in_the_transaction(kafka: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka, topic)

    @broker.subscriber(topic, group_id=topic, retry=Retry(attempts=3, delay=0.1, where="topic"))
    @broker.publisher(out)
    async def handler(body: str, message: KafkaMessage) -> str:
        await broker.publish(f"half of {body}", out)
        if message.attempt < 3 and body == "shaky":
            raise ValueError(body)
        return f"{body} {message.attempt}"

    await broker.start()
    try:
        await broker.publish("shaky", topic)
        await broker.publish("good", topic)
        await eventually(lambda: asyncio.to_thread(lambda: "shaky 3" in read(kafka, out)), 15)
    finally:
        await broker.stop()
    assert read(kafka, out) == ["half of good", "good 1", "half of shaky", "shaky 3"]
    assert len(read(kafka, f"{topic}.{topic}.retry.1")) == 1


async def test_a_batch_is_whole_or_not_there(kafka: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka, topic)
    calls: list[list[int]] = []

    @broker.subscriber(Topic(topic, 2), group_id=topic, batch=Batch(10, 0.3), max_workers=2)
    async def handler(bodies: list[int]) -> None:
        calls.append(bodies)
        await broker.publish(sum(bodies), out)
        if len(calls) == 1:
            raise ValueError("all of it again")
        if len(bodies) > 3 and max(bodies) == 9:
            raise BatchFailed({bodies.index(9): ValueError("one of it again")})

    await broker.start()
    try:
        await broker.publish_batch(*range(40), topic=topic)
        await eventually(lambda: asyncio.to_thread(lambda: offset(kafka, topic, topic) == 40), 15)
    finally:
        await broker.stop()
    found = [int(body) for body in read(kafka, out)]
    nines = [bodies for bodies in calls if bodies == [9]]
    assert sum(found) == sum(range(40)) + 9 * len(nines)


async def test_what_the_cluster_refuses_is_the_matter_of_its_message_alone(kafka: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka, topic)
    failures: list[str] = []

    @broker.subscriber(topic, group_id=topic, retry=Retry(attempts=2, delay=0.01))
    @broker.publisher(Topic(out, config={"max.message.bytes": "2000"}))
    async def handler(body: int, message: KafkaMessage) -> str:
        try:
            if body == 3:
                await broker.publish(b"x" * 2_000_000, out)
        except MessageTooLarge as error:
            failures.append(str(error))
        return f"{body}" + "x" * 5000 * (body == 7)

    await broker.start()
    try:
        await broker.publish_batch(*range(20), topic=topic)
        await eventually(lambda: asyncio.to_thread(lambda: offset(kafka, topic, topic) == 20), 20)
    finally:
        await broker.stop()
    assert sorted(map(int, read(kafka, out))) == [n for n in range(20) if n != 7]
    assert read(kafka, f"{topic}.dlq") == ["7"]
    assert len(failures) == 1  # too large for the producer: said at once


async def test_an_explicit_transaction(kafka: Any) -> None:
    topic, other = unique(), unique()
    broker = make(kafka, topic)
    inside: list[BaseException] = []

    @broker.subscriber(topic, group_id=topic)
    async def handler(body: str) -> None:
        try:
            async with broker.transaction():
                pass
        except StateError as error:
            inside.append(error)

    await broker.start()
    try:
        async with broker.transaction():
            await broker.publish("a", topic)
            await broker.publish("b", other)
            assert read(kafka, other, "read_uncommitted") == []
        assert read(kafka, topic) == ["a"] and read(kafka, other) == ["b"]
        with pytest.raises(ValueError, match="no"):
            async with broker.transaction():
                await broker.publish("c", other)
                raise ValueError("no")
        with pytest.raises(StateError):
            async with broker.transaction(), broker.transaction():
                pass
        await broker.publish("d", other)
        assert read(kafka, other, "read_uncommitted") == ["b", "d"]
        await eventually(lambda: inside)
        again = make(kafka, topic)
        async with again, again.transaction():
            await again.publish("e", other)
        with pytest.raises(Fenced, match="another process"):
            async with broker.transaction():
                await broker.publish("f", other)
        assert "f" not in read(kafka, other)
    finally:
        await broker.stop()


async def test_a_zombie_is_fenced_and_says_so(kafka: Any, caplog: Any) -> None:
    topic, out = unique(), unique()
    gate = asyncio.Event()
    handled: list[str] = []

    def member(name: str) -> KafkaBroker:
        broker = make(kafka, topic)

        @broker.subscriber(Topic(topic, 2), group_id=topic, **QUICK)
        @broker.publisher(out)
        async def handler(body: int) -> str:
            handled.append(name)
            if name == "old":
                await gate.wait()
            return f"{body} {name}"

        return broker

    old, new = member("old"), member("new")
    await old.start()
    try:
        await old.publish(1, topic, partition=0)
        await old.publish(2, topic, partition=1)
        await eventually(lambda: handled)
        starting = asyncio.create_task(new.start())
        await asyncio.sleep(0.5)
        assert old.subscriptions[0].health()["state"] == "running"
        gate.set()
        await starting
        await eventually(lambda: "failed" in old.subscriptions[0].health()["state"], 20)
        assert "another process has the transactional id" in old.subscriptions[0].note
        await eventually(lambda: asyncio.to_thread(lambda: len(read(kafka, out)) == 2), 20)
        assert sorted(read(kafka, out)) == ["1 new", "2 new"]
        assert offset(kafka, topic, topic) == 2
    finally:
        await old.stop()
        await new.stop()
    assert len(read(kafka, out)) == 2
    write_result("Zombie producer, while its handlers run", "kafka", "fenced, says so", sent=2)


@pytest.mark.parametrize("lists", [False, True], ids=["single", "lists"])
@pytest.mark.parametrize(
    "options",
    [
        {"partition_assignment_strategy": "range", **QUICK},
        {"partition_assignment_strategy": "cooperative-sticky", **QUICK},
        {"group_protocol": "consumer"},
    ],
    ids=["eager", "cooperative", "kip-848"],
)
async def test_partitions_move_during_transactions(kafka: Any, options: Any, lists: bool) -> None:
    topic, out = unique(), unique()

    def member(number: int) -> KafkaBroker:
        broker = make(kafka, f"{topic}-{number}")
        subscriber = partial(
            broker.subscriber, Topic(topic, 6), group_id=topic, transaction_interval_ms=20
        )
        if lists:

            @subscriber(batch=Batch(30, 0.02), max_workers=3, **options)
            async def of_many(bodies: list[int]) -> None:
                await broker.publish_batch(*bodies[:-1], topic=out)
                await asyncio.sleep(0.01)
                await broker.publish(bodies[-1], out)

        else:

            @subscriber(concurrency=8, **options)
            @broker.publisher(Topic(out, 2))
            async def handler(body: int) -> int:
                await asyncio.sleep(0.002)
                return body

        return broker

    first = member(0)
    await first.start()

    async def send() -> None:
        for begin in range(0, 3000, 20):
            await first.publish_batch(*range(begin, begin + 20), topic=topic)
            await asyncio.sleep(0.01)

    sending = asyncio.create_task(send())
    for number in (1, 2, 1):
        second = member(number)
        await second.start()
        await asyncio.sleep(0.7)
        await second.stop()
    await sending
    try:
        await eventually(lambda: asyncio.to_thread(lambda: len(read(kafka, out)) >= 3000), 20)
    finally:
        await first.stop()
    assert sorted(map(int, read(kafka, out))) == list(range(3000))
    assert offset(kafka, topic, topic) == 3000


async def test_a_batch_that_loses_one_of_its_partitions_is_handled_anew(kafka: Any) -> None:
    topic, out = unique(), unique()
    begun, gate = asyncio.Event(), asyncio.Event()
    old, new = make(kafka, f"{topic}-old"), make(kafka, f"{topic}-new")
    options: dict[str, Any] = {"partition_assignment_strategy": "cooperative-sticky", **QUICK}

    @old.subscriber(
        Topic(topic, 2), group_id=topic, batch=Batch(20, 0.5), revoke_timeout_ms=200, **options
    )
    async def wait(bodies: list[int]) -> None:
        await old.publish_batch(*bodies[:-1], topic=out)
        begun.set()
        await gate.wait()
        await old.publish(bodies[-1], out)

    @new.subscriber(Topic(topic, 2), group_id=topic, **options)
    @new.publisher(out)
    async def handler(body: int) -> int:
        return body

    await old.start()
    try:
        for body in range(20):
            await old.publish(body, topic, partition=body % 2)
        await begun.wait()
        await new.start()
        await eventually(lambda: asyncio.to_thread(lambda: len(read(kafka, out)) == 10), 20)
        gate.set()
        await eventually(lambda: asyncio.to_thread(lambda: offset(kafka, topic, topic) == 20), 10)
    finally:
        gate.set()
        await old.stop()
        await new.stop()
    assert sorted(map(int, read(kafka, out))) == list(range(20))


@pytest.mark.parametrize("kind", ["single", "lists", "taken back"])
async def test_nothing_is_kept_of_what_is_done(kafka: Any, kind: str, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL, "millstream")  # the test runner keeps what is logged
    topic, out = unique(), unique()
    broker = make(kafka, topic)
    retry = Retry(attempts=2, delay=0, where="lane")
    if kind == "lists":

        @broker.subscriber(topic, group_id=topic, batch=Batch(100, 0.05))
        async def of_many(bodies: list[int]) -> None:
            await broker.publish_batch(*bodies, topic=out)

    else:

        @broker.subscriber(topic, group_id=topic, concurrency=10, retry=retry)
        async def handler(body: int, message: KafkaMessage) -> None:
            if message.attempt == 1:
                await broker.publish(body, out)
                if kind == "taken back":
                    raise ValueError("this is not to be published")

    await broker.start()
    try:
        await broker.publish_batch(*range(2000), topic=topic)
        await eventually(lambda: asyncio.to_thread(lambda: offset(kafka, topic, topic) == 2000), 20)
        await broker.publish(2000, topic)  # what was read last is still at hand
        await eventually(lambda: asyncio.to_thread(lambda: offset(kafka, topic, topic) == 2001), 20)
        gc.collect()
        # What a worker had last, and the reader, may still be at hand.
        kept = [thing for thing in gc.get_objects() if isinstance(thing, Message)]
        assert len([message for message in kept if message.topic() in (topic, out)]) < 20
    finally:
        await broker.stop()


POINTS = (
    "after_handler",
    "after_publish",
    "before_settle",
    "after_settle",
    "transaction_began",
    "transaction_sent",
    "transaction_offsets",
    "transaction_committed",
)


def work(kafka: Any, topic: str, out: str, name: str, point: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.kafka.exactly_once", kafka.url, topic, out, name]
    environment = {**os.environ, "MILLSTREAM_TEST_KILL_AT": point}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_each_result_is_there_once(kafka: Any, point: str) -> None:
    topic, out = unique(), unique()
    at = 40 if not point.startswith("transaction") else 2
    worker = work(kafka, topic, out, topic, f"{point}:{at}")
    eventually_sync(lambda: topic in topics(kafka), 10)
    fill(kafka, topic, range(200))
    assert worker.wait(20) == -signal.SIGKILL
    worker = work(kafka, topic, out, topic)
    try:
        eventually_sync(lambda: len(set(read(kafka, out))) == 200, 20)
    finally:
        worker.terminate()
        assert worker.wait(15) == 0
    assert sorted(map(int, read(kafka, out))) == list(range(200))
    assert offset(kafka, topic, topic) == 200
    write_result(f"Exactly once, killed at {point}", "kafka", "each result once", sent=200)


def test_another_process_takes_over_from_one_killed_in_a_transaction(kafka: Any) -> None:
    topic, out = unique(), unique()
    first = work(kafka, topic, out, "one", "transaction_offsets:2")
    eventually_sync(lambda: topic in topics(kafka), 10)
    fill(kafka, topic, range(200))
    assert first.wait(20) == -signal.SIGKILL
    second = work(kafka, topic, out, "two")  # has to wait until the cluster aborts it
    try:
        eventually_sync(lambda: len(set(read(kafka, out))) == 200, 45)
    finally:
        second.terminate()
        assert second.wait(15) == 0
    assert sorted(map(int, read(kafka, out))) == list(range(200))
    scenario = "Exactly once, another process takes over from one killed in a transaction"
    write_result(scenario, "kafka", "each result once", sent=200)


@pytest.mark.parametrize("patience", [60.0, 0.5], ids=["patient", "anew"])
async def test_offsets_that_an_open_transaction_holds_are_waited_for(
    kafka: Any, monkeypatch: Any, patience: float
) -> None:
    monkeypatch.setattr(reader, "ASK", 0.5)
    monkeypatch.setattr(reader, "UNDECIDED", patience)
    topic, out = unique(), unique()
    first = work(kafka, topic, out, f"{topic}-one", "transaction_offsets:2")
    await eventually(lambda: asyncio.to_thread(lambda: topic in topics(kafka)), 10)
    fill(kafka, topic, range(200))
    assert await asyncio.to_thread(first.wait, 20) == -signal.SIGKILL
    second = make(kafka, f"{topic}-two")

    @second.subscriber(Topic(topic, 2), group_id=topic, **QUICK)
    @second.publisher(out)
    async def handler(body: int) -> int:
        return body

    await second.start()
    try:
        await eventually(lambda: asyncio.to_thread(lambda: len(read(kafka, out)) >= 200), 45)
    finally:
        await second.stop()
    assert sorted(map(int, read(kafka, out))) == list(range(200))


async def test_a_member_with_the_other_library_goes_on_beside_an_open_transaction(
    kafka: Any,
) -> None:
    topic, out, handled = unique(), unique(), Counter[int]()
    first = work(kafka, topic, out, f"{topic}-one", "transaction_offsets:2")
    await eventually(lambda: asyncio.to_thread(lambda: topic in topics(kafka)), 10)
    fill(kafka, topic, range(200))
    assert await asyncio.to_thread(first.wait, 20) == -signal.SIGKILL
    second = KafkaBroker(kafka.url, client="aiokafka", metadata_max_age_ms=300)

    @second.subscriber(Topic(topic, 2), group_id=topic, **QUICK)
    async def handler(body: int) -> None:
        handled[body] += 1

    await second.start()
    try:
        # It knows nothing of the transaction, so that what is in it is done again; and no more.
        kept = set(range(200)) - set(map(int, read(kafka, out)))
        await eventually(lambda: kept <= handled.keys(), 20)
    finally:
        await second.stop()
    assert set(handled.values()) == {1}

    def told() -> bool:
        try:
            return offset(kafka, topic, topic) == 200
        except KafkaException:  # the transaction is open still
            return False

    await eventually(lambda: asyncio.to_thread(told), 30)  # its end undoes nothing


def test_a_stopped_process_that_wakes_up_adds_nothing(kafka: Any) -> None:
    topic, out = unique(), unique()
    old = work(kafka, topic, out, topic)
    eventually_sync(lambda: topic in topics(kafka), 10)
    fill(kafka, topic, range(400))
    eventually_sync(lambda: len(read(kafka, out)) >= 20, 20)
    old.send_signal(signal.SIGSTOP)
    new = work(kafka, topic, out, topic)
    try:
        eventually_sync(lambda: len(set(read(kafka, out))) == 400, 40)
        old.send_signal(signal.SIGCONT)
        fill(kafka, topic, range(400, 500))
        eventually_sync(lambda: len(set(read(kafka, out))) == 500, 40)
    finally:
        for process in (old, new):
            process.terminate()
        assert new.wait(15) == 0
        old.wait(15)
    assert sorted(map(int, read(kafka, out))) == list(range(500))
    write_result("Zombie producer, frozen, replaced, awake again", "kafka", "fenced", sent=500)


async def test_the_server_comes_back_in_the_middle(kafka_server: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka_server, topic, publish_timeout=20.0)

    @broker.subscriber(Topic(topic, 2), group_id=topic, **QUICK)
    @broker.publisher(out)
    async def handler(body: int) -> int:
        await asyncio.sleep(0.005)
        return body

    await broker.start()
    try:
        await broker.publish_batch(*range(300), topic=topic)
        await eventually(lambda: broker.subscriptions[0].handled > 100)
        await asyncio.to_thread(kafka_server.kill)
        await asyncio.to_thread(kafka_server.start)
        await broker.publish_batch(*range(300, 400), topic=topic)
        found = lambda: len(set(read(kafka_server, out))) == 400  # noqa: E731
        await eventually(lambda: asyncio.to_thread(found), 60)
    finally:
        await broker.stop()
    assert sorted(map(int, read(kafka_server, out))) == list(range(400))


def test_what_cannot_be_exactly_once_is_said_at_once(kafka: Any) -> None:
    def failing(**options: Any) -> SetupError:
        broker = make(kafka, "a")

        @broker.subscriber("a", group_id="g", **options)
        async def handler(body: int) -> None: ...

        with pytest.raises(SetupError) as caught:
            broker.compile()
        return caught.value

    assert "manual" in str(failing(ack_policy=AckPolicy.MANUAL)).lower()
    assert "ack_first" in str(failing(ack_policy=AckPolicy.ACK_FIRST)).lower()
    assert "isolation_level" in str(failing(isolation_level="read_uncommitted"))
    assert "transaction_size" in str(failing(transaction_size=0))

    broker, other = make(kafka, "a"), KafkaBroker(kafka.url)

    @broker.subscriber("a", group_id="g")
    @other.publisher("b")
    async def bridge(body: int) -> int:
        return body

    Millstream(broker, other)
    other.bind()
    with pytest.raises(SetupError, match="does not reach"):
        broker.compile()
    with pytest.raises(SetupError, match="without a name"):
        other.transaction()
    with pytest.raises(SetupError, match="transactional_id"):
        make(kafka, "")
    with pytest.raises(SetupError, match="enable_idempotence"):
        make(kafka, "a", enable_idempotence=False)


# In memory


async def test_in_memory_a_transaction_is_visible_at_its_end_or_never() -> None:
    broker, got = KafkaBroker("127.0.0.1:1", transactional_id="shop"), []

    @broker.subscriber("orders", group_id="billing")
    async def handler(body: int) -> None:
        got.append(body)

    async with TestKafkaBroker(broker):
        async with broker.transaction():
            await broker.publish(1, "orders")
            await broker.publish(2, "orders")
            assert got == []
        await eventually(lambda: got == [1, 2])
        with pytest.raises(ValueError, match="no"):
            async with broker.transaction():
                await broker.publish(3, "orders")
                raise ValueError("no")
        await broker.publish(4, "orders")
    assert got == [1, 2, 4]
