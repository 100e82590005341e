"""Redis and Valkey: channels, streams and lists, on a server and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from millstream.clock import VirtualClock
from millstream.redis import ListSub, RedisBroker, StreamSub
from millstream.redis.message import LIST, STREAM
from millstream.redis.options import RedisSubscription, plain_name
from millstream.redis.testing import TestRedisBroker
from tests.conformance.bench import Bench, Kind, started


def channels(bench: Bench) -> RedisBroker:
    return RedisBroker(_url(bench))


def streams(bench: Bench) -> RedisBroker:
    bench.prefix = STREAM + plain_name(bench.prefix)
    return RedisBroker(_url(bench))


def lists(bench: Bench) -> RedisBroker:
    bench.prefix = LIST + plain_name(bench.prefix)
    return RedisBroker(_url(bench))


def _url(bench: Bench) -> str:
    return bench.url if bench.kind.server else "redis://127.0.0.1:1"


def channel(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {}


def stream(bench: Bench, address: str, group: str) -> dict[str, Any]:
    name = plain_name(address)
    return {"address": None, "stream": StreamSub(name, group=group, ack_wait=2.0)}


def list_(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"address": None, "list": ListSub(plain_name(address), ack_wait=2.0)}


def dead(bench: Bench, address: str) -> str:
    return f"{STREAM}{plain_name(address)}.dlq"


@asynccontextmanager
async def in_memory(bench: Bench) -> AsyncIterator[None]:
    bench.clock = VirtualClock()
    async with TestRedisBroker(*bench.brokers, clock=bench.clock, wait=False):
        yield


_CHANNEL = RedisSubscription("a").capabilities
_STREAM = RedisSubscription(stream=StreamSub("s", group="g")).capabilities
_LIST = RedisSubscription(list="l").capabilities

KINDS = [
    kind
    for server, run in ((None, in_memory), ("redis", started), ("valkey", started))
    for kind in (
        Kind(
            server or "test-redis",
            _CHANNEL,
            channels,
            run,
            channel,
            server=server,
            too_large=2_000_000 if server else 600_000_000,
        ),
        Kind(
            f"{server or 'test-redis'}-stream",
            _STREAM,
            streams,
            run,
            stream,
            server=server,
            too_large=2_000_000 if server else 600_000_000,
            lacks=frozenset({"patterns", "absence"}),
        ),
        Kind(
            f"{server or 'test-redis'}-list",
            _LIST,
            lists,
            run,
            list_,
            server=server,
            too_large=2_000_000 if server else 600_000_000,
            dead=dead,
            plain=lambda bench, address: {"address": STREAM + plain_name(address)},
            lacks=frozenset({"patterns", "absence", "fan-out"}),
        ),
    )
]
