"""Kafka in a FastAPI application: a router for messages and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from ..fastapi.router import RouterOptions, StreamRouter
from ..params import Context, Depends, Header, Logger, Path
from .annotations import ContextRepo, KafkaBroker, KafkaMessage
from .broker import KafkaBroker as _KafkaBroker
from .broker import KafkaConnect, _DeclaresTopics, _to_topic
from .broker import KafkaRouter as _KafkaRouter
from .options import KafkaPublication, KafkaSubscription

__all__ = [
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "KafkaBroker",
    "KafkaMessage",
    "KafkaRouter",
    "Logger",
    "Path",
]


class KafkaRouterOptions(RouterOptions, KafkaConnect, total=False):
    """Options of :class:`KafkaRouter`: of the broker, of ``APIRouter`` and of the integration."""


class KafkaRouter(StreamRouter[_KafkaBroker]):
    """An ``APIRouter`` with a Kafka broker.

    Args:
        bootstrap_servers: as of :class:`millstream.kafka.KafkaBroker`.
        options: the broker's, ``APIRouter``'s (``prefix``, ``tags``, ``dependencies`` … are
            the HTTP side's), ``try_it``, ``setup_state``, ``resolver``; or ``broker=``, one
            that is there already.
    """

    broker_class = _KafkaBroker
    router_class = _KafkaRouter
    subscriber = _DeclaresTopics(KafkaSubscription)
    publisher = _to_topic(KafkaPublication)

    def __init__(
        self,
        bootstrap_servers: str | Sequence[str] | None = None,
        **options: Unpack[KafkaRouterOptions],
    ) -> None:
        super().__init__(bootstrap_servers, **options)
