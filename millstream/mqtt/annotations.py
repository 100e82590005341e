"""Ready-made annotations for handler parameters."""

from __future__ import annotations

from typing import Annotated

from ..context import ContextRepo as _ContextRepo
from ..params import Context, Logger
from .broker import MqttBroker as _MqttBroker
from .message import MqttMessage as _MqttMessage

MqttMessage = Annotated[_MqttMessage, Context("message")]
MqttBroker = Annotated[_MqttBroker, Context("broker")]
ContextRepo = Annotated[_ContextRepo, Context("context")]
# Under the names of other frameworks.
MQTTMessage, MQTTBroker = MqttMessage, MqttBroker

__all__ = ["ContextRepo", "Logger", "MQTTBroker", "MQTTMessage", "MqttBroker", "MqttMessage"]
