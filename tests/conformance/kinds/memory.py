"""The broker in this process."""

from __future__ import annotations

from typing import Any

from millstream.clock import VirtualClock
from millstream.memory import MemoryBroker, MemoryBus, MemorySubscription
from tests.conformance.bench import Bench, Kind, started


def memory(bench: Bench) -> MemoryBroker:
    bench.clock = bench.clock or VirtualClock()
    bench.shared = bench.shared or MemoryBus()
    broker = MemoryBroker(bench.shared, clock=bench.clock)
    broker.driver.max_payload = 1_000_000
    return broker


def memory_plain(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"queue": group}


def memory_durable(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"durable": f"{bench.prefix}-{group}", "ack_deadline": 2.0}


KINDS = [
    Kind(
        "memory",
        MemorySubscription("a").capabilities,
        memory,
        started,
        memory_plain,
        too_large=2_000_000,
    ),
    Kind(
        "memory-durable",
        MemorySubscription("a", durable="d").capabilities,
        memory,
        started,
        memory_durable,
        too_large=2_000_000,
    ),
]
