"""The other client library: what conformance does not ask of every source."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.errors import ConsumerStoppedError, KafkaConnectionError
from aiokafka.errors import KafkaError as AioError
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from millstream import Batch
from millstream.errors import (
    ConnectError,
    MessageTooLarge,
    NotConnected,
    PublishTimeout,
    SetupError,
)
from millstream.kafka import KafkaBroker, KafkaMessage, Topic, aio_reader
from millstream.kafka.annotations import KafkaBatchMessage
from tests.helpers import eventually, unique
from tests.kafka.test_broker import committed


def make(kafka: Any, **options: Any) -> KafkaBroker:
    return KafkaBroker(kafka.url, client="aiokafka", metadata_max_age_ms=300, **options)


async def test_members_come_and_go_and_nothing_is_lost(kafka: Any) -> None:
    topic, handled = unique(), Counter[int]()

    def member() -> KafkaBroker:
        broker = make(kafka)

        @broker.subscriber(
            Topic(topic, 4),
            group_id=topic,
            concurrency=4,
            heartbeat_interval_ms=100,
            session_timeout_ms=3000,
        )
        async def handler(body: int) -> None:
            await asyncio.sleep(0.002)
            handled[body] += 1

        return broker

    async def send() -> None:
        for i in range(600):
            await first.publish(i, topic, key=str(i))
            await asyncio.sleep(0.002)

    first = member()
    await first.start()
    sending = asyncio.create_task(send())
    for _ in range(3):
        second = member()
        await second.start()
        await asyncio.sleep(0.3)
        await second.stop()
    await sending
    await eventually(lambda: len(handled) == 600, 20)
    await first.stop()
    assert set(handled.values()) == {1}
    async with KafkaBroker(kafka.url) as broker:
        assert await committed(broker, topic, topic) == 600


@pytest.mark.parametrize(("one", "other"), [("aiokafka", "confluent"), ("confluent", "aiokafka")])
async def test_what_is_done_is_known_to_the_other_library(kafka: Any, one: str, other: str) -> None:
    """Both keep the same notes, so that a service can change from one to the other."""
    topic, handled = unique(), list[tuple[str, int, int]]()
    gate = asyncio.Event()

    def member(client: Any) -> KafkaBroker:
        broker = KafkaBroker(kafka.url, client=client, metadata_max_age_ms=300)

        @broker.subscriber(Topic(topic, 1), group_id=topic, concurrency=4)
        async def handler(body: int, message: KafkaMessage) -> None:
            if client == one and body == 0:
                await gate.wait()  # all behind it is done before
            handled.append((client, body, message.delivery_count))

        return broker

    old = member(one)
    await old.start()
    for i in range(20):
        await old.publish(i, topic, key=str(i))
    await eventually(lambda: len(handled) == 19)
    await old.stop()
    new = member(other)
    await new.start()
    await eventually(lambda: len(handled) == 20, 20)
    await new.publish(20, topic)
    await eventually(lambda: len(handled) == 21)
    await new.stop()
    assert handled[19:] == [(other, 0, 2), (other, 20, 1)]


async def test_notes_are_read_by_the_other_library_as_they_were_written(kafka: Any) -> None:
    topic, gate = unique(), asyncio.Event()
    broker = make(kafka)

    @broker.subscriber(Topic(topic, 1), group_id=topic, auto_commit_interval_ms=20)
    async def handler(body: int) -> None:
        await gate.wait()

    def notes() -> list[str]:
        settings = {"bootstrap.servers": kafka.url, "group.id": topic}
        with Consumer(settings) as consumer:
            place = TopicPartition(topic, 0)
            return [consumer.committed([place], timeout=5)[0].metadata or "" for _ in range(20)]

    await broker.start()
    try:
        await broker.publish(1, topic)
        # Of 24 characters: memory has no room for an end behind them that is there by luck.
        await eventually(lambda: asyncio.to_thread(lambda: len(notes()[0]) == 24), 10)
        found = await asyncio.to_thread(notes)
        assert len(set(found)) == 1 and found[0].startswith("{") and found[0].endswith("}")
    finally:
        gate.set()
        await broker.stop()


async def test_a_group_that_does_not_tell_its_offsets_is_waited_for(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, got = unique(), list[int]()

    def member() -> KafkaBroker:
        broker = make(kafka)

        @broker.subscriber(topic, group_id=topic, auto_offset_reset="latest")
        async def handler(body: int) -> None:
            got.append(body)

        return broker

    first = member()
    await first.start()
    await first.publish(1, topic)
    await eventually(lambda: got == [1])
    await first.stop()
    asked, real = list[int](), AIOKafkaAdminClient.list_consumer_group_offsets

    async def loading(*args: Any, **options: Any) -> Any:
        asked.append(1)
        # What the library makes of an error of the whole group.
        return {} if len(asked) < 5 else await real(*args, **options)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", loading)
    second = member()
    async with KafkaBroker(kafka.url) as other:
        await other.publish(2, topic)
    await second.start()
    try:
        await eventually(lambda: got == [1, 2])
        await second.publish(3, topic)
        await eventually(lambda: got == [1, 2, 3])
    finally:
        await second.stop()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AIOKafkaConsumer, "getmany"),
        (AIOKafkaConsumer, "pause"),
        # In a task of its own, which nobody looks at: its reader would go on with nothing.
        (Fetcher, "_proc_fetch_request"),
    ],
    ids=["reading", "beginning", "fetching"],
)
async def test_a_reader_that_breaks_is_no_silent_one(
    kafka: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type,
    name: str,
) -> None:
    topic, got, failed = unique(), list[int](), list[bool]()
    real = getattr(kind, name)

    def failing(*args: Any, **options: Any) -> Any:
        if not failed:
            failed.append(True)
            raise LookupError("it went wrong")
        return real(*args, **options)

    monkeypatch.setattr(kind, name, failing)
    broker = make(kafka)

    @broker.subscriber(topic, group_id=topic, session_timeout_ms=3000)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish(1, topic)
        await eventually(lambda: got == [1], 20)
    finally:
        await broker.stop()
    assert caplog.text.count("it went wrong") == 1


async def test_what_the_cluster_refuses_holds_up_nothing_behind_it(kafka: Any) -> None:
    topic, got = unique(), list[int]()
    broker = make(kafka)

    @broker.subscriber(Topic(topic, 1, config={"max.message.bytes": "2000"}), group_id=topic)
    async def handler(body: list[Any]) -> None:
        got.append(body[0])

    async def publish(number: int, size: int) -> str:
        try:
            await broker.publish([number, "x" * size], topic)
        except MessageTooLarge:
            return "refused"
        return "stored"

    await broker.start()
    try:
        ends = [await publish(n, size) for n, size in enumerate((1, 5000, 1, 1, 5000, 1))]
        assert ends == ["stored", "refused", "stored", "stored", "refused", "stored"]
        sizes = [5000 if n % 7 == 0 else 1 for n in range(10, 110)]
        ends = await asyncio.gather(*(publish(n, size) for n, size in enumerate(sizes, 10)))
        stored = [n for n, end in enumerate(ends, 10) if end == "stored"]
        # A large one takes those of its batch with it, and nothing else.
        assert await publish(200, 1) == "stored"
        await eventually(lambda: 200 in got)
        assert got == [0, 2, 3, 5, *stored, 200]
    finally:
        await broker.stop()


async def test_a_producer_that_failed_for_good_is_replaced(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, made, real = unique(), list[Any](), AIOKafkaProducer.send

    async def send(producer: Any, *args: Any, **options: Any) -> Any:
        if producer not in made:
            made.append(producer)
        if producer is made[0]:  # what it says once its task has ended
            raise AioError("Unexpected error during batch delivery")
        return await real(producer, *args, **options)

    monkeypatch.setattr(AIOKafkaProducer, "send", send)
    async with make(kafka) as broker:
        assert (await broker.publish(1, topic)).offset == 0
        assert (await broker.publish(2, topic)).offset == 1
    assert len(made) == 2


@pytest.mark.parametrize(
    ("kind", "name"), [(AIOKafkaAdminClient, "create_topics"), (AIOKafkaConsumer, "start")]
)
async def test_a_connection_that_goes_during_a_start_is_no_end_of_it(
    kafka: Any, monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    topic, got, asked = unique(), list[int](), list[bool]()
    broker, real = make(kafka), getattr(kind, name)

    async def failing(*args: Any, **options: Any) -> Any:
        asked.append(True)
        answer = await real(*args, **options)
        if len(asked) == 1:
            raise KafkaConnectionError("it went before the answer came")
        return answer

    @broker.subscriber(topic, group_id=topic)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.connect()
    monkeypatch.setattr(kind, name, failing)
    await broker.start()
    try:
        await broker.publish(1, topic)
        await eventually(lambda: got == [1])
        assert asked
    finally:
        await broker.stop()


async def test_a_connection_that_has_ended_ends_nothing_else(
    kafka: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    topic, got, left = unique(), list[int](), [0]
    real = asyncio.StreamWriter.write

    def write(writer: asyncio.StreamWriter, data: bytes) -> None:
        if left[0] and not writer.is_closing():
            left[0] -= 1
            writer.transport.abort()
            raise RuntimeError("the handler is closed")  # as uvloop says it
        real(writer, data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", write)
    broker = make(kafka)

    @broker.subscriber(topic, group_id=topic, heartbeat_interval_ms=100)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        for n in range(20):
            left[0] = 5  # fetching, committing, publishing, asking for the cluster's layout
            await broker.publish(n, topic)
            await eventually(lambda n=n: n in got)
        assert sorted(set(got)) == list(range(20))
        assert "lost" not in caplog.text
    finally:
        left[0] = 0
        await broker.stop()


async def test_a_topic_that_was_made_anew_is_read_from_its_beginning(kafka: Any) -> None:
    topic, got = unique(), list[int]()
    broker = make(kafka, allow_auto_create_topics=False)
    admin = AdminClient({"bootstrap.servers": kafka.url})

    def make_it() -> None:
        try:
            admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(5)
        except KafkaException as error:  # the cluster, as a reader asked for it
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise

    def renew() -> None:
        admin.delete_topics([topic])[topic].result(5)
        make_it()

    @broker.subscriber(topic, group_id=topic, session_timeout_ms=3000)
    async def handler(body: int) -> None:
        got.append(body)

    await asyncio.to_thread(make_it)
    await broker.start()
    try:
        for n in range(20):
            await broker.publish(n, topic)
        await eventually(lambda: len(got) == 20)
        await asyncio.to_thread(renew)
        for n in range(20, 25):
            await broker.publish(n, topic)
        await eventually(lambda: len(got) == 25, 20)
        assert got == list(range(25))
    finally:
        await broker.stop()


async def test_batches_tombstones_and_seeking(kafka: Any) -> None:
    topic, got = unique(), list[list[Any]]()
    broker = make(kafka)

    subscriber = broker.subscriber(Topic(topic, 1), group_id=topic, batch=Batch(50, 0.1))

    @subscriber
    async def handler(bodies: list[Any], batch: KafkaBatchMessage) -> None:
        got.append(list(batch.messages))

    await broker.start()
    try:
        await broker.publish_batch(*range(120), topic=topic)
        receipt = await broker.publish(None, topic, key=b"k")
        assert (receipt.topic, receipt.offset) == (topic, 120)
        await eventually(lambda: sum(map(len, got)) == 121)
        assert max(map(len, got)) == 50
        assert got[-1][-1].is_tombstone and got[-1][-1].key == b"k"
        got.clear()
        await subscriber.seek(100)
        await eventually(lambda: sum(map(len, got)) == 21)
        assert got[0][0].offset == 100
    finally:
        await broker.stop()


async def test_the_server_comes_back(kafka_server: Any) -> None:
    topic, got = unique(), set[int]()
    broker = make(kafka_server, publish_timeout=2.0)

    @broker.subscriber(topic, group_id=topic, session_timeout_ms=3000, heartbeat_interval_ms=300)
    async def handler(body: int) -> None:
        got.add(body)

    await broker.start()
    try:
        await broker.publish(1, topic)
        await eventually(lambda: got == {1})
        await asyncio.to_thread(kafka_server.kill)
        with pytest.raises((PublishTimeout, NotConnected)):
            await broker.publish(2, topic)
        await asyncio.to_thread(kafka_server.start)
        await broker.publish(3, topic, timeout=20.0)
        await eventually(lambda: 3 in got, 30)
    finally:
        await broker.stop()


async def test_a_stop_does_not_wait_for_a_cluster_that_is_away(kafka_server: Any) -> None:
    topic, got = unique(), list[int]()
    broker = make(kafka_server, publish_timeout=1.0)

    @broker.subscriber(topic, group_id=topic, session_timeout_ms=3000)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, topic)
    await eventually(lambda: got == [1])
    await asyncio.to_thread(kafka_server.kill)
    with pytest.raises((PublishTimeout, NotConnected)):
        await broker.publish(2, topic)
    async with asyncio.timeout(20):
        await broker.stop()


async def test_a_cancellation_that_the_library_swallows_keeps_nothing_open(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, swallowed = list[Any](), list[bool]()

    class Swallowing(AIOKafkaConsumer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        async def getmany(self, *args: Any, **options: Any) -> Any:
            try:
                return await super().getmany(*args, **options)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(True)
                return {}

    monkeypatch.setattr(aio_reader, "AIOKafkaConsumer", Swallowing)
    topic, got = unique(), list[int]()
    broker = make(kafka)

    @broker.subscriber(topic, group_id=topic)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, topic)
    await eventually(lambda: got == [1])
    async with asyncio.timeout(4):
        await broker.stop()
    assert swallowed
    with pytest.raises(ConsumerStoppedError):
        await made[0].getone()


def test_what_it_does_not_know_is_said_at_once(kafka: Any) -> None:
    def failing(**options: Any) -> str:
        broker = make(kafka)

        @broker.subscriber("a", group_id="g", **options)
        async def handler(body: int) -> None: ...

        with pytest.raises(SetupError) as caught:
            broker.compile()
        return str(caught.value)

    assert "group_protocol='consumer' with client='aiokafka'" in failing(group_protocol="consumer")
    assert "one of range" in failing(partition_assignment_strategy="cooperative-sticky")
    with pytest.raises(SetupError, match="take client='confluent'"):
        make(kafka, transactional_id="a")
    with pytest.raises(SetupError, match="'confluent' or 'aiokafka'"):
        KafkaBroker(client="kafka-python")  # type: ignore[arg-type]


async def test_nobody_is_there() -> None:
    broker = KafkaBroker("127.0.0.1:1", client="aiokafka", startup_timeout=1.0)
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:1"):
        await broker.connect()
