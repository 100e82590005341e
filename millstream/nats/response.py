"""A handler's result with NATS metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..publisher import Response
from .options import JStream, NatsPublish, Schedule

#: What middlewares see of a publication.
NatsPublishCommand = NatsPublish


class NatsResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        stream: the stream that has to confirm it.
        message_id: the stream stores one message of this id.
        schedule: deliver it later.
    """

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        stream: str | JStream | None = None,
        message_id: str | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        given = {"stream": stream, "message_id": message_id, "schedule": schedule}
        options = {key: value for key, value in given.items() if value is not None}
        super().__init__(body, headers=headers, correlation_id=correlation_id, **options)
