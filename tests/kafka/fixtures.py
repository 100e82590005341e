"""Kafka servers for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.servers.kafka import KafkaServer


@pytest.fixture(scope="session")
def kafka() -> Iterator[Any]:
    """A Kafka server for the whole session; only its ``url`` is for use."""
    given = os.environ.get("MILLSTREAM_TEST_KAFKA_URL")
    if given:
        yield SimpleNamespace(url=given)
        return
    with KafkaServer() as server:
        yield server


@pytest.fixture
def kafka_server() -> Iterator[KafkaServer]:
    """A running Kafka server that belongs to this test alone."""
    with KafkaServer() as server:
        yield server
