"""What a handler returns with metadata."""

from __future__ import annotations

from dataclasses import dataclass

from ..publisher import Response
from .options import MqttPublish

#: The arguments of ``publish`` as middlewares see them.
MqttPublishCommand = MqttPublish


@dataclass(kw_only=True, repr=False, eq=False)
class MqttResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        qos: instead of the publisher's.
        retain: the same; an answer is kept as well, under the topic where it is wanted.
        expiry: the same.
    """

    qos: int | None = None
    retain: bool | None = None
    expiry: float | None = None


#: Under the name of other frameworks.
MQTTResponse = MqttResponse
