"""All that differs from broker to broker; the handlers of main.py are the same on each.

The environment says which broker it is (``BROKER``), where it is (``NATS_URL``, ``REDIS_URL`` …)
and how the addresses of this run begin (``FLIGHTS``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from millstream.embedded import (
    Embedded,
    EmbeddedMosquitto,
    EmbeddedNats,
    EmbeddedRabbit,
    EmbeddedRedis,
)

if TYPE_CHECKING:
    from millstream import Publisher, Subscriber
    from millstream.broker import Broker
    from millstream.fastapi import StreamRouter

    class AnyRouter(StreamRouter[Broker]):
        """What the routers of all brokers have in common."""

        def subscriber(self, **options: Any) -> Subscriber: ...
        def publisher(self, **options: Any) -> Publisher: ...


class Kind(ABC):
    """A kind of broker.

    Args:
        run: how the addresses begin.
    """

    #: For people; the environment variable with its address; and that address by default.
    title: ClassVar[str]
    variable: ClassVar[str]
    usual: ClassVar[str]
    #: The service of compose.yaml.
    service: ClassVar[str]
    #: The server that the demo can start by itself, where it is installed.
    embedded: ClassVar[type[Embedded] | None] = None

    def __init__(self, run: str = "flights") -> None:
        self.run = run

    @property
    def url(self) -> str:
        """Where the broker is."""
        return os.environ.get(self.variable, self.usual)

    @staticmethod
    @abstractmethod
    def classes() -> tuple[Any, Any]:
        """The router for FastAPI and the broker; they need the client library."""

    def router(self) -> AnyRouter:
        """A router for FastAPI with this broker."""
        router: AnyRouter = self.classes()[0](self.url)
        return router

    def broker(self, url: str) -> Broker:
        """A broker alone."""
        broker: Broker = self.classes()[1](url)
        return broker

    def address(self, name: str) -> str:
        """The whole address of what the example calls ``name``."""
        return f"{self.run}.{name}"

    @abstractmethod
    def reads(self, name: str, group: str) -> dict[str, Any]:
        """The options of a subscriber that misses nothing and shares the messages in a group."""

    @abstractmethod
    def writes(self, name: str) -> dict[str, Any]:
        """Where a publisher, or a single publication, sends its messages."""

    def letters(self, name: str, group: str) -> dict[str, Any]:
        """The options of a subscriber that reads dead letters."""
        return self.reads(name, group)


class Nats(Kind):
    """One JetStream stream with a durable consumer for each reader."""

    title, variable, usual = "NATS", "NATS_URL", "nats://127.0.0.1:4222"
    service, embedded = "nats", EmbeddedNats

    @staticmethod
    def classes() -> tuple[Any, Any]:
        from millstream.nats import NatsBroker
        from millstream.nats.fastapi import NatsRouter

        return NatsRouter, NatsBroker

    @property
    def stream(self) -> str:
        """The stream's name."""
        return self.run.upper()

    def reads(self, name: str, group: str) -> dict[str, Any]:
        from millstream.nats import JStream

        stream = JStream(self.stream, subjects=[self.address(">")])
        return {"subject": self.address(name), "stream": stream, "durable": group}

    def writes(self, name: str) -> dict[str, Any]:
        return {"subject": self.address(name), "stream": self.stream}


class Redis(Kind):
    """A stream for each address, with a consumer group."""

    title, variable, usual = "Redis", "REDIS_URL", "redis://127.0.0.1:6379"
    service, embedded = "redis", EmbeddedRedis

    @staticmethod
    def classes() -> tuple[Any, Any]:
        from millstream.redis import RedisBroker
        from millstream.redis.fastapi import RedisRouter

        return RedisRouter, RedisBroker

    def reads(self, name: str, group: str) -> dict[str, Any]:
        from millstream.redis import StreamSub

        return {"stream": StreamSub(self.address(name), group=group)}

    def writes(self, name: str) -> dict[str, Any]:
        return {"stream": self.address(name)}


class Rabbit(Kind):
    """A quorum queue for each address; who reads the same queue shares its messages."""

    title, variable, usual = "RabbitMQ", "RABBIT_URL", "amqp://guest:guest@127.0.0.1:5672/"
    service, embedded = "rabbitmq", EmbeddedRabbit

    @staticmethod
    def classes() -> tuple[Any, Any]:
        from millstream.rabbit import RabbitBroker
        from millstream.rabbit.fastapi import RabbitRouter

        return RabbitRouter, RabbitBroker

    def reads(self, name: str, group: str) -> dict[str, Any]:
        return {"queue": self.address(name)}

    def writes(self, name: str) -> dict[str, Any]:
        return {"queue": self.address(name)}


class Kafka(Kind):
    """A topic for each address, with a consumer group.

    The flights are published without a key, so that one partition is what keeps their order.
    """

    title, variable, usual, service = "Kafka", "KAFKA_URL", "127.0.0.1:9092", "kafka"

    @staticmethod
    def classes() -> tuple[Any, Any]:
        from millstream.kafka import KafkaBroker
        from millstream.kafka.fastapi import KafkaRouter

        return KafkaRouter, KafkaBroker

    def reads(self, name: str, group: str) -> dict[str, Any]:
        from millstream.kafka import Topic

        return {"topics": Topic(self.address(name), 1), "group_id": f"{self.run}-{group}"}

    def writes(self, name: str) -> dict[str, Any]:
        from millstream.kafka import Topic

        return {"topic": Topic(self.address(name), 1)}


class Mqtt(Kind):
    """A topic for each address; the server keeps what waits for a reader in a session.

    A server of version 2 of Mosquitto drops what waits beyond a thousand messages, unless
    ``max_queued_messages`` says otherwise, as in compose.yaml.
    """

    title, variable, usual = "MQTT", "MQTT_URL", "mqtt://127.0.0.1:1883"
    service, embedded = "mosquitto", EmbeddedMosquitto

    @staticmethod
    def classes() -> tuple[Any, Any]:
        from millstream.mqtt import MqttBroker
        from millstream.mqtt.fastapi import MqttRouter

        return MqttRouter, MqttBroker

    def address(self, name: str) -> str:
        return f"{self.run}/{name}"

    def reads(self, name: str, group: str) -> dict[str, Any]:
        return {"topic": self.address(name), "shared": f"{self.run}-{group}"}

    def writes(self, name: str) -> dict[str, Any]:
        return {"topic": self.address(name)}

    def letters(self, name: str, group: str) -> dict[str, Any]:
        # Each letter is kept under a topic of its own, below the address.
        return self.reads(f"{name}/+", group)


KINDS: dict[str, type[Kind]] = {
    "nats": Nats,
    "redis": Redis,
    "rabbit": Rabbit,
    "kafka": Kafka,
    "mqtt": Mqtt,
}


def chosen() -> Kind:
    """The broker that the environment names."""
    name = os.environ.get("BROKER") or "nats"
    if name not in KINDS:
        raise SystemExit(f"BROKER={name}: one of {', '.join(KINDS)}")
    return KINDS[name](os.environ.get("FLIGHTS") or "flights")
