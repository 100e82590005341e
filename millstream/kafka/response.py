"""Messages with Kafka's metadata: results of handlers, and items of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..publisher import Response
from .options import KafkaPublish, KafkaPublishMessage

#: What middlewares see of a publication.
KafkaPublishCommand = KafkaPublish


class KafkaResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published; None is a tombstone.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        key: those with the same key keep their order.
        timestamp_ms: its time, in milliseconds since the epoch.
        partition: the partition, instead of one by the key.
    """

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        key: bytes | str | None = None,
        timestamp_ms: int | None = None,
        partition: int | None = None,
    ) -> None:
        given = {"key": key, "timestamp_ms": timestamp_ms, "partition": partition}
        options = {name: value for name, value in given.items() if value is not None}
        super().__init__(body, headers=headers, correlation_id=correlation_id, **options)


__all__ = ["KafkaPublishCommand", "KafkaPublishMessage", "KafkaResponse"]
