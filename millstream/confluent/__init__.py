"""The Kafka broker under the name of the client library that it uses: see ``millstream.kafka``."""

from typing import TYPE_CHECKING

from .. import kafka as _kafka
from ..kafka import (
    KafkaBatchMessage,
    KafkaBroker,
    KafkaMessage,
    KafkaPublishCommand,
    KafkaPublisher,
    KafkaPublishMessage,
    KafkaResponse,
    KafkaRoute,
    KafkaRouter,
    RecordMetadata,
    Topic,
    TopicPartition,
    by_key,
    by_partition,
)

if TYPE_CHECKING:
    from ..kafka import TestApp, TestKafkaBroker

__all__ = [
    "KafkaBatchMessage",
    "KafkaBroker",
    "KafkaMessage",
    "KafkaPublishCommand",
    "KafkaPublishMessage",
    "KafkaPublisher",
    "KafkaResponse",
    "KafkaRoute",
    "KafkaRouter",
    "RecordMetadata",
    "TestApp",
    "TestKafkaBroker",
    "Topic",
    "TopicPartition",
    "by_key",
    "by_partition",
]


def __getattr__(name: str) -> object:
    if name in ("TestApp", "TestKafkaBroker"):
        return getattr(_kafka, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
