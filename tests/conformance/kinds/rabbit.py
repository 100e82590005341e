"""RabbitMQ: quorum and classic queues and streams, on a server and in memory.

All brokers of a bench share a topic exchange, so that an address is a routing key and each
subscription has a queue of its own, or shares one with its group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from millstream.clock import VirtualClock
from millstream.rabbit import ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue
from millstream.rabbit.options import RabbitSubscription
from millstream.rabbit.testing import RabbitMemoryDriver, TestRabbitBroker
from tests.conformance.bench import Bench, Kind, started
from tests.servers.rabbit import MAX_MESSAGE


def rabbit(bench: Bench) -> RabbitBroker:
    exchange = RabbitExchange(bench.prefix, ExchangeType.TOPIC)
    if bench.kind.server is None:
        return RabbitBroker(default_exchange=exchange)
    return RabbitBroker(bench.url, default_exchange=exchange)


def _free(bench: Bench, address: str) -> str:
    """A queue's name: that of the address, where no other queue has it."""
    bench.shared = bench.shared or {}
    number = bench.shared[address] = bench.shared.get(address, 0) + 1
    return address if number == 1 else f"{address}.{number}"


def _queues(kind: QueueType) -> Callable[[Bench, str, str], dict[str, Any]]:
    def source(bench: Bench, address: str, group: str) -> dict[str, Any]:
        alone = not group or group.startswith("own-")
        name = _free(bench, address) if alone else f"{address}.{group}"
        return {"address": RabbitQueue(name, kind, routing_key=address)}

    return source


def plain(bench: Bench, address: str) -> dict[str, Any]:
    name = _free(bench, address)
    return {"address": RabbitQueue(name, routing_key=address)}


@asynccontextmanager
async def in_memory(bench: Bench) -> AsyncIterator[None]:
    bench.clock = VirtualClock()
    async with TestRabbitBroker(*bench.brokers, clock=bench.clock, wait=False):
        yield


def _kind(name: str, queue: QueueType, *, real: bool) -> Kind:
    return Kind(
        name,
        RabbitSubscription(RabbitQueue("a", queue)).capabilities,
        rabbit,
        started if real else in_memory,
        _queues(queue),
        server="rabbit" if real else None,
        too_large=2 * MAX_MESSAGE if real else RabbitMemoryDriver.max_payload + 1,
        plain=plain,
        # Letters lie in a quorum queue with a delivery limit, which puts what was looked at last.
        lacks=frozenset({"letter order"}) if real else frozenset(),
    )


KINDS = [
    _kind("test-rabbit", QueueType.QUORUM, real=False),
    _kind("test-rabbit-stream", QueueType.STREAM, real=False),
    _kind("rabbit", QueueType.QUORUM, real=True),
    _kind("rabbit-classic", QueueType.CLASSIC, real=True),
    _kind("rabbit-stream", QueueType.STREAM, real=True),
]
