"""What a handler returns with metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..publisher import Response
from .options import MqttPublish

#: The arguments of ``publish`` as middlewares see them.
MqttPublishCommand = MqttPublish


class MqttResponse(Response):
    """A handler's result with metadata.

    Args:
        body: what is published.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        qos: instead of the publisher's.
        retain: the same.
        expiry: the same.
    """

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        qos: int | None = None,
        retain: bool | None = None,
        expiry: float | None = None,
    ) -> None:
        given = {"qos": qos, "retain": retain, "expiry": expiry}
        options = {key: value for key, value in given.items() if value is not None}
        super().__init__(body, headers=headers, correlation_id=correlation_id, **options)


#: Under the name of other frameworks.
MQTTResponse = MqttResponse
