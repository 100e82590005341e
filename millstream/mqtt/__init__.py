"""MQTT 5.0 and 3.1.1."""

# No `from __future__ import annotations`: it would hide the submodule of that name.
from typing import TYPE_CHECKING

from .broker import MqttBroker, MqttPublisher, MqttRoute, MqttRouter
from .driver import MqttDriver
from .message import MQTTMessage, MqttMessage
from .options import QoS, Will, WillProperties
from .outbox import Receipt
from .response import MqttPublishCommand, MQTTResponse, MqttResponse

# Under the names of other frameworks.
MQTTBroker, MQTTRouter, MQTTRoute, MQTTPublisher = MqttBroker, MqttRouter, MqttRoute, MqttPublisher

if TYPE_CHECKING:
    from ..testing import TestApp
    from .testing import TestMqttBroker

    TestMQTTBroker = TestMqttBroker

__all__ = [
    "MQTTBroker",
    "MQTTMessage",
    "MQTTPublisher",
    "MQTTResponse",
    "MQTTRoute",
    "MQTTRouter",
    "MqttBroker",
    "MqttDriver",
    "MqttMessage",
    "MqttPublishCommand",
    "MqttPublisher",
    "MqttResponse",
    "MqttRoute",
    "MqttRouter",
    "QoS",
    "Receipt",
    "TestApp",
    "TestMQTTBroker",
    "TestMqttBroker",
    "Will",
    "WillProperties",
]


def __getattr__(name: str) -> object:
    # The test tools are loaded only by those who ask for them.
    if name in ("TestMqttBroker", "TestMQTTBroker"):
        from .testing import TestMqttBroker

        return TestMqttBroker
    if name == "TestApp":
        from ..testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
