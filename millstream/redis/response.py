"""A handler's result with Redis metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..publisher import Response
from .formats import MessageFormat
from .options import RedisPublish

#: What middlewares see of a publication.
RedisPublishCommand = RedisPublish


class RedisResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        maxlen: entries that the stream keeps, about.
        max_age: seconds for which it keeps them, about.
        message_format: how body and headers become one value.
    """

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        maxlen: int | None = None,
        max_age: float | None = None,
        message_format: type[MessageFormat] | None = None,
    ) -> None:
        given = {"maxlen": maxlen, "max_age": max_age, "message_format": message_format}
        options = {key: value for key, value in given.items() if value is not None}
        super().__init__(body, headers=headers, correlation_id=correlation_id, **options)
