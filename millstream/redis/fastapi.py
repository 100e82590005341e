"""Redis in a FastAPI application: routers for messages and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from ..endpoints import declares, produces
from ..fastapi.router import RouterOptions, StreamRouter
from ..params import Context, Depends, Header, Logger, Path
from .annotations import (
    ContextRepo,
    Pipeline,
    Redis,
    RedisBroker,
    RedisChannelMessage,
    RedisListMessage,
    RedisMessage,
    RedisStreamMessage,
)
from .broker import RedisBroker as _RedisBroker
from .broker import RedisClusterBroker as _RedisClusterBroker
from .broker import RedisConnect
from .broker import RedisRouter as _RedisRouter
from .broker import RedisSentinelBroker as _RedisSentinelBroker
from .options import RedisPublication, RedisSubscription

__all__ = [
    "Context",
    "ContextRepo",
    "Depends",
    "Header",
    "Logger",
    "Path",
    "Pipeline",
    "Redis",
    "RedisBroker",
    "RedisChannelMessage",
    "RedisClusterRouter",
    "RedisListMessage",
    "RedisMessage",
    "RedisRouter",
    "RedisSentinelRouter",
    "RedisStreamMessage",
]


class RedisRouterOptions(RouterOptions, RedisConnect, total=False):
    """Options of :class:`RedisRouter`: of the broker, of ``APIRouter`` and of the integration."""


class RedisRouter(StreamRouter[_RedisBroker]):
    """An ``APIRouter`` with a Redis broker.

    Args:
        url: as of :class:`millstream.redis.RedisBroker`.
        options: the broker's, ``APIRouter``'s (``prefix``, ``tags``, ``dependencies`` … are
            the HTTP side's), ``try_it``, ``setup_state``, ``resolver``; or ``broker=``, one
            that is there already.
    """

    broker_class = _RedisBroker
    router_class = _RedisRouter
    subscriber = declares(RedisSubscription)
    publisher = produces(RedisPublication)

    def __init__(self, url: str | None = None, **options: Unpack[RedisRouterOptions]) -> None:
        super().__init__(url, **options)


class RedisClusterRouter(RedisRouter):
    """The same with a :class:`millstream.redis.RedisClusterBroker`."""

    broker_class = _RedisClusterBroker  # type: ignore[assignment]


class RedisSentinelRouter(StreamRouter[_RedisSentinelBroker]):
    """An ``APIRouter`` with a broker that Sentinel finds.

    Args:
        sentinels: as of :class:`millstream.redis.RedisSentinelBroker`.
        options: as of :class:`RedisRouter`, ``sentinel_master_name`` and ``sentinel_kwargs``.
    """

    broker_class = _RedisSentinelBroker
    router_class = _RedisRouter
    subscriber = declares(RedisSubscription)
    publisher = produces(RedisPublication)

    def __init__(self, sentinels: Sequence[tuple[str, int]] | None = None, **options: Any) -> None:
        super().__init__(sentinels, **options)
