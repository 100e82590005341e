"""Exactly-once in trouble: nodes of a cluster that die, an outage that outlives a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from millstream.errors import NotConnected, PublishError, PublishTimeout
from millstream.kafka import KafkaBroker, Topic
from tests.helpers import eventually, unique
from tests.kafka.test_transactions import QUICK, offset, read
from tests.servers.kafka import KafkaCluster


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


async def all_there(where: Any, out: str, wanted: Callable[[], set[int]]) -> None:
    def missing() -> set[int]:
        return wanted() - set(map(int, read(where, out)))

    await eventually(lambda: asyncio.to_thread(lambda: not missing()), 60)


def in_sync(cluster: KafkaCluster) -> bool:
    """Whether all copies of all partitions have caught up."""
    topics = AdminClient({"bootstrap.servers": cluster.url}).list_topics(timeout=5).topics
    partitions = [p for topic in topics.values() for p in topic.partitions.values()]
    return all(len(p.isrs) == len(p.replicas) == len(cluster.nodes) for p in partitions)


@pytest.mark.timeout(180)
async def test_each_result_is_there_once_though_every_node_dies_in_turn() -> None:
    topic, out, over = unique(), unique(), asyncio.Event()
    with KafkaCluster(3) as cluster:
        broker = doubling(cluster.url, topic, out, publish_timeout=20.0)
        await broker.start()
        [subscription] = broker.subscriptions
        sending = asyncio.create_task(send(cluster.url, topic, over))
        try:
            for node in cluster.nodes:  # the coordinators of group and transactions among them
                for step in (node.kill, node.start):
                    before = subscription.handled
                    await eventually(lambda b=before: subscription.handled > b + 50, 40)
                    await asyncio.to_thread(step)
                await eventually(lambda: asyncio.to_thread(in_sync, cluster), 40)
            over.set()
            confirmed = await sending
            await all_there(cluster, out, lambda: confirmed)
        finally:
            over.set()
            await broker.stop()
        found = list(map(int, read(cluster, out)))
        assert len(found) == len(set(found))
        handed_in = list(map(int, read(cluster, topic)))
        assert sorted(found) == sorted(handed_in)  # also what was stored and not confirmed
        assert offset(cluster, topic, topic) == len(handed_in)


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
