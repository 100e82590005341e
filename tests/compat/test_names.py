"""The peer's public names stand at the same places, so that moving is a change of imports."""

from __future__ import annotations

import importlib

import pytest

PLACES = {
    "": "AckPolicy BaseMiddleware Context ContextRepo Depends ExceptionMiddleware FastStream "
    "Header Logger NoCast Path Response StreamMessage TestApp apply_types",
    "annotations": "ContextRepo FastStream Logger",
    "context": "ContextRepo",
    "exceptions": "AckMessage FeatureNotSupportedException IgnoredException NackMessage "
    "RejectMessage SetupError SkipMessage SubscriberNotFound",
    "message": "AckStatus StreamMessage decode_message",
    "params": "NoCast",
    "middlewares": "BaseMiddleware ExceptionMiddleware",
    "response": "Response ensure_response",
    "types": "AsyncFuncAny",
    "nats": "ConsumerConfig JStream KvWatch NatsBroker NatsMessage NatsPublisher NatsResponse "
    "NatsRoute NatsRouter ObjWatch PubAck PullSub Schedule TestApp TestNatsBroker",
    "nats.annotations": "ContextRepo Logger NatsBroker NatsMessage ObjectStorage",
    "nats.fastapi": "Context Logger NatsRouter",
    "nats.message": "NatsMessage",
    "nats.response": "NatsPublishCommand NatsResponse",
    "nats.testing": "TestNatsBroker",
    "rabbit": "Channel ExchangeType QueueType RabbitBroker RabbitExchange RabbitExternalAuth "
    "RabbitMessage RabbitPublisher RabbitQueue RabbitResponse RabbitRoute RabbitRouter TestApp "
    "TestRabbitBroker",
    "rabbit.annotations": "ContextRepo Logger RabbitBroker RabbitMessage",
    "rabbit.fastapi": "Context Logger RabbitRouter",
    "rabbit.message": "RabbitMessage",
    "rabbit.testing": "TestRabbitBroker",
    "redis": "BinaryMessageFormatV1 ListSub Pipeline PubSub Redis RedisBroker RedisClusterBroker "
    "RedisMessage RedisPublisher RedisResponse RedisRoute RedisRouter RedisSentinelBroker "
    "RedisStreamMessage StreamSub TestApp TestRedisBroker",
    "redis.annotations": "ContextRepo Logger RedisBroker RedisMessage",
    "redis.fastapi": "Context Logger RedisRouter RedisSentinelRouter",
    "redis.message": "PubSubMessage RedisMessage",
    "redis.response": "RedisPublishCommand RedisResponse",
    "redis.testing": "TestRedisBroker",
    **{
        place.format(kafka): names
        for kafka in ("kafka", "confluent")
        for place, names in {
            "{}": "KafkaBroker KafkaMessage KafkaPublisher KafkaRoute KafkaRouter TestApp "
            "TestKafkaBroker TopicPartition",
            "{}.annotations": "ContextRepo KafkaBroker KafkaMessage Logger",
            "{}.fastapi": "Context KafkaRouter Logger",
            "{}.message": "KafkaMessage",
            "{}.response": "KafkaPublishCommand KafkaPublishMessage KafkaResponse",
            "{}.testing": "TestKafkaBroker",
        }.items()
    },
    "mqtt": "MQTTBroker MQTTMessage MQTTPublisher MQTTRoute MQTTRouter QoS TestMQTTBroker",
    "mqtt.annotations": "ContextRepo Logger MQTTBroker MQTTMessage",
    "mqtt.fastapi": "Context Logger MQTTRouter",
    "mqtt.message": "MQTTMessage",
    "mqtt.response": "MQTTResponse",
    "mqtt.testing": "TestMQTTBroker",
    "security": "BaseSecurity SASLGSSAPI SASLOAuthBearer SASLPlaintext SASLScram256 SASLScram512",
}


BROKERS = ("nats", "redis", "rabbit", "kafka", "confluent", "mqtt")
SURROUNDINGS = ("annotations", "fastapi")


@pytest.mark.parametrize("place", PLACES)
def test_names(place: str) -> None:
    module = importlib.import_module(f"millstream.{place}".rstrip("."))
    assert [name for name in PLACES[place].split() if not hasattr(module, name)] == []


def test_a_name_is_one_object_wherever_it_is_imported_from() -> None:
    def at(place: str, name: str) -> object:
        return getattr(importlib.import_module(f"millstream{place}"), name)

    for name, places in {
        "Logger": [".annotations", *(f".{b}.{p}" for b in BROKERS for p in SURROUNDINGS)],
        "Context": [f".{b}.fastapi" for b in BROKERS],
        "ContextRepo": [".annotations", ".context"],
        "NackMessage": [".exceptions"],
        "BaseMiddleware": [".middlewares"],
        "Response": [".response"],
    }.items():
        assert all(at(place, name) is at("", name) for place in places), name
    assert at("", "FastStream") is at("", "Millstream")
