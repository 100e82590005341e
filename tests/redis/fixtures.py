"""The servers that tests share; tests/conftest.py takes them over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.servers.redis import RedisServer, ValkeyServer


@pytest.fixture(scope="session")
def redis() -> Iterator[Any]:
    """A Redis server for the whole session; only its ``url`` is for use."""
    given = os.environ.get("MILLSTREAM_TEST_REDIS_URL")
    if given:
        yield SimpleNamespace(url=given)
        return
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey server for the whole session."""
    with ValkeyServer() as server:
        yield server
