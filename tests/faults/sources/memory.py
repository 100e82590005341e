"""The broker in this process."""

from __future__ import annotations

from typing import Any

from millstream.memory import MemoryBroker, MemoryBus
from tests.faults.sources.base import Setup, Source


class Memory(Source):
    """The broker in this process, with a durable store."""

    name = "memory"
    processes = False

    def __init__(self) -> None:
        self.bus = MemoryBus()

    def broker(self, setup: Setup) -> MemoryBroker:
        return MemoryBroker(self.bus, graceful_timeout=setup.grace)

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"durable": "workers", "ack_deadline": setup.ack_wait}

    async def held(self, broker: Any, setup: Setup) -> int:
        # Nothing looks into a store from outside: what was confirmed and not settled is held.
        return -1

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        records = self.bus.records(f"{setup.subject}.dlq")
        return [(record.body, dict(record.headers)) for record in records]
