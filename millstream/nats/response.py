"""A handler's result with NATS metadata."""

from __future__ import annotations

from dataclasses import dataclass

from ..publisher import Response
from .options import JStream, NatsPublish, Schedule

#: What middlewares see of a publication.
NatsPublishCommand = NatsPublish


@dataclass(kw_only=True, repr=False, eq=False)
class NatsResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        stream: the stream that has to confirm it; no stream stores an answer.
        message_id: the stream stores one message of this id.
        schedule: the stream delivers it later.
    """

    stream: str | JStream | None = None
    message_id: str | None = None
    schedule: Schedule | None = None
