"""Fixtures of the tests on MQTT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import unique
from tests.servers.mqtt import MosquittoServer


@pytest.fixture
def mqtt_server() -> Iterator[MosquittoServer]:
    """A Mosquitto that keeps everything, and belongs to this test alone."""
    with MosquittoServer(durable=True) as server:
        yield server


@pytest.fixture
def name() -> str:
    """A topic nobody else uses."""
    return unique()
