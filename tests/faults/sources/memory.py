"""The broker in this process."""

from __future__ import annotations

from typing import Any

from millstream.memory import MemoryBroker, MemoryBus, MemorySubscription
from tests.faults.sources.base import Setup, Source


class Memory(Source):
    """A durable store of a bus."""

    name = "memory"
    processes = False
    capabilities = MemorySubscription("a", durable="d").capabilities
    max_message = 1_000_000

    def __init__(self) -> None:
        self.bus = MemoryBus()

    def broker(self, setup: Setup) -> MemoryBroker:
        broker = MemoryBroker(self.bus, graceful_timeout=setup.grace)
        broker.driver.max_payload = self.max_message
        return broker

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"durable": "workers", "ack_deadline": setup.ack_wait}

    # Nothing looks into a store from outside: what was confirmed and not settled is held.

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        records = self.bus.records(f"{self.address(setup)}.dlq")
        return [(record.body, dict(record.headers)) for record in records]
