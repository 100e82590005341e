"""MQTT in a FastAPI application: a router for messages and HTTP."""

from __future__ import annotations

from typing import Unpack

from ..endpoints import declares, produces
from ..fastapi.router import RouterOptions, StreamRouter
from ..params import Context, Depends, Header, Logger, Path
from .annotations import ContextRepo, MQTTBroker, MqttBroker, MQTTMessage, MqttMessage
from .broker import MqttBroker as _MqttBroker
from .broker import MqttConnect
from .broker import MqttRouter as _MqttRouter
from .options import MqttPublication, MqttSubscription

__all__ = [
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "Logger",
    "MQTTBroker",
    "MQTTMessage",
    "MQTTRouter",
    "MqttBroker",
    "MqttMessage",
    "MqttRouter",
    "Path",
]


class MqttRouterOptions(RouterOptions, MqttConnect, total=False):
    """Options of :class:`MqttRouter`: of the broker, of ``APIRouter`` and of the integration."""


class MqttRouter(StreamRouter[_MqttBroker]):
    """An ``APIRouter`` with an MQTT broker.

    Args:
        url: as of :class:`millstream.mqtt.MqttBroker`.
        options: the broker's, ``APIRouter``'s (``prefix``, ``tags``, ``dependencies`` … are
            the HTTP side's), ``try_it``, ``setup_state``, ``resolver``; or ``broker=``, one
            that is there already.
    """

    broker_class = _MqttBroker
    router_class = _MqttRouter
    subscriber = declares(MqttSubscription)
    publisher = produces(MqttPublication)

    def __init__(self, url: str | None = None, **options: Unpack[MqttRouterOptions]) -> None:
        super().__init__(url, **options)


MQTTRouter = MqttRouter
