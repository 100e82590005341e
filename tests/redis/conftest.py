"""Fixtures of the tests on Redis: every server that speaks its protocol in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream.redis import RedisBroker
from tests.helpers import unique
from tests.servers.redis import RedisServer


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis server that keeps everything, and belongs to this test alone."""
    with RedisServer(durable=True) as server:
        yield server


@pytest.fixture
def name() -> str:
    """A key nobody else uses."""
    return unique()


@pytest.fixture
async def client(redis: Any) -> AsyncIterator[Redis]:
    """The raw client, as somebody else would use it."""
    client = Redis.from_url(redis.url)
    yield client
    await client.aclose()


@pytest.fixture
async def broker(redis: Any) -> AsyncIterator[RedisBroker]:
    """A broker that the test starts."""
    broker = RedisBroker(redis.url)
    yield broker
    await broker.stop()


@pytest.fixture
async def second(redis: Any) -> AsyncIterator[RedisBroker]:
    """Another one, as in another process."""
    broker = RedisBroker(redis.url)
    yield broker
    await broker.stop()


def later(seconds: float) -> Any:
    """Some time in which something unwanted would show."""
    return asyncio.sleep(seconds)
