"""NATS: core and JetStream, on a server and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from millstream.clock import VirtualClock
from millstream.nats import ConsumerConfig, NatsBroker
from millstream.nats.options import NatsSubscription
from millstream.nats.testing import TestNatsBroker
from tests.conformance.bench import Bench, Kind, started


def nats(bench: Bench) -> NatsBroker:
    return NatsBroker(bench.url)


def nats_core(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"queue": group}


def nats_stream(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {
        "stream": bench.prefix,
        "durable": group,
        "config": ConsumerConfig(ack_wait=2.0),
    }


@asynccontextmanager
async def in_memory(bench: Bench) -> AsyncIterator[None]:
    bench.clock = VirtualClock()
    async with TestNatsBroker(*bench.brokers, clock=bench.clock, wait=False):
        yield


_CORE = NatsSubscription("a").capabilities
_STREAM = NatsSubscription("a", stream="s", durable="d").capabilities

KINDS = [
    Kind("test-nats", _CORE, nats, in_memory, nats_core, too_large=2_000_000),
    Kind(
        "test-jetstream",
        _STREAM,
        nats,
        in_memory,
        nats_stream,
        too_large=2_000_000,
        dead=lambda bench, address: f"{bench.prefix}.dlq",
        stored=lambda bench: {"stream": bench.prefix},
    ),
    Kind("nats", _CORE, nats, started, nats_core, server="nats", too_large=2_000_000),
    Kind(
        "jetstream",
        _STREAM,
        nats,
        started,
        nats_stream,
        server="nats",
        too_large=2_000_000,
        dead=lambda bench, address: f"{bench.prefix}.dlq",
        stored=lambda bench: {"stream": bench.prefix},
    ),
]
