"""A handler's result with Redis metadata."""

from __future__ import annotations

from dataclasses import dataclass

from ..publisher import Response
from .formats import MessageFormat
from .options import RedisPublish

#: What middlewares see of a publication.
RedisPublishCommand = RedisPublish


@dataclass(kw_only=True, repr=False, eq=False)
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

    maxlen: int | None = None
    max_age: float | None = None
    message_format: type[MessageFormat] | None = None
