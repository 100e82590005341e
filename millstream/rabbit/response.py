"""A handler's result with RabbitMQ metadata."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from ..publisher import Response
from .options import RabbitExchange, RabbitPublish, RabbitQueue

#: What middlewares see of a publication.
RabbitPublishCommand = RabbitPublish


@dataclass(kw_only=True, repr=False, eq=False)
class RabbitResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        exchange, queue, routing_key, mandatory: instead of the publisher's; an answer goes where it
            is wanted, and is no error where nobody waits for it any more.
        reply_to, immediate, persist, priority, expiration, message_id, timestamp,
            message_type, content_type, content_encoding, user_id, app_id, timeout: as of
            :meth:`RabbitBroker.publish`.
    """

    exchange: str | RabbitExchange | None = None
    queue: str | RabbitQueue | None = None
    routing_key: str | None = None
    reply_to: str | None = None
    mandatory: bool | None = None
    immediate: bool | None = None
    persist: bool | None = None
    priority: int | None = None
    expiration: float | timedelta | datetime | None = None
    message_id: str | None = None
    timestamp: float | datetime | None = None
    message_type: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    user_id: str | None = None
    app_id: str | None = None
    timeout: float | None = None
