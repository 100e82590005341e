"""NATS in a FastAPI application: a router for messages and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from ..endpoints import declares, produces
from ..fastapi.router import RouterOptions, StreamRouter
from ..params import Context, Depends, Header, Logger, Path
from .annotations import Client, ContextRepo, JsClient, NatsBroker, NatsMessage, ObjectStorage
from .broker import NatsBroker as _NatsBroker
from .broker import NatsConnect
from .broker import NatsRouter as _NatsRouter
from .options import NatsPublication, NatsSubscription

__all__ = [
    "Client",
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "JsClient",
    "Logger",
    "NatsBroker",
    "NatsMessage",
    "NatsRouter",
    "ObjectStorage",
    "Path",
]


class NatsRouterOptions(RouterOptions, NatsConnect, total=False):
    """Options of :class:`NatsRouter`: of the broker, of ``APIRouter`` and of the integration."""


class NatsRouter(StreamRouter[_NatsBroker]):
    """An ``APIRouter`` with a NATS broker.

    Args:
        servers: as of :class:`millstream.nats.NatsBroker`.
        options: the broker's, ``APIRouter``'s (``prefix``, ``tags``, ``dependencies`` … are
            the HTTP side's), ``try_it``, ``setup_state``, ``resolver``; or ``broker=``, one
            that is there already.
    """

    broker_class = _NatsBroker
    router_class = _NatsRouter
    subscriber = declares(NatsSubscription)
    publisher = produces(NatsPublication)

    def __init__(
        self, servers: str | Sequence[str] | None = None, **options: Unpack[NatsRouterOptions]
    ) -> None:
        super().__init__(servers, **options)
