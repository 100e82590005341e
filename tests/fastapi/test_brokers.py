"""The routers of all brokers are one mechanism."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from fastapi import APIRouter

from millstream import SetupError
from millstream.kafka import KafkaBroker
from millstream.kafka.fastapi import KafkaRouter
from millstream.mqtt import MqttBroker
from millstream.mqtt.fastapi import MqttRouter
from millstream.nats import NatsBroker
from millstream.nats.fastapi import NatsRouter
from millstream.rabbit import RabbitBroker
from millstream.rabbit.fastapi import RabbitRouter
from millstream.redis import RedisBroker, RedisClusterBroker, RedisSentinelBroker
from millstream.redis.fastapi import RedisClusterRouter, RedisRouter, RedisSentinelRouter

KINDS: list[tuple[Any, Any, str, Any]] = [
    (NatsRouter, NatsBroker, "servers", "nats://127.0.0.1:1"),
    (RedisRouter, RedisBroker, "url", "redis://127.0.0.1:1"),
    (RedisClusterRouter, RedisClusterBroker, "url", "redis://127.0.0.1:1"),
    (RedisSentinelRouter, RedisSentinelBroker, "sentinels", [("127.0.0.1", 1)]),
    (RabbitRouter, RabbitBroker, "url", "amqp://127.0.0.1:1"),
    (KafkaRouter, KafkaBroker, "bootstrap_servers", "127.0.0.1:1"),
    (MqttRouter, MqttBroker, "url", "mqtt://127.0.0.1:1"),
]


@pytest.mark.parametrize(
    ("router", "broker", "name", "address"), KINDS, ids=[kind[0].__name__ for kind in KINDS]
)
def test_one_mechanism(router: Any, broker: Any, name: str, address: Any) -> None:
    more = {"sentinel_master_name": "m"} if router is RedisSentinelRouter else {}
    assert (
        issubclass(router, APIRouter) and next(iter(inspect.signature(router).parameters)) == name
    )
    for made in (router(address, prefix="/http", **more), router(**{name: address}, **more)):
        assert type(made.broker) is broker and "127.0.0.1:1" in made.broker.driver.describe()
    named = router(address, graceful_timeout=3, tags=["web"], **more)
    assert named.broker.graceful_timeout == 3 and named.tags == ["web"] and not named.broker.tags
    # One without an address shares the broker of the router that includes it.
    part, whole = router(None), router(address, **more)
    whole.include_router(part)
    assert part.broker is whole.broker
    given = broker(address, **more)
    assert router(broker=given).broker is given
    with pytest.raises(SetupError, match=rf"{router.__name__}\(broker=\.\.\.\) with "):
        router(address, broker=given)
    with pytest.raises(SetupError, match="has no option 'nonsense'"):
        router(address, nonsense=1, **more)
