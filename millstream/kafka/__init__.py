"""Apache Kafka: topics and consumer groups."""

# No `from __future__ import annotations`: it would hide the submodule of that name.
from typing import TYPE_CHECKING

try:
    import confluent_kafka as _client  # noqa: F401
except ImportError as _error:
    from ..errors import MissingExtra

    raise MissingExtra("confluent-kafka", "kafka", purpose="millstream.kafka") from _error

from .broker import KafkaBroker, KafkaPublisher, KafkaRoute, KafkaRouter
from .driver import KafkaDriver
from .message import KafkaBatchMessage, KafkaMessage, RecordMetadata
from .options import Topic, TopicPartition, by_key, by_partition
from .response import KafkaPublishCommand, KafkaPublishMessage, KafkaResponse

if TYPE_CHECKING:
    from ..testing import TestApp
    from .testing import TestKafkaBroker

__all__ = [
    "KafkaBatchMessage",
    "KafkaBroker",
    "KafkaDriver",
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
    # The test tools are loaded only by those who ask for them.
    if name == "TestKafkaBroker":
        from .testing import TestKafkaBroker

        return TestKafkaBroker
    if name == "TestApp":
        from ..testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
