"""The other client library: what conformance does not ask of every source."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import ConsumerStoppedError

from millstream import Batch
from millstream.errors import ConnectError, NotConnected, PublishTimeout, SetupError
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


async def test_what_is_done_is_known_to_the_other_library(kafka: Any) -> None:
    """Both keep the same notes, so that a service can change from one to the other."""
    topic, handled = unique(), list[tuple[str, int, int]]()
    gate = asyncio.Event()

    def member(client: Any) -> KafkaBroker:
        broker = KafkaBroker(kafka.url, client=client, metadata_max_age_ms=300)

        @broker.subscriber(Topic(topic, 1), group_id=topic, concurrency=4)
        async def handler(body: int, message: KafkaMessage) -> None:
            if client == "aiokafka" and body == 0:
                await gate.wait()  # all behind it is done before
            handled.append((client, body, message.delivery_count))

        return broker

    old = member("aiokafka")
    await old.start()
    for i in range(20):
        await old.publish(i, topic, key=str(i))
    await eventually(lambda: len(handled) == 19)
    await old.stop()
    new = member("confluent")
    await new.start()
    await eventually(lambda: len(handled) == 20, 20)
    await new.publish(20, topic)
    await eventually(lambda: len(handled) == 21)
    await new.stop()
    assert handled[19:] == [("confluent", 0, 2), ("confluent", 20, 1)]


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
