"""Messages with Kafka's metadata: results of handlers, and items of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from ..publisher import Response
from .options import KafkaPublish, KafkaPublishMessage

#: What middlewares see of a publication.
KafkaPublishCommand = KafkaPublish


@dataclass(kw_only=True, repr=False, eq=False)
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

    key: bytes | str | None = None
    timestamp_ms: int | None = None
    partition: int | None = None


__all__ = ["KafkaPublishCommand", "KafkaPublishMessage", "KafkaResponse"]
