"""The same as ``millstream.kafka.annotations``."""

from ..kafka.annotations import (
    ContextRepo,
    KafkaBatchMessage,
    KafkaBroker,
    KafkaMessage,
    Logger,
)

__all__ = ["ContextRepo", "KafkaBatchMessage", "KafkaBroker", "KafkaMessage", "Logger"]
