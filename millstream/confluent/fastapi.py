"""The same as ``millstream.kafka.fastapi``."""

from ..kafka.fastapi import (
    Context,
    ContextRepo,
    Depends,
    Header,
    KafkaBroker,
    KafkaMessage,
    KafkaRouter,
    Logger,
    Path,
)

__all__ = [
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "KafkaBroker",
    "KafkaMessage",
    "KafkaRouter",
    "Logger",
    "Path",
]
