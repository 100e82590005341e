"""The same as ``millstream.kafka.message``."""

from ..kafka.message import KafkaBatchMessage, KafkaMessage

__all__ = ["KafkaBatchMessage", "KafkaMessage"]
