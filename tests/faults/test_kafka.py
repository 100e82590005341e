"""What only Kafka has: groups that rebalance all the time, a cluster that loses a node."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from millstream import Retry
from millstream.errors import NotConnected, PublishError, PublishTimeout
from millstream.kafka import KafkaBroker, Topic
from tests.faults import registry
from tests.faults.harness import Trial, write_result
from tests.faults.sources.base import Setup
from tests.faults.sources.kafka import KafkaGroup
from tests.helpers import eventually, unique
from tests.servers.kafka import KafkaCluster


class KafkaEager(KafkaGroup):
    """A group that lets go of all partitions whenever it rebalances."""

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return super().subscription(setup) | {"partition_assignment_strategy": "range"}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SOURCES, "kafka-eager", KafkaEager)


def loop(source: str) -> str:
    eager = source in ("kafka-eager", "kafka-aiokafka")  # aiokafka has no other way
    return "Rebalance in a loop, eager" if eager else "Rebalance in a loop"


ALL = ["kafka", "kafka-848", "kafka-aiokafka"]
GROUPS = pytest.mark.parametrize("source", ["kafka-eager", *ALL])


@GROUPS
@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("eager")
async def test_members_come_and_go_all_the_time(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, concurrency=4, work=0.02) as trial:
        await trial.worker()
        async with trial.load(pace=0.01):
            for _ in range(6):
                await trial.working(20)
                other = await trial.worker()
                await trial.working(20)
                await other.stop()
        await trial.verdict(f"{loop(source)}, 12 times", "no loss, no duplicate")


@GROUPS
@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("eager")
async def test_members_die_all_the_time(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, concurrency=4, work=0.02, attempts=20) as trial:
        await trial.worker()
        async with trial.load(pace=0.01):
            for _ in range(6):
                await trial.working(20)
                other = await trial.worker()
                await trial.working(20)
                await other.kill()
        await trial.verdict(
            f"{loop(source)}, 6 members killed", "no loss, few duplicates", duplicates=6 * 4
        )


@pytest.mark.faults
@pytest.mark.parametrize("source", ALL)
async def test_a_worker_of_many_lanes_stands_still(tmp_path: Path, source: str) -> None:
    async with Trial(source, tmp_path, ack_wait=1.0, work=0.1, concurrency=8) as trial:
        worker = await trial.worker(2)
        async with trial.load(pace=0.01, keys=50):
            await trial.working(20)
            frozen = worker.pids[0]
            async with trial.fault("stopped", [frozen]):
                worker.send(signal.SIGSTOP, frozen)
                await asyncio.sleep(2.5)
                worker.send(signal.SIGCONT, frozen)
                before = len(trial.effects())
            await trial.until(lambda: len(trial.effects()) > before + 50)
        # Only what ran: nothing that waited in a lane.
        await trial.verdict(
            "F11 worker of 8 lanes frozen past its session",
            "no loss, the others go on",
            duplicates=8,
        )


@pytest.mark.faults
@pytest.mark.timeout(240)
@pytest.mark.parametrize("source", ALL)
async def test_a_node_of_three_is_killed_under_load(source: str) -> None:
    topic, handled, confirmed = unique(), Counter[int](), set[int]()
    over = asyncio.Event()
    cluster = KafkaCluster(3)
    try:
        await asyncio.to_thread(cluster.start)
        broker = KafkaBroker(
            cluster.url,
            client="aiokafka" if source == "kafka-aiokafka" else "confluent",
            metadata_max_age_ms=1000,
            publish_timeout=10.0,
        )

        @broker.subscriber(
            Topic(topic, 6),
            group_id=topic,
            group_protocol="consumer" if source == "kafka-848" else "classic",
            concurrency=8,
            auto_commit_interval_ms=100,
            retry=Retry(5, delay=0.1),
        )
        async def handle(body: int) -> None:
            await asyncio.sleep(0.01)
            handled[body] += 1

        async def sending() -> None:
            number = 0
            while not over.is_set():
                number += 1
                while True:
                    try:
                        await broker.publish(number, topic, key=f"{number % 20}")
                        break
                    except (NotConnected, PublishTimeout, PublishError):
                        await asyncio.sleep(0.1)
                confirmed.add(number)
                await asyncio.sleep(0.005)

        await broker.start()
        task = asyncio.create_task(sending())
        for node in cluster.nodes:  # one after the other: the group's coordinator is among them
            before = len(handled)
            await eventually(lambda before=before: len(handled) > before + 100, 30)
            await asyncio.to_thread(node.kill)
            before = len(handled)
            await eventually(lambda before=before: len(handled) > before + 100, 30)
            await asyncio.to_thread(node.start)
            await asyncio.sleep(3)  # until its copies have caught up
        over.set()
        await asyncio.wait_for(task, 30)
        await eventually(lambda: confirmed <= handled.keys(), 30)
        await broker.stop()
        # Twice at most what a commit that did not arrive had told.
        again = sum(handled.values()) - len(handled)
        assert again <= 3 * 100
        write_result(
            "Nodes of a cluster of three killed under load, one after the other",
            source,
            "no loss, goes on, few duplicates",
            sent=len(confirmed),
            lost=len(confirmed - handled.keys()),
            duplicated=again,
        )
    finally:
        await asyncio.to_thread(cluster.remove)
