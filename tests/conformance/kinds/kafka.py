"""Kafka: consumer groups and readers without a group, on a server and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from millstream.clock import VirtualClock
from millstream.kafka import KafkaBroker, TestKafkaBroker, Topic
from millstream.kafka.options import KafkaSubscription
from tests.conformance.bench import Bench, Kind, started


def kafka(bench: Bench) -> KafkaBroker:
    # New topics of a pattern are seen soon.
    return KafkaBroker(bench.url, metadata_max_age_ms=300)


def aiokafka(bench: Bench) -> KafkaBroker:
    return KafkaBroker(bench.url, client="aiokafka", metadata_max_age_ms=300)


def reader(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {}


def group(bench: Bench, address: str, group: str) -> dict[str, Any]:
    options: dict[str, Any] = {"group_id": f"{bench.prefix}-{group}"}
    if group == "workers":  # its members share partitions, and are to have them soon
        options["address"] = Topic(address, 4)
        options |= {"heartbeat_interval_ms": 100, "partition_assignment_strategy": "range"}
    return options


@asynccontextmanager
async def in_memory(bench: Bench) -> AsyncIterator[None]:
    bench.clock = VirtualClock()
    async with TestKafkaBroker(*bench.brokers, clock=bench.clock, wait=False):
        yield


_READER = KafkaSubscription("a").capabilities
_GROUP = KafkaSubscription("a", group_id="g").capabilities
_LACKS = frozenset({"absence", "hand-over"})

KINDS = [
    Kind("test-kafka", _READER, kafka, in_memory, reader, too_large=2_000_000, lacks=_LACKS),
    Kind("test-kafka-group", _GROUP, kafka, in_memory, group, too_large=2_000_000, lacks=_LACKS),
    Kind(
        "kafka",
        _READER,
        kafka,
        started,
        reader,
        server="kafka",
        too_large=2_000_000,
        lacks=_LACKS,
    ),
    Kind(
        "kafka-group",
        _GROUP,
        kafka,
        started,
        group,
        server="kafka",
        too_large=2_000_000,
        lacks=_LACKS,
    ),
    *(
        Kind(
            f"aiokafka{suffix}",
            capabilities,
            aiokafka,
            started,
            options,
            server="kafka",
            too_large=2_000_000,
            lacks=_LACKS,
        )
        for suffix, capabilities, options in (("", _READER, reader), ("-group", _GROUP, group))
    ),
]
