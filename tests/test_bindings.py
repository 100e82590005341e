"""What declarations tell documents of their protocol: AsyncAPI's bindings."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.broker import Broker
from millstream.kafka import KafkaBroker, Topic
from millstream.mqtt import MqttBroker
from millstream.nats import NatsBroker
from millstream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from millstream.redis import RedisBroker, StreamSub


def nats(broker: NatsBroker) -> tuple[Any, Any]:
    return broker.subscriber("orders", queue="billing"), broker.publisher("out")


def rabbit(broker: RabbitBroker) -> tuple[Any, Any]:
    exchange = RabbitExchange("sales", ExchangeType.TOPIC, auto_delete=True)
    out = broker.publisher(exchange=exchange, routing_key="out", priority=3, persist=False)
    return broker.subscriber(RabbitQueue("orders", exclusive=True)), out


def kafka(broker: KafkaBroker) -> tuple[Any, Any]:
    topic = Topic("orders", num_partitions=6, replication_factor=3)
    return broker.subscriber(topic, group_id="billing"), broker.publisher("out")


def mqtt(broker: MqttBroker) -> tuple[Any, Any]:
    return broker.subscriber("orders", qos=2), broker.publisher("out", retain=True, expiry=60)


def redis(broker: RedisBroker) -> tuple[Any, Any]:
    stream = StreamSub("orders", group="billing")
    return broker.subscriber(stream=stream), broker.publisher(stream="out")


@pytest.mark.parametrize(
    ("broker", "declare", "subscription", "publication"),
    [
        (NatsBroker(), nats, {"operation": {"nats": {"queue": "billing"}}}, {}),
        (
            RabbitBroker(),
            rabbit,
            {
                "channel": {
                    "amqp": {
                        "is": "queue",
                        "queue": {
                            "name": "orders",
                            "durable": True,
                            "exclusive": True,
                            "autoDelete": False,
                        },
                    }
                },
                "operation": {"amqp": {"ack": True}},
            },
            {
                "channel": {
                    "amqp": {
                        "is": "routingKey",
                        "exchange": {
                            "name": "sales",
                            "type": "topic",
                            "durable": True,
                            "autoDelete": True,
                        },
                    }
                },
                "operation": {"amqp": {"deliveryMode": 1, "priority": 3}},
            },
        ),
        (
            KafkaBroker(),
            kafka,
            {
                "channel": {"kafka": {"topic": "orders", "partitions": 6, "replicas": 3}},
                "operation": {"kafka": {"groupId": {"type": "string", "enum": ["billing"]}}},
            },
            {"channel": {"kafka": {"topic": "out"}}},
        ),
        (
            MqttBroker(),
            mqtt,
            {"operation": {"mqtt": {"qos": 2}}},
            {"operation": {"mqtt": {"qos": 1, "retain": True, "messageExpiryInterval": 60}}},
        ),
        (RedisBroker(), redis, {}, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Broker) else "",
)
def test_bindings(broker: Any, declare: Any, subscription: Any, publication: Any) -> None:
    subscriber, _ = declare(broker)
    subscriber(lambda body: None)
    broker.compile()
    (subscribed,), (published,) = broker.subscriptions, broker.publications
    assert versionless(subscribed.spec.bindings) == subscription
    assert versionless(published.spec.bindings) == publication


def versionless(bindings: Any) -> Any:
    for belongs in bindings.values():
        for said in belongs.values():
            assert said.pop("bindingVersion").count(".") == 2
    return bindings
