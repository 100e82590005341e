"""Messages and groups shared with clients that know nothing of Millstream, both ways."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from millstream.kafka import KafkaBroker, KafkaMessage, Topic
from tests.helpers import eventually, unique
from tests.kafka.test_broker import committed, make
from tests.servers.kafka import tool


def taken(url: str, topic: str, count: int, group: str = "") -> list[Any]:
    """Messages by the raw client, from the beginning or as a member of a group."""
    settings = {"bootstrap.servers": url, "group.id": group or "look", "enable.auto.commit": False}
    settings["auto.offset.reset"] = "earliest"
    consumer, found = Consumer(settings), list[Any]()
    try:
        if group:
            consumer.subscribe([topic])
        else:
            numbers = consumer.list_topics(timeout=5).topics[topic].partitions
            consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in numbers])
        while len(found) < count:
            message = consumer.poll(10)
            assert message is not None, f"{len(found)} of {count}"
            assert message.error() is None, message.error()
            found.append(message)
        if group:
            consumer.commit(asynchronous=False)
        return found
    finally:
        consumer.close()


async def test_what_the_raw_client_sends_is_handled(kafka: Any) -> None:
    topic, got = unique(), list[Any]()
    broker = make(kafka)

    @broker.subscriber(topic, group_id=topic)
    async def handle(body: Any, message: KafkaMessage) -> None:
        got.append((body, message.key, dict(message.headers), message.is_tombstone))

    await broker.start()
    try:
        producer = Producer({"bootstrap.servers": kafka.url})
        producer.produce(topic, b'{"n": 1}', key=b"\xff\x00", headers=[("a", b"x"), ("b", None)])
        producer.produce(topic, None, key="gone")
        producer.produce(topic, b"[1, 2]", headers=[("a", b"first"), ("a", b"last")])
        await asyncio.to_thread(producer.flush, 10)
        await eventually(lambda: len(got) == 3)
    finally:
        await broker.stop()
    assert got[0] == ({"n": 1}, b"\xff\x00", {"a": "x", "b": ""}, False)
    assert got[1][1:] == (b"gone", {}, True)
    assert got[2] == ([1, 2], None, {"a": "last"}, False)


async def test_what_is_published_is_plain_for_others(kafka: Any) -> None:
    topic = unique()
    async with make(kafka) as broker:
        await broker.publish(
            {"n": 1}, topic, key="k", headers={"a": "ä"}, timestamp_ms=1_700_000_000_000
        )
        await broker.publish(b"\x00\xff", topic)
        await broker.publish(None, topic, key=b"k")
    first, second, third = await asyncio.to_thread(taken, kafka.url, topic, 3)
    assert (first.value(), first.key(), first.headers()) == (
        b'{"n":1}',
        b"k",
        [("a", "ä".encode())],
    )
    assert first.timestamp() == (1, 1_700_000_000_000)
    assert (second.value(), second.key(), second.headers()) == (b"\x00\xff", None, None)
    assert (third.value(), third.key()) == (None, b"k")


async def test_a_group_goes_on_where_another_client_stopped(kafka: Any) -> None:
    topic, got = unique(), list[int]()

    def ours() -> KafkaBroker:
        broker = make(kafka)

        @broker.subscriber(topic, group_id=topic)
        async def handle(body: int) -> None:
            got.append(body)

        return broker

    async with make(kafka) as sender:
        await sender.publish_batch(*range(3), topic=topic)
        await asyncio.to_thread(taken, kafka.url, topic, 3, topic)
        await sender.publish_batch(3, 4, topic=topic)
        broker = ours()
        await broker.start()
        await eventually(lambda: got == [3, 4])
        await broker.stop()
        assert await committed(sender, topic, topic) == 5
        await sender.publish(5, topic)
        [left] = await asyncio.to_thread(taken, kafka.url, topic, 1, topic)
        assert json.loads(left.value()) == 5
        await sender.publish(6, topic)
        broker = ours()
        await broker.start()
        await eventually(lambda: got == [3, 4, 6])
        await broker.stop()


async def test_aiokafka_both_ways(kafka: Any) -> None:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    there, back, got = unique(), unique(), list[Any]()
    broker = make(kafka)

    @broker.subscriber(Topic(there, 3), group_id=there)
    @broker.publisher(back)
    async def double(body: int, message: KafkaMessage) -> int:
        got.append((message.partition, message.key))
        return body * 2

    await broker.start()
    producer: Any = AIOKafkaProducer(bootstrap_servers=kafka.url)
    consumer: Any = AIOKafkaConsumer(
        back, bootstrap_servers=kafka.url, auto_offset_reset="earliest"
    )
    try:
        await producer.start()
        await consumer.start()
        places = [await producer.send_and_wait(there, b"%d" % n, key=b"k%d" % n) for n in range(6)]
        values = sorted([int((await consumer.getone()).value) for _ in range(6)])
        assert values == [0, 2, 4, 6, 8, 10]
        # Both put a key into the same partition.
        for n, place in enumerate(places):
            stored = await broker.publish(n, there, key=f"k{n}")
            assert stored.partition == place.partition
        await eventually(lambda: len(got) == 12)
    finally:
        await producer.stop()
        await consumer.stop()
        await broker.stop()


async def test_the_console_tools_both_ways(kafka: Any) -> None:
    topic, got = unique(), list[Any]()
    broker = make(kafka)

    @broker.subscriber(Topic(topic, 2), group_id=topic)
    @broker.publisher(f"{topic}.out", key="answers")
    async def handle(body: dict[str, int], message: KafkaMessage) -> dict[str, int]:
        got.append((body["n"], message.key, message.headers.get("h"), message.partition))
        return {"n": body["n"] * 2}

    await broker.start()
    where = ("--bootstrap-server", kafka.url)
    try:
        lines = "".join(f'h:x\tk{n}\t{{"n": {n}}}\n' for n in range(4))
        options = ("--property", "parse.key=true", "--property", "parse.headers=true")
        send = ("ConsoleProducer", *where, "--topic", topic, *options)
        await asyncio.to_thread(tool, *send, given=lines)
        await eventually(lambda: len(got) == 4)
        shown = [f"print.{what}=true" for what in ("key", "headers", "partition")]
        look = ("--from-beginning", "--max-messages", "4", "--topic", f"{topic}.out")
        formatted = [word for one in shown for word in ("--property", one)]
        said = await asyncio.to_thread(tool, "consumer.ConsoleConsumer", *where, *look, *formatted)
        rows = [line.split("\t") for line in said.splitlines()]
        assert sorted(json.loads(row[-1])["n"] for row in rows) == [0, 2, 4, 6]
        assert {row[2] for row in rows} == {"answers"}
        # The Java client puts a key where we do.
        for n, key, header, partition in got[:4]:
            assert (key, header) == (b"k%d" % n, "x")
            assert (await broker.publish({"n": 0}, topic, key=key)).partition == partition
        await eventually(lambda: len(got) == 8)
        await eventually(lambda: _lag_is_none(kafka.url, topic), 20)
    finally:
        await broker.stop()


async def _lag_is_none(url: str, group: str) -> bool:
    """What the operators' own tool says of the group."""
    describe = ("--bootstrap-server", url, "--describe", "--group", group)
    said = await asyncio.to_thread(tool, "consumer.group.ConsumerGroupCommand", *describe)
    rows = [line.split() for line in said.splitlines() if line.strip()]
    head = next(row for row in rows if "LAG" in row)
    at = head.index("LAG")
    lags = [row[at] for row in rows[rows.index(head) + 1 :]]
    return bool(lags) and all(lag in ("0", "-") for lag in lags) and "0" in lags
