"""The same as ``millstream.kafka.response``."""

from ..kafka.response import KafkaPublishCommand, KafkaPublishMessage, KafkaResponse

__all__ = ["KafkaPublishCommand", "KafkaPublishMessage", "KafkaResponse"]
