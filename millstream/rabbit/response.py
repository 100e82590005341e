"""A handler's result with RabbitMQ metadata."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from ..publisher import Response
from .options import RabbitExchange, RabbitPublish, RabbitQueue

#: What middlewares see of a publication.
RabbitPublishCommand = RabbitPublish


class RabbitResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        exchange: instead of the publisher's.
        queue: instead of the publisher's.
        routing_key: instead of the publisher's.
        mandatory, persist, priority, expiration, message_id, message_type, content_encoding,
            timeout: as of :meth:`RabbitBroker.publish`.
    """

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        exchange: str | RabbitExchange | None = None,
        queue: str | RabbitQueue | None = None,
        routing_key: str | None = None,
        mandatory: bool | None = None,
        persist: bool | None = None,
        priority: int | None = None,
        expiration: float | timedelta | datetime | None = None,
        message_id: str | None = None,
        message_type: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        timeout: float | None = None,
    ) -> None:
        given = {
            "exchange": exchange,
            "queue": queue,
            "routing_key": routing_key,
            "mandatory": mandatory,
            "persist": persist,
            "priority": priority,
            "expiration": expiration,
            "message_id": message_id,
            "message_type": message_type,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "timeout": timeout,
        }
        options = {key: value for key, value in given.items() if value is not None}
        super().__init__(body, headers=headers, correlation_id=correlation_id, **options)
