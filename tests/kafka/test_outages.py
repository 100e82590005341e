"""Exactly-once in trouble: nodes of a cluster that die, an outage that outlives a transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from millstream.errors import NotConnected, PublishError, PublishTimeout
from millstream.kafka import KafkaBroker, Topic, transactor
from tests.helpers import eventually, unique
from tests.kafka.test_transactions import QUICK, offset, read
from tests.servers.kafka import KafkaCluster, KafkaServer


def doubling(url: str, topic: str, out: str, **options: Any) -> KafkaBroker:
    """A service that publishes what it gets, in transactions."""
    broker = KafkaBroker(url, transactional_id=topic, metadata_max_age_ms=500, **options)

    @broker.subscriber(
        Topic(topic, 3), group_id=topic, concurrency=4, transaction_interval_ms=30, **QUICK
    )
    @broker.publisher(Topic(out, 2))
    async def handle(body: int) -> int:
        await asyncio.sleep(0.005)
        return body

    return broker


async def send(url: str, topic: str, over: asyncio.Event) -> set[int]:
    """Publish numbers until it is over; those that are confirmed."""
    confirmed: set[int] = set()
    async with KafkaBroker(url, metadata_max_age_ms=500, publish_timeout=3.0) as broker:
        number = 0
        while not over.is_set():
            try:
                await broker.publish(number, topic, key=f"{number % 20}")
                confirmed.add(number)
            except (NotConnected, PublishTimeout, PublishError):
                await asyncio.sleep(0.1)
            number += 1
            await asyncio.sleep(0.005)
    return confirmed


async def all_there(
    where: Any, out: str, wanted: Callable[[], set[int]], timeout: float = 60
) -> None:
    def missing() -> set[int]:
        return wanted() - set(map(int, read(where, out)))

    await eventually(lambda: asyncio.to_thread(lambda: not missing()), timeout)


def coordinator(cluster: KafkaCluster, group: str) -> KafkaServer:
    """The node that keeps the offsets of a group."""
    admin = AdminClient({"bootstrap.servers": cluster.url})
    port = admin.describe_consumer_groups([group])[group].result().coordinator.port
    return next(node for node in cluster.nodes if node.url.endswith(f":{port}"))


def in_sync(cluster: KafkaCluster) -> bool:
    """Whether all copies of all partitions have caught up."""
    topics = AdminClient({"bootstrap.servers": cluster.url}).list_topics(timeout=5).topics
    partitions = [p for topic in topics.values() for p in topic.partitions.values()]
    return all(len(p.isrs) == len(p.replicas) == len(cluster.nodes) for p in partitions)


Works = Callable[[], Awaitable[None]]


async def once_each(
    trouble: Callable[[KafkaCluster, str, Works], Awaitable[None]], patience: float
) -> None:
    """Have a cluster in trouble while messages pass: each result is there once at the end.

    ``trouble`` gets a function that returns once some more messages were handled.
    """
    topic, out, over = unique(), unique(), asyncio.Event()
    with KafkaCluster(3) as cluster:
        broker = doubling(cluster.url, topic, out, publish_timeout=20.0)
        await broker.start()
        [subscription] = broker.subscriptions
        sending = asyncio.create_task(send(cluster.url, topic, over))

        async def works() -> None:
            before = subscription.handled
            await eventually(lambda: subscription.handled > before + 50, 40)

        try:
            await trouble(cluster, topic, works)
            over.set()
            confirmed = await sending
            await all_there(cluster, out, lambda: confirmed, patience)
        finally:
            over.set()
            await broker.stop()
        found = list(map(int, read(cluster, out)))
        assert len(found) == len(set(found))
        handed_in = list(map(int, read(cluster, topic)))
        assert sorted(found) == sorted(handed_in)  # also what was stored and not confirmed
        assert offset(cluster, topic, topic) == len(handed_in)


@pytest.mark.timeout(180)
async def test_each_result_is_there_once_though_every_node_dies_in_turn() -> None:
    async def trouble(cluster: KafkaCluster, topic: str, works: Works) -> None:
        for node in cluster.nodes:  # the coordinators of group and transactions among them
            for step in (node.kill, node.start):
                await works()
                await asyncio.to_thread(step)
            await eventually(lambda: asyncio.to_thread(in_sync, cluster), 40)

    await once_each(trouble, 60)


@pytest.mark.timeout(120)
async def test_an_outage_longer_than_a_transaction_may_last(kafka_server: Any) -> None:
    topic, out = unique(), unique()
    broker = doubling(
        kafka_server.url, topic, out, publish_timeout=30.0, transaction_timeout_ms=2000
    )
    await broker.start()
    try:
        await broker.publish_batch(*range(400), topic=topic)
        await eventually(lambda: broker.subscriptions[0].handled > 50)
        await asyncio.to_thread(kafka_server.kill)
        await asyncio.sleep(4)  # the cluster aborts what was open as soon as it is back
        await asyncio.to_thread(kafka_server.start)
        await broker.publish_batch(*range(400, 500), topic=topic)
        await all_there(kafka_server, out, lambda: set(range(500)))
    finally:
        await broker.stop()
    assert sorted(map(int, read(kafka_server, out))) == list(range(500))
    assert offset(kafka_server, topic, topic) == 500


@pytest.mark.timeout(150)
async def test_the_coordinator_of_the_group_dies_for_good() -> None:
    async def trouble(cluster: KafkaCluster, topic: str, works: Works) -> None:
        await works()
        await eventually(lambda: asyncio.to_thread(in_sync, cluster), 40)
        await asyncio.to_thread(coordinator(cluster, topic).kill)
        await works()

    # The library itself would wait for the dead one until the cluster gives us up.
    await once_each(trouble, 30)


async def test_a_library_that_does_not_come_back_is_left_behind(
    kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librdkafka's issue 5511: it waits for a coordinator that is gone, whatever time it has."""
    topic, out, calls, gate = unique(), unique(), list[float](), threading.Event()

    class Waiting(Producer):
        def send_offsets_to_transaction(self, offsets: Any, member: Any, timeout: float) -> None:
            calls.append(timeout)
            if len(calls) == 1:
                gate.wait()
            super().send_offsets_to_transaction(offsets, member, timeout)

    monkeypatch.setattr(transactor, "Producer", Waiting)
    broker = doubling(kafka.url, topic, out)
    await broker.start()
    try:
        await broker.publish_batch(*range(100), topic=topic)
        await all_there(kafka, out, lambda: set(range(100)), 20)
        gate.set()  # what was left behind comes too late to do anything
        await broker.publish_batch(*range(100, 200), topic=topic)
        await all_there(kafka, out, lambda: set(range(200)), 20)
    finally:
        gate.set()
        await broker.stop()
    assert sorted(map(int, read(kafka, out))) == list(range(200))
    assert offset(kafka, topic, topic) == 200
    assert calls[0] == 5.0
