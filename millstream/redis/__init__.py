"""Redis: channels, lists and streams."""

# No `from __future__ import annotations`: it would hide the submodule of that name.
from typing import TYPE_CHECKING

try:
    import hiredis as _parser  # noqa: F401
    import redis.asyncio as _client  # noqa: F401
except ImportError as _error:
    from ..errors import MissingExtra

    raise MissingExtra("redis", "redis", purpose="millstream.redis") from _error

from .annotations import Pipeline, Redis
from .broker import (
    RedisBroker,
    RedisClusterBroker,
    RedisPublisher,
    RedisRoute,
    RedisRouter,
    RedisSentinelBroker,
)
from .dedup import RedisDedup
from .driver import RedisDriver
from .formats import (
    BinaryMessageFormatV1,
    JSONMessageFormat,
    MessageFormat,
    PlainMessageFormat,
)
from .message import (
    RedisBatchListMessage,
    RedisBatchStreamMessage,
    RedisChannelMessage,
    RedisListMessage,
    RedisMessage,
    RedisStreamMessage,
)
from .options import ListSub, PubSub, StreamSub
from .response import RedisPublishCommand, RedisResponse

if TYPE_CHECKING:
    from ..testing import TestApp
    from .testing import TestRedisBroker

__all__ = [
    "BinaryMessageFormatV1",
    "JSONMessageFormat",
    "ListSub",
    "MessageFormat",
    "Pipeline",
    "PlainMessageFormat",
    "PubSub",
    "Redis",
    "RedisBatchListMessage",
    "RedisBatchStreamMessage",
    "RedisBroker",
    "RedisChannelMessage",
    "RedisClusterBroker",
    "RedisDedup",
    "RedisDriver",
    "RedisListMessage",
    "RedisMessage",
    "RedisPublishCommand",
    "RedisPublisher",
    "RedisResponse",
    "RedisRoute",
    "RedisRouter",
    "RedisSentinelBroker",
    "RedisStreamMessage",
    "StreamSub",
    "TestApp",
    "TestRedisBroker",
]


def __getattr__(name: str) -> object:
    # The test tools are loaded only by those who ask for them.
    if name == "TestRedisBroker":
        from .testing import TestRedisBroker

        return TestRedisBroker
    if name == "TestApp":
        from ..testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
