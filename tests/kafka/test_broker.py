"""What only Kafka has: offsets, partitions, keys, groups and their rebalancing, retry topics."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from millstream import Batch, BatchFailed, Response, Retry
from millstream.errors import (
    ConnectError,
    MessageTooLarge,
    PublishError,
    SetupError,
    SetupErrors,
    StateError,
)
from millstream.kafka import (
    KafkaBroker,
    KafkaMessage,
    KafkaPublishMessage,
    KafkaResponse,
    TestKafkaBroker,
    Topic,
    TopicPartition,
    by_partition,
)
from millstream.letters import replay
from tests.helpers import eventually, eventually_sync, unique
from tests.servers import free_port
from tests.servers.kafka import KafkaServer


def make(kafka: Any, **options: Any) -> KafkaBroker:
    return KafkaBroker(kafka.url, **{"metadata_max_age_ms": 300, **options})


async def committed(broker: KafkaBroker, group: str, topic: str) -> int:
    """The sum of a group's committed offsets, asked by the raw client."""

    def ask() -> int:
        consumer = Consumer({"bootstrap.servers": broker.driver.describe(), "group.id": group})
        try:
            import confluent_kafka as raw

            numbers = consumer.list_topics(timeout=5).topics[topic].partitions
            asked = [raw.TopicPartition(topic, n) for n in numbers]
            return sum(max(p.offset, 0) for p in consumer.committed(asked, timeout=5))
        finally:
            consumer.close()

    return await asyncio.to_thread(ask)


async def test_publishing_tells_where_a_message_is(kafka: Any) -> None:
    topic = unique()
    broker = make(kafka)
    got: list[KafkaMessage] = []

    @broker.subscriber(Topic(topic, 3), group_id=topic)
    async def handler(body: Any, message: KafkaMessage) -> None:
        got.append(message)

    await broker.start()
    try:
        receipt = await broker.publish(
            {"n": 1}, topic, key="k", partition=2, timestamp_ms=1_700_000_000_000
        )
        assert (receipt.topic, receipt.partition, receipt.offset) == (topic, 2, 0)
        await broker.publish(None, topic, key=b"k", partition=2)
        future = await broker.publish("last", topic, partition=2, no_confirm=True)
        assert (await future).offset == 2
        await eventually(lambda: len(got) == 3)
        first, tombstone, _ = got
        assert (first.key, first.partition, first.offset) == (b"k", 2, 0)
        assert first.timestamp is not None and first.timestamp.timestamp() == 1_700_000_000
        assert tombstone.is_tombstone and tombstone.body == b""
        assert first.raw_message.offset() == 0
        with pytest.raises(MessageTooLarge):
            await broker.publish(b"x" * 2_000_000, topic)
    finally:
        await broker.stop()


async def test_a_batch_has_a_result_per_message(kafka: Any) -> None:
    topic = unique()
    broker = make(kafka)
    got: list[list[Any]] = []

    @broker.subscriber(topic, group_id=topic, batch=Batch(3, 5.0))
    async def handler(bodies: list[Any]) -> None:
        got.append(bodies)

    await broker.start()
    try:
        receipts = await broker.publish_batch(
            1, KafkaPublishMessage(2, key="two", headers={"h": "x"}), 3, topic=topic
        )
        assert [r.offset for r in receipts] == [0, 1, 2]
        await eventually(lambda: got)
        assert got == [[1, 2, 3]]
        with pytest.raises(ExceptionGroup, match="1 of 2"):
            await broker.publish_batch("a", b"x" * 2_000_000, topic=topic)
    finally:
        await broker.stop()


async def test_a_list_is_published_item_by_item(kafka: Any) -> None:
    topic, out = unique(), unique()
    broker = make(kafka)
    got: list[tuple[Any, bytes | None, str | None, str]] = []
    many = broker.publisher(out, batch=True, key="k", headers={"h": "x"})

    @broker.subscriber(topic, group_id=topic, retry=Retry(attempts=1))
    @many
    async def handler(body: int) -> Any:
        if body == 0:
            return "no list"
        return [body, KafkaPublishMessage(body + 1, key="other")]

    @broker.subscriber(out, group_id=out)
    async def result(body: Any, message: KafkaMessage) -> None:
        got.append((body, message.key, message.headers.get("h"), message.correlation_id))

    await broker.start()
    try:
        await broker.publish(0, topic)
        await broker.publish(1, topic, correlation_id="c")
        await eventually(lambda: len(got) == 2)
        assert got == [(1, b"k", "x", "c"), (2, b"other", "x", "c")]
        receipts = await many.publish([7, 8, 9], key=None)
        assert [r.topic for r in receipts] == [out] * 3
        await eventually(lambda: [body for body, *_ in got[2:]] == [7, 8, 9])
        assert broker.subscriptions[0].failing.dead_lettered == 1
        with pytest.raises(TypeError, match="publishes lists"):
            await many.publish(1)
        with pytest.raises(ExceptionGroup, match="1 of 2"):
            await many.publish([b"x" * 2_000_000, 1])
    finally:
        await broker.stop()


async def test_reading_goes_on_somewhere_else(kafka: Any) -> None:
    topic = unique()
    broker = make(kafka)
    got: list[int] = []
    subscriber = broker.subscriber(Topic(topic, 1), group_id=topic, auto_commit_interval_ms=50)

    @subscriber
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        for body in range(10):
            await broker.publish(body, topic, timestamp_ms=1_700_000_000_000 + body * 1000)
        await eventually(lambda: len(got) == 10)
        got.clear()
        await subscriber.seek("beginning")
        await eventually(lambda: got == list(range(10)))
        got.clear()
        await subscriber.seek(7)
        await eventually(lambda: got == [7, 8, 9])
        got.clear()
        await subscriber.seek(datetime.fromtimestamp(1_700_000_005, UTC), TopicPartition(topic, 0))
        await eventually(lambda: got == [5, 6, 7, 8, 9])
        got.clear()
        await subscriber.seek(0)
        await subscriber.seek("end")
        await eventually(lambda: committed(broker, topic, topic))
        await broker.publish(10, topic)
        await eventually(lambda: got[-1:] == [10])
        await eventually(lambda: _is(committed(broker, topic, topic), 11))
        with pytest.raises(StateError, match="not all ours"):
            await subscriber.seek("end", TopicPartition(topic, 5))
        with pytest.raises(SetupError, match="an offset"):
            await subscriber.seek(-3)
        loner = broker.subscriber(topic, persistent=False)
        assert await loner.get_one(timeout=0.3) is None
        await loner.seek(3)
        message = await loner.get_one(timeout=5)
        assert message is not None and await message.decode() == 3
    finally:
        await broker.stop()


async def _is(asked: Any, wanted: Any) -> bool:
    return await asked == wanted


async def test_only_what_is_done_without_a_gap_is_committed(kafka: Any) -> None:
    topic = unique()
    broker = make(kafka)
    gate, done = asyncio.Event(), []

    @broker.subscriber(topic, group_id=topic, concurrency=8, auto_commit_interval_ms=50)
    async def handler(body: int) -> None:
        if body == 3:
            await gate.wait()
        done.append(body)

    await broker.start()
    await broker.publish_batch(*range(10), topic=topic)
    await eventually(lambda: len(done) == 9)
    await eventually(lambda: committed(broker, topic, topic))
    assert await committed(broker, topic, topic) == 3
    broker.graceful_timeout = 0.1
    await broker.stop()
    assert await committed(broker, topic, topic) == 3

    again = make(kafka)
    seen: list[tuple[int, int]] = []

    @again.subscriber(topic, group_id=topic)
    async def handler_again(body: int, message: KafkaMessage) -> None:
        seen.append((body, message.delivery_count))

    await again.start()
    await again.publish(10, topic)
    await eventually(lambda: len(seen) == 2)
    await again.stop()
    # What is done beyond the gap was noted with the commit, and so was the cut attempt.
    assert seen == [(3, 2), (10, 1)]
    assert await committed(again, topic, topic) == 11


async def test_order_per_key_and_per_partition(kafka: Any) -> None:
    topic, other = unique(), unique()
    broker = make(kafka)
    keys: dict[bytes, list[int]] = {}
    parts: dict[int, list[int]] = {}

    @broker.subscriber(Topic(topic, 4), group_id=topic, concurrency=32)
    async def by_its_key(body: int, message: KafkaMessage) -> None:
        await asyncio.sleep(0.001 * (body % 3))
        keys.setdefault(message.key or b"", []).append(body)

    @broker.subscriber(Topic(other, 4), group_id=other, concurrency=8, ordered_by=by_partition)
    async def by_its_partition(body: int, message: KafkaMessage) -> None:
        await asyncio.sleep(0.001 * (body % 3))
        parts.setdefault(message.partition, []).append(message.offset)

    await broker.start()
    try:
        for i in range(200):
            await broker.publish(i, topic, key=f"k{i % 10}")
            await broker.publish(i, other, key=f"k{i % 10}")
        await eventually(lambda: sum(map(len, keys.values())) == 200)
        await eventually(lambda: sum(map(len, parts.values())) == 200)
        assert all(bodies == sorted(bodies) for bodies in keys.values())
        assert all(offsets == sorted(offsets) for offsets in parts.values())
    finally:
        await broker.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"partition_assignment_strategy": "range"},
        {"partition_assignment_strategy": "cooperative-sticky"},
        {"group_protocol": "consumer"},
    ],
    ids=["eager", "cooperative", "kip-848"],
)
async def test_members_come_and_go_and_nothing_is_lost(kafka: Any, options: Any) -> None:
    topic = unique()
    if "group_protocol" not in options:
        # A member that goes while the group is being shared out is missed only after its session.
        options = {**options, "heartbeat_interval_ms": 100, "session_timeout_ms": 3000}
    handled: Counter[int] = Counter()

    def member() -> KafkaBroker:
        broker = make(kafka)

        @broker.subscriber(Topic(topic, 4), group_id=topic, concurrency=4, **options)
        async def handler(body: int) -> None:
            await asyncio.sleep(0.002)
            handled[body] += 1

        return broker

    first = member()
    await first.start()
    sending = asyncio.create_task(_send(first, topic, 600))
    for _ in range(3):
        second = member()
        await second.start()
        await asyncio.sleep(0.3)
        await second.stop()
    await sending
    await eventually(lambda: len(handled) == 600, 20)
    await first.stop()
    # Members let go of partitions in order: what runs is finished first.
    assert set(handled.values()) == {1}
    assert await committed(first, topic, topic) == 600


async def _send(broker: KafkaBroker, topic: str, count: int) -> None:
    for i in range(count):
        await broker.publish(i, topic, key=str(i))
        await asyncio.sleep(0.002)


async def test_batches_that_fail_in_part_while_members_come_and_go(kafka: Any) -> None:
    topic = unique()
    options: dict[str, Any] = {"heartbeat_interval_ms": 100, "session_timeout_ms": 3000}
    retry = Retry(3, delay=0.01)
    done: Counter[int] = Counter()
    failed: set[int] = set()

    def member() -> KafkaBroker:
        broker = make(kafka)

        @broker.subscriber(
            Topic(topic, 4),
            group_id=topic,
            concurrency=2,
            batch=Batch(50, 0.05),
            retry=retry,
            **options,
        )
        async def handler(bodies: list[int]) -> None:
            await asyncio.sleep(0.005)
            bad = {
                i: ValueError(n) for i, n in enumerate(bodies) if n % 20 == 0 and n not in failed
            }
            failed.update(bodies[i] for i in bad)
            done.update(n for i, n in enumerate(bodies) if i not in bad)
            if bad:
                raise BatchFailed(bad)

        return broker

    # A foreign client's messages: nothing about them is known beforehand.
    producer: Any = Producer({"bootstrap.servers": kafka.url, "linger.ms": 5})
    first = member()
    await first.start()
    for turn in range(3):
        second = member()
        await second.start()
        for n in range(turn * 2000, turn * 2000 + 2000):
            producer.produce(topic, str(n), key=str(n))
        await asyncio.to_thread(producer.flush)
        await second.stop()
    await eventually(lambda: len(done) == 6000, 20)
    await first.stop()
    assert set(done.values()) == {1}
    assert await committed(first, topic, topic) == 6000


async def test_work_that_outlasts_its_partition_is_fenced(kafka: Any) -> None:
    topic = unique()
    gate, got = asyncio.Event(), list[tuple[str, int, int]]()
    first, second = make(kafka, graceful_timeout=0.1), make(kafka, graceful_timeout=0.1)
    common: dict[str, Any] = {
        "group_id": topic,
        "concurrency": 2,
        "partition_assignment_strategy": "range",
        "heartbeat_interval_ms": 100,
        "revoke_timeout_ms": 200,
        "auto_commit_interval_ms": 50,
    }

    @first.subscriber(Topic(topic, 2), **common)
    async def slow(body: int) -> None:
        got.append(("first", body, 1))
        await gate.wait()

    @second.subscriber(Topic(topic, 2), **common)
    async def quick(body: int, message: KafkaMessage) -> None:
        got.append(("second", body, message.delivery_count))
        await asyncio.sleep(30)

    await first.start()
    for partition in (0, 1):
        await first.publish(partition, topic, key=f"{partition}", partition=partition)
    await eventually(lambda: len(got) == 2)
    await second.start()  # and takes one of the two, whose message still runs in the first
    await eventually(lambda: any(who == "second" for who, *_ in got), 10)
    [(moved, count)] = [(body, count) for who, body, count in got if who == "second"]
    assert count == 2
    gate.set()
    # What ends now of the partition that went is not told to the group; the other one is.
    await eventually(lambda: _is(committed(first, topic, topic), 1), 10)
    await first.stop()
    assert await committed(second, topic, topic) == 1
    assert [body for who, body, _ in got if who == "second"] == [moved]
    await second.stop()


async def test_a_retry_in_place_ends_where_the_partition_went(kafka: Any) -> None:
    topic = unique()
    gate, got = asyncio.Event(), list[tuple[str, int, int]]()
    first, second = make(kafka, graceful_timeout=0.1), make(kafka, graceful_timeout=0.1)
    common: dict[str, Any] = {
        "group_id": topic,
        "concurrency": 2,
        "partition_assignment_strategy": "range",
        "heartbeat_interval_ms": 100,
        "revoke_timeout_ms": 200,
        "retry": Retry(attempts=3, delay=0.1),
    }

    @first.subscriber(Topic(topic, 2), **common)
    async def failing(body: int, message: KafkaMessage) -> None:
        got.append(("first", body, message.attempt))
        await gate.wait()
        raise ValueError("never")

    @second.subscriber(Topic(topic, 2), **common)
    async def working(body: int, message: KafkaMessage) -> None:
        got.append(("second", body, message.attempt))
        await asyncio.sleep(30)

    await first.start()
    for partition in (0, 1):
        await first.publish(partition, topic, key=f"{partition}", partition=partition)
    await eventually(lambda: len(got) == 2)
    await second.start()  # and takes one of the two, whose message still runs in the first
    await eventually(lambda: any(who == "second" for who, *_ in got), 10)
    [moved] = [body for who, body, _ in got if who == "second"]
    gate.set()
    stayed = 1 - moved
    await eventually(lambda: ("first", stayed, 3) in got)
    await asyncio.sleep(0.5)  # longer than the backoff
    await first.stop()
    await second.stop()
    assert [attempt for who, body, attempt in got if (who, body) == ("first", moved)] == [1]


async def _is(found: Any, wanted: int) -> bool:
    return bool(await found == wanted)


def test_a_killed_process_loses_nothing_and_repeats_little(kafka: Any, tmp_path: Path) -> None:
    topic, notes = unique(), tmp_path / "notes"
    producer = Producer({"bootstrap.servers": kafka.url})
    worker = _work(kafka, topic, notes, 16)
    eventually_sync(lambda: _exists(producer, topic))
    for i in range(400):
        producer.produce(topic, f"{i}", key=f"k{i % 40}")
    producer.flush(10)
    eventually_sync(lambda: len(_lines(notes)) > 150, 20)
    worker.kill()
    worker.wait()
    worker = _work(kafka, topic, notes, 16)
    eventually_sync(lambda: len({line[0] for line in _lines(notes)}) == 400, 20)
    worker.terminate()
    assert worker.wait(10) == 0
    counts = Counter(body for body, _, _ in _lines(notes))
    assert sum(counts.values()) - 400 < 350  # at most what was done since the last commit
    for key in {key for _, key, _ in _lines(notes)}:
        firsts = list(dict.fromkeys(int(body) for body, k, _ in _lines(notes) if k == key))
        assert firsts == sorted(firsts)


def test_what_kills_its_process_is_buried(kafka: Any, tmp_path: Path) -> None:
    topic, notes = unique(), tmp_path / "notes"
    producer = Producer({"bootstrap.servers": kafka.url})
    worker = _work(kafka, topic, notes, 1)
    eventually_sync(lambda: _exists(producer, topic))
    for body in ("before", "killer", "after"):
        producer.produce(topic, body, key="k")
    producer.flush(10)
    deaths = 0
    for _ in range(8):
        try:
            worker.wait(8)
        except subprocess.TimeoutExpired:
            break
        deaths += 1
        worker = _work(kafka, topic, notes, 1)
    eventually_sync(lambda: any(body == "after" for body, _, _ in _lines(notes)), 10)
    worker.terminate()
    assert worker.wait(10) == 0
    assert deaths == 3  # as many attempts as the retry allows
    assert [int(count) for body, _, count in _lines(notes) if body == "killer"] == [1, 2, 3]


def _work(kafka: Any, topic: str, notes: Path, lanes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.kafka.worker", kafka.url, topic, str(notes), str(lanes)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _lines(path: Path) -> list[tuple[str, str, str]]:
    if not path.exists():
        return []
    return [tuple(line.split(" ")) for line in path.read_text().splitlines()]  # type: ignore[misc]


def _exists(producer: Producer, topic: str) -> bool:
    return topic in producer.list_topics(timeout=5).topics


async def test_retry_topics_let_the_others_go_on(kafka: Any) -> None:
    topic = unique()
    broker = make(kafka)
    got: list[tuple[str, int, bytes | None, str]] = []

    @broker.subscriber(topic, group_id=topic, retry=Retry(attempts=3, delay=0.2, where="topic"))
    async def handler(body: str, message: KafkaMessage) -> None:
        got.append((body, message.attempt, message.key, message.destination))
        if body == "bad":
            raise ValueError(body)

    await broker.start()
    try:
        await broker.publish("bad", topic, key="k")
        await broker.publish("good", topic)
        letters = broker.driver.letters(f"{topic}.dlq")
        await eventually(lambda: len(got) == 4)
        assert [(body, attempt) for body, attempt, _, _ in got] == [
            ("bad", 1),
            ("good", 1),
            ("bad", 2),
            ("bad", 3),
        ]
        assert {key for body, _, key, _ in got if body == "bad"} == {b"k"}
        assert {destination for *_, destination in got} == {topic}
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered)
        [letter] = [letter async for letter in letters.read()]
        assert letter.attempts == 3 and letter.message.key == b"k"
        assert await letters.remove(letter.id)
        assert await letters.count() == 0
    finally:
        await broker.stop()


async def test_patterns_manual_assignment_and_get_one(kafka: Any) -> None:
    prefix = unique()
    broker = make(kafka)
    got: list[tuple[str, str]] = []
    own: list[int] = []

    @broker.subscriber(pattern=rf"{prefix}\.{{region}}\.\d+", group_id=prefix)
    async def handler(body: str, region: str) -> None:
        got.append((body, region))

    @broker.subscriber(partitions=[TopicPartition(f"{prefix}.hand", 1, -2)])
    async def by_hand(body: int) -> None:
        own.append(body)

    reader = broker.subscriber(f"{prefix}.one", group_id=f"{prefix}-one", persistent=False)
    await broker.connect()
    await broker.driver.client.make([Topic(f"{prefix}.hand", 2)])
    await broker.publish(1, f"{prefix}.hand", partition=1)
    await broker.publish(2, f"{prefix}.hand", partition=0)
    await broker.start()
    try:
        await broker.publish("a", f"{prefix}.eu.7")
        await broker.publish("no", f"{prefix}.eu.x")
        await eventually(lambda: got and own, 10)
        assert got == [("a", "eu")] and own == [1]
        await broker.publish("only", f"{prefix}.one")
        message = await reader.get_one(timeout=5)
        assert message is not None and await message.decode() == "only"
    finally:
        await broker.stop()


async def test_several_topics_and_results_with_keys(kafka: Any) -> None:
    first, second, out = unique(), unique(), unique()
    broker = make(kafka)
    got: list[tuple[Any, bytes | None]] = []

    @broker.subscriber(first, second, group_id=first)
    @broker.publisher(out)
    async def handler(body: int) -> Response:
        return KafkaResponse(body * 2, key=f"k{body}")

    @broker.subscriber(out, group_id=out)
    async def result(body: int, message: KafkaMessage) -> None:
        got.append((body, message.key))

    await broker.start()
    try:
        await broker.publish(1, first)
        await broker.publish(2, second)
        await eventually(lambda: len(got) == 2)
        assert sorted(got) == [(2, b"k1"), (4, b"k2")]
    finally:
        await broker.stop()


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_an_answer_takes_the_options_of_its_response(kafka: Any, client: Any) -> None:
    topic, answers = unique(), unique()
    broker = make(kafka, client=client)
    got: list[KafkaMessage] = []

    @broker.subscriber(topic, group_id=topic)
    async def handler(body: int) -> Any:
        if body == 2:
            return KafkaPublishMessage("two", key="k2")
        return KafkaResponse(
            None, headers={"a": "b"}, key="k", partition=2, timestamp_ms=1_700_000_000_000
        )

    @broker.subscriber(Topic(answers, 3), group_id=topic)
    async def answered(message: KafkaMessage) -> None:
        got.append(message)

    await broker.start()
    try:
        await broker.publish(1, topic, reply_to=answers, correlation_id="c")
        await eventually(lambda: got, 20)
        assert (got[0].key, got[0].partition, got[0].is_tombstone) == (b"k", 2, True)
        assert (got[0].headers["a"], got[0].correlation_id) == ("b", "c")
        assert got[0].timestamp is not None and got[0].timestamp.timestamp() == 1_700_000_000
        await broker.publish(2, topic, reply_to=answers)
        await eventually(lambda: len(got) == 2)
        assert (got[1].body, got[1].key) == (b"two", b"k2")
    finally:
        await broker.stop()


def test_what_is_wrong_is_said_at_once(kafka: Any) -> None:
    broker = make(kafka)

    @broker.subscriber("a", pattern="b")
    async def both(body: int) -> None: ...

    @broker.subscriber("no such name!", group_id="g")
    async def name(body: int) -> None: ...

    @broker.subscriber("a", auto_offset_reset="never")
    async def reset(body: int) -> None: ...

    with pytest.raises(SetupErrors) as caught:
        broker.compile()
    assert len(caught.value.errors) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_protocol": "new"}, "one of classic, consumer"),
        ({"isolation_level": "none"}, "one of read_committed, read_uncommitted"),
        ({"partition_assignment_strategy": ["random"]}, "one of cooperative-sticky, sticky"),
        ({"group_protocol": "consumer", "session_timeout_ms": 6000}, "where the cluster says"),
        ({"topics": Topic("a", 0)}, "num_partitions=0 of a"),
        ({"topics": ".."}, "cannot be a topic's name"),
        ({"topics": TopicPartition("a", 0)}, "is TopicPartition, not str or Topic"),
        ({"topics": (), "partitions": ["a"]}, "'a' is str, not TopicPartition"),
        ({"topics": (), "partitions": [TopicPartition("a", 0, -5)]}, "-2 for the beginning"),
        ({"batch": 5}, "batch: 5 is int"),
        ({"max_workers": "3"}, "max_workers: '3' is str, not int or None"),
        ({"batch": True, "max_records": 0}, "max_records=0"),
        ({"revoke_timeout_ms": -1}, "revoke_timeout_ms=-1"),
        ({"on_assign": "function"}, "is no function"),
        ({"config": {"enable.auto.commit": True}}, "when their messages are handled"),
        ({"value_deserializer": bytes.decode}, "decoder= reads bodies"),
        ({"topics": (), "pattern": "(?!a).*"}, "neither flags nor looking ahead"),
        (
            {"topics": (), "pattern": r"orders\..*", "group_protocol": "consumer"},
            "fix: group_protocol='classic', a narrower pattern, or dead_letter=",
        ),
        (
            {"topics": "orders.{region}", "group_protocol": "consumer", "dead_letter": "orders.x"},
            "'orders.{region}' takes 'orders.x' too, where its own dead letters go",
        ),
        (
            {"topics": (), "pattern": ".*", "group_protocol": "consumer", "dead_letter": None},
            "takes the cluster's own topics",
        ),
    ],
)
def test_a_subscription_that_cannot_be_is_refused(options: Any, text: str) -> None:
    broker = KafkaBroker()
    with pytest.raises(SetupError) as caught:
        broker.subscriber(**{"topics": "a", "group_id": "g", **options})(handle)
        broker.compile()
    assert text in str(caught.value)


async def handle(body: Any) -> None: ...


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"linger_ms": "5"}, "KafkaBroker: linger_ms='5' is str, not int"),
        ({"transactional_id": 7}, "transactional_id=7 is int, not str or None"),
        ({"acks": "most"}, "'all', 1 or 0"),
        ({"acks": 1, "enable_idempotence": True}, "leave out one"),
        ({"acks": 0, "transactional_id": "a"}, "leave out one"),
        ({"compression_type": "rar"}, "'gzip', 'snappy', 'lz4', 'zstd' or 'none'"),
        ({"partitioner": hash}, "a name such as 'murmur2_random'"),
        ({"partitioner": "murmur2", "client": "aiokafka"}, "a function"),
        ({"compression_type": "zstd", "client": "aiokafka"}, "pip install cramjam"),
        ({"sasl_kerberos_domain_name": "a"}, "client='aiokafka'"),
        ({"config": {"nonsense": 1}, "client": "aiokafka"}, "no setting 'nonsense'"),
        ({"config": {"group.id": "a"}}, "group_id= of the subscriber"),
        ({"bootstrap_servers": "host:port"}, "host:port, such as localhost:9092"),
        ({"bootstrap_servers": 9092}, "'localhost:9092', or several"),
        ({"security": "secret"}, "one of millstream.security"),
        ({"value_serializer": str.encode}, "codec= writes bodies"),
    ],
)
def test_a_broker_that_cannot_be_is_refused(options: Any, text: str) -> None:
    with pytest.raises(SetupError) as caught:
        KafkaBroker(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_what_the_library_refuses_is_said(kafka: Any, client: str, caplog: Any) -> None:
    topic = unique()
    broker = make(kafka, client=client)
    await broker.connect()
    await broker.publish("a", topic)
    try:
        absent = broker.subscriber(partitions=[TopicPartition(topic, 7, -2)], persistent=False)
        absent(handle)
        with pytest.raises(SetupError, match="has no partition 7") as caught:
            await absent.start()
        assert "it has 1" in str(caught.value)
        hasty = broker.subscriber(topic, group_id=topic, session_timeout_ms=1, persistent=False)
        hasty(handle)
        await hasty.start()
        await eventually(lambda: "group.min.session.timeout.ms" in caplog.text, 10)
    finally:
        await broker.stop()


async def test_who_is_not_there_is_told_with_the_reason(caplog: Any) -> None:
    gone = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConnectError, match="Connection refused") as caught:
        await KafkaBroker(gone, startup_timeout=3).connect()
    assert str(caught.value).startswith(f"{gone}: Connect to ")
    assert "Connection refused; next try in" in caplog.text  # within the 3 s
    both = KafkaBroker([gone, "nowhere.invalid:9092"], startup_timeout=0)
    with pytest.raises(ConnectError) as caught:
        await both.connect()
    assert f"{gone}: Connect to" in str(caught.value)
    assert "nowhere.invalid:9092: Failed to resolve" in str(caught.value)


async def test_an_address_that_a_node_tells_in_vain_is_named(caplog: Any) -> None:
    with KafkaServer(proxied="PLAINTEXT") as server:  # but nobody stands between
        broker = KafkaBroker(f"127.0.0.1:{server.inside}")
        try:
            await broker.connect()
            told = f"connection lost: 127.0.0.1:{server.outside}: Connect to"
            await eventually(lambda: told in caplog.text, 10)
        finally:
            await broker.stop()


async def test_settings_of_the_library_that_are_none(kafka: Any) -> None:
    with pytest.raises(SetupError, match="nonsense"):
        await make(kafka, config={"nonsense": 1}).connect()
    broker = make(kafka)
    broker.subscriber(unique(), group_id="g", config={"nonsense": 1})(handle)
    with pytest.raises(SetupError, match="nonsense"):
        await broker.start()
    await broker.stop()


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_options_of_the_broker_are_in_force(kafka: Any, client: Any) -> None:
    topic = unique()
    port = kafka.url.rpartition(":")[2]
    config = {"client.dns.lookup": "use_all_dns_ips", "fetch.queue.backoff.ms": 7}
    if client == "aiokafka":
        config = {"max_poll_records": 3}
    broker = make(kafka, client=client, client_rack="r1", compression_type="gzip", acks=1)
    tuned = KafkaBroker(f"PLAINTEXT://localhost:{port}", client=client, config=config)
    got: list[str] = []

    @tuned.subscriber(topic, group_id=topic)
    async def handler(body: str) -> None:
        got.append(body)

    await tuned.start()
    await broker.connect()
    try:
        await broker.publish("a", topic)
        await eventually(lambda: got, 10)
        assert got == ["a"]
    finally:
        await broker.stop()
        await tuned.stop()


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_a_message_that_cannot_be_keeps_up_no_other(kafka: Any, client: Any) -> None:
    topic = unique()
    broker = make(kafka, client=client, publish_timeout=3.0)
    several = broker.publisher(topic, batch=True)
    await broker.start()
    try:
        first = await broker.publish("a", topic)
        wrong: Any
        for wrong in (
            {"key": 5},
            {"partition": 9},
            {"partition": -7},
            {"partition": "1"},
            {"timestamp_ms": "now"},
            {"headers": {"a": 1}},
        ):
            with pytest.raises((SetupError, PublishError)):
                await broker.publish("b", topic, **wrong)
        with pytest.raises(SetupError, match="topic=5"):
            await broker.publish("b", 5)  # type: ignore[arg-type]
        absent = asyncio.create_task(broker.publish("b", "no such name"))
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        last = await broker.publish("b", topic)
        assert asyncio.get_running_loop().time() < began + 2.0 and last.offset == first.offset + 1
        with pytest.raises(PublishError):
            await absent
        assert [r.offset for r in await several.publish("c", "d")] == [2, 3]
    finally:
        await broker.stop()


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_what_nobody_waited_for_is_there_after_a_flush(kafka: Any, client: str) -> None:
    async with make(kafka, client=client) as broker:
        publisher = broker.publisher(unique())
        receipts = [await publisher.publish(i, no_confirm=True) for i in range(50)]
        await publisher.flush()
        assert [receipt.result().offset for receipt in receipts] == list(range(50))


async def test_a_topic_that_is_not_there_and_is_not_made(kafka: Any) -> None:
    topic = unique()
    async with make(kafka, allow_auto_create_topics=False) as broker:
        with pytest.raises(PublishError, match=f"{topic}.*Unknown topic"):
            await broker.publish("a", topic)


@pytest.mark.parametrize(
    ("client", "protocol"),
    [("confluent", "classic"), ("confluent", "consumer"), ("aiokafka", "classic")],
)
async def test_a_pattern_means_the_same_everywhere(kafka: Any, client: str, protocol: str) -> None:
    prefix = unique()
    broker = make(kafka, client=client)
    got: list[str] = []

    pattern = rf"{prefix}\.[a\d\-]+\.(?:eu|us)"

    @broker.subscriber(pattern=pattern, group_id=prefix, group_protocol=protocol)
    async def handler(body: str, message: KafkaMessage) -> None:
        got.append(message.destination.removeprefix(prefix))

    await broker.connect()
    names = [".a-1.eu", ".7.us", ".b.eu", ".7.us.later", ".7.asia"]
    await broker.driver.client.make([Topic(prefix + name) for name in names])
    await broker.start()
    try:
        for name in names:
            await broker.publish("a", prefix + name)
        await eventually(lambda: len(got) >= 2, 15)
        assert sorted(got) == [".7.us", ".a-1.eu"]
    finally:
        await broker.stop()


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
@pytest.mark.parametrize("dead_letter", [None, "dead-1"])
async def test_a_pattern_takes_none_of_its_own_dead_letters(
    kafka: Any, client: Any, dead_letter: str | None
) -> None:
    prefix = unique()
    dead = f"{prefix}.{dead_letter or 'any.dlq'}"
    options = {"dead_letter": dead} if dead_letter is not None else {}
    got, healed = list[tuple[str, Any]](), False

    def application() -> KafkaBroker:
        broker = make(kafka, client=client, **options)

        @broker.subscriber(
            pattern=rf"{prefix}\..*", group_id=prefix, retry=Retry(attempts=2, delay=0.01)
        )
        async def handler(body: str, message: KafkaMessage) -> None:
            got.append((message.destination, body))
            if not healed:
                raise ValueError("not yet")

        return broker

    broker = application()
    await broker.start()
    try:
        await broker.publish("bad", f"{prefix}.a")
        letters = broker.driver.letters(dead)
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1, 20)
        assert got == [(f"{prefix}.a", "bad")] * 2
        healed = True
        [letter] = [letter async for letter in letters.read()]
        assert (letter.origin, letter.message.body) == (f"{prefix}.a", b"bad")
        assert await replay(letters, letter)
        await eventually(lambda: len(got) == 3)
        # What is seen of the cluster now was made after the dead letters and their marks.
        await broker.publish("late", f"{prefix}.late")
        await eventually(lambda: len(got) == 4, 20)
        assert got[2:] == [(f"{prefix}.a", "bad"), (f"{prefix}.late", "late")]
        assert {dead, f"{dead}.removed"} <= await kafka_topics(kafka)
        assert await shared_out(kafka, prefix) == {f"{prefix}.a", f"{prefix}.late"}
    finally:
        await broker.stop()
    broker = application()
    await broker.start()
    try:
        await broker.publish("after", f"{prefix}.a")
        await eventually(lambda: len(got) == 5, 20)
        assert await shared_out(kafka, prefix) == {f"{prefix}.a", f"{prefix}.late"}
    finally:
        await broker.stop()
    assert got[4:] == [(f"{prefix}.a", "after")]


async def kafka_topics(kafka: Any) -> set[str]:
    admin = AdminClient({"bootstrap.servers": kafka.url})
    return set((await asyncio.to_thread(admin.list_topics, timeout=5)).topics)


async def shared_out(kafka: Any, group: str) -> set[str]:
    """The topics whose partitions the members of a group have."""
    admin = AdminClient({"bootstrap.servers": kafka.url})
    found = await asyncio.wrap_future(admin.describe_consumer_groups([group])[group])
    return {p.topic for member in found.members for p in member.assignment.topic_partitions}


async def test_a_reader_of_a_pattern_without_a_group_takes_none_of_its_own_dead_letters(
    kafka: Any,
) -> None:
    prefix, got = unique(), list[str]()
    broker = make(kafka)

    @broker.subscriber(pattern=rf"{prefix}\..*", dead_letter=f"{prefix}.dead")
    async def handler(body: str, message: KafkaMessage) -> None:
        got.append(message.destination)
        if body == "bad":
            raise ValueError("never")

    await broker.start()
    try:
        await broker.publish("bad", f"{prefix}.a")
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1, 20)
        await broker.publish("good", f"{prefix}.b")
        await eventually(lambda: len(got) == 2, 20)
        await asyncio.sleep(1)  # three more looks for new topics
    finally:
        await broker.stop()
    assert got == [f"{prefix}.a", f"{prefix}.b"]


@pytest.mark.parametrize(
    ("client", "protocol"),
    [("confluent", "classic"), ("confluent", "consumer"), ("aiokafka", "classic")],
)
async def test_a_pattern_that_takes_its_own_retry_topics_gets_each_message_once(
    kafka: Any, client: Any, protocol: Any
) -> None:
    prefix, got = unique(), list[tuple[str, int]]()
    group = f"{prefix}.g"
    broker = make(kafka, client=client)

    @broker.subscriber(
        pattern=rf"(?:pattern\.)?{prefix}\..*",
        group_id=group,
        group_protocol=protocol,
        retry=Retry(attempts=3, delay=0.2, where="topic"),
        dead_letter=f"dead-{prefix}",
    )
    async def handler(body: int, message: KafkaMessage) -> None:
        got.append((message.destination, message.delivery_count))
        raise ValueError("never")

    await broker.start()
    try:
        await broker.publish(1, f"{prefix}.a")
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1, 30)
        assert f"pattern.{group}.retry.1" in await kafka_topics(kafka)
        await broker.publish(2, f"{prefix}.a")
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 2, 30)
    finally:
        await broker.stop()
    assert got == [(f"{prefix}.a", n) for n in (1, 2, 3, 1, 2, 3)]


async def test_a_pattern_in_memory_takes_none_of_its_own_dead_letters() -> None:
    got, broker = list[str](), KafkaBroker()

    @broker.subscriber(pattern=r"orders\..*", group_id="g", retry=Retry(attempts=2))
    async def handler(body: str, message: KafkaMessage) -> None:
        got.append(message.destination)
        raise ValueError("never")

    @broker.subscriber(pattern=r".*\.dlq", group_id="other")
    async def other(body: str, message: KafkaMessage) -> None:
        got.append(message.destination)

    test = TestKafkaBroker(broker)
    async with test:
        await broker.publish("bad", "orders.a")
        await test.clock.advance(60)
    assert got == ["orders.a", "orders.a", "orders.any.dlq"]


@pytest.mark.parametrize("client", ["confluent", "aiokafka"])
async def test_a_pattern_takes_none_of_the_topics_of_the_cluster(kafka: Any, client: str) -> None:
    prefix = unique()
    broker = make(kafka, client=client)
    got: set[str] = set()

    # Its own commits are messages of __consumer_offsets.
    pattern = rf"__consumer_offsets|{prefix}"

    @broker.subscriber(pattern=pattern, group_id=prefix, auto_commit_interval_ms=10)
    async def handler(body: bytes, message: KafkaMessage) -> None:
        got.add(message.destination)

    await broker.connect()
    await broker.publish("a", prefix)
    await broker.start()
    try:
        await eventually(lambda: got, 15)
        await eventually(lambda: broker.subscriptions[0].handled, 5)
        await broker.publish("b", prefix)
        await eventually(lambda: broker.subscriptions[0].handled > 1, 5)
        assert got == {prefix} and broker.subscriptions[0].handled == 2
    finally:
        await broker.stop()


async def test_the_server_comes_back(kafka_server: Any) -> None:
    topic = unique()
    broker = make(kafka_server)
    got: list[int] = []

    @broker.subscriber(topic, group_id=topic, session_timeout_ms=3000)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish(1, topic)
        await eventually(lambda: got == [1])
        kafka_server.kill()
        sending = asyncio.create_task(broker.publish(2, topic, timeout=20))
        await asyncio.to_thread(kafka_server.start)
        await sending
        await eventually(lambda: got[-1] == 2, 20)
    finally:
        await broker.stop()


async def test_what_comes_back_to_its_last_owner_stays_done(kafka_server: Any) -> None:
    topic, lost = unique(), asyncio.Event()
    broker = make(kafka_server)
    handled, attempts = Counter[int](), Counter[int]()

    @broker.subscriber(
        Topic(topic, 2),
        group_id=topic,
        session_timeout_ms=1500,
        heartbeat_interval_ms=300,
        auto_commit_interval_ms=60_000,  # the group knows nothing of what is done
        on_lost=lambda places: lost.set(),
        retry=Retry(2),
    )
    async def handler(body: int, message: KafkaMessage) -> None:
        handled[body] += 1
        attempts[message.attempt] += 1

    await broker.start()
    try:
        for again in range(2):  # as often as it has attempts
            await broker.publish_batch(*range(again * 20, again * 20 + 20), topic=topic, timeout=20)
            await eventually(lambda again=again: len(handled) == again * 20 + 20, 20)
            lost.clear()
            await asyncio.to_thread(kafka_server.kill)
            with contextlib.suppress(TimeoutError):  # a commit that just left hides it
                await asyncio.wait_for(lost.wait(), 5)
            await asyncio.to_thread(kafka_server.start)
        await broker.publish(40, topic, timeout=20)
        await eventually(lambda: len(handled) == 41, 20)
    finally:
        await broker.stop()
    assert set(handled.values()) == {1} and set(attempts) == {1}
    assert await committed(broker, topic, topic) == 41
