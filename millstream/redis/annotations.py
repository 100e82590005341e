"""Ready-made annotations for handler parameters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from redis.asyncio import Redis as _Redis
from redis.asyncio.client import Pipeline as _Pipeline

from ..context import ContextRepo as _ContextRepo
from ..message import BatchMessage as _BatchMessage
from ..params import Context, Depends, Logger
from .broker import RedisBroker as _RedisBroker
from .message import RedisChannelMessage as _RedisChannelMessage
from .message import RedisListMessage as _RedisListMessage
from .message import RedisMessage as _RedisMessage
from .message import RedisStreamMessage as _RedisStreamMessage

RedisMessage = Annotated[_RedisMessage, Context("message")]
RedisChannelMessage = Annotated[_RedisChannelMessage, Context("message")]
RedisListMessage = Annotated[_RedisListMessage, Context("message")]
RedisStreamMessage = Annotated[_RedisStreamMessage, Context("message")]
RedisBatchStreamMessage = Annotated[_BatchMessage, Context("message")]
RedisBroker = Annotated[_RedisBroker, Context("broker")]
#: redis-py's client.
Redis = Annotated[_Redis, Context("broker.client")]
ContextRepo = Annotated[_ContextRepo, Context("context")]


async def _pipe(client: Annotated[Any, Context("broker.client")]) -> AsyncIterator[_Pipeline]:
    async with client.pipeline() as pipe:
        yield pipe


#: redis-py's pipeline, for ``publish(..., pipeline=pipe)`` and ``await pipe.execute()``.
Pipeline = Annotated[_Pipeline, Depends(_pipe)]

__all__ = [
    "ContextRepo",
    "Logger",
    "Pipeline",
    "Redis",
    "RedisBatchStreamMessage",
    "RedisBroker",
    "RedisChannelMessage",
    "RedisListMessage",
    "RedisMessage",
    "RedisStreamMessage",
]
