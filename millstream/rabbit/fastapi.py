"""RabbitMQ in a FastAPI application: a router for messages and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from ..endpoints import declares, produces
from ..fastapi.router import RouterOptions, StreamRouter
from ..params import Context, Depends, Header, Logger, Path
from .annotations import Channel, Connection, ContextRepo, RabbitBroker, RabbitMessage
from .broker import RabbitBroker as _RabbitBroker
from .broker import RabbitConnect
from .broker import RabbitRouter as _RabbitRouter
from .options import RabbitPublication, RabbitSubscription

__all__ = [
    "Channel",
    "Connection",
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "Logger",
    "Path",
    "RabbitBroker",
    "RabbitMessage",
    "RabbitRouter",
]


class RabbitRouterOptions(RouterOptions, RabbitConnect, total=False):
    """Options of :class:`RabbitRouter`: of the broker, of ``APIRouter`` and the integration."""


class RabbitRouter(StreamRouter[_RabbitBroker]):
    """An ``APIRouter`` with a RabbitMQ broker.

    Args:
        url: as of :class:`millstream.rabbit.RabbitBroker`.
        options: the broker's, ``APIRouter``'s (``prefix``, ``tags``, ``dependencies`` … are
            the HTTP side's), ``try_it``, ``setup_state``, ``resolver``; or ``broker=``, one
            that is there already.
    """

    broker_class = _RabbitBroker
    router_class = _RabbitRouter
    subscriber = declares(RabbitSubscription)
    publisher = produces(RabbitPublication)

    def __init__(
        self, url: str | Sequence[str] | None = None, **options: Unpack[RabbitRouterOptions]
    ) -> None:
        super().__init__(url, **options)
