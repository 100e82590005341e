"""The server that tests share; tests/conftest.py takes it over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.servers.mqtt import MosquittoServer


@pytest.fixture(scope="session")
def mqtt() -> Iterator[Any]:
    """A Mosquitto for the whole session; only its ``url`` is for use."""
    given = os.environ.get("MILLSTREAM_TEST_MQTT_URL")
    if given:
        yield SimpleNamespace(url=given)
        return
    with MosquittoServer() as server:
        yield server
