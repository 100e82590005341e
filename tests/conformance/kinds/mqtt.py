"""MQTT: topics of each quality of service, on Mosquitto and in memory, and of version 3.1.1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from millstream.clock import VirtualClock
from millstream.driver import Capability
from millstream.mqtt import MqttBroker
from millstream.mqtt.options import MqttSubscription
from millstream.mqtt.testing import TestMqttBroker
from tests.conformance.bench import Bench, Kind, started


def broker(bench: Bench) -> MqttBroker:
    return MqttBroker(_url(bench))


def old_broker(bench: Bench) -> MqttBroker:
    return MqttBroker(_url(bench), version="3.1.1")


def _url(bench: Bench) -> str:
    return bench.url if bench.kind.server else "mqtt://127.0.0.1:1"


def topic(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"qos": 0, "shared": group or None}


def session(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {} if group.startswith("own-") else {"shared": group}


def exactly_once(bench: Bench, address: str, group: str) -> dict[str, Any]:
    return {"qos": 2, **session(bench, address, group)}


def plain(bench: Bench, address: str) -> dict[str, Any]:
    # Dead letters lie one level below their address.
    return {"address": f"{address}/#", "qos": 0}


def dead(bench: Bench, address: str) -> str:
    return f"{address}/dlq"


@asynccontextmanager
async def in_memory(bench: Bench) -> AsyncIterator[None]:
    bench.clock = VirtualClock()
    async with TestMqttBroker(*bench.brokers, clock=bench.clock, wait=False):
        yield


_TOPIC = MqttSubscription("a", qos=0).capabilities
_SESSION = MqttSubscription("a").capabilities
_V5 = Capability.HEADERS | Capability.REPLY
_SOURCES = {"": (_TOPIC, topic), "-session": (_SESSION, session), "-qos2": (_SESSION, exactly_once)}

KINDS = [
    Kind(
        f"{server or 'test-mqtt'}{name}",
        capabilities,
        broker,
        started if server else in_memory,
        source,
        server=server,
        too_large=2_000_000 if server else 300_000_000,
        dead=dead,
        separator="/",
        plain=plain,
        # A session keeps what it was given until the same session is back.
        lacks=frozenset({"hand-over"}),
    )
    for server in (None, "mqtt")
    for name, (capabilities, source) in _SOURCES.items()
] + [
    Kind(
        "mqtt-3.1.1",
        _TOPIC & ~_V5,
        old_broker,
        started,
        topic,
        server="mqtt",
        too_large=300_000_000,
        separator="/",
        plain=plain,
    )
]
