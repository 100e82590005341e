"""What keeps a handled message from being handled again, in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dedup import Claim
from ..errors import SetupError
from .scripts import DEDUP_CLAIM, DEDUP_RELEASE

if TYPE_CHECKING:
    from .broker import RedisBroker, RedisClusterBroker, RedisSentinelBroker


class RedisDedup:
    """Keys in Redis, shared by all processes of all machines; forgotten by Redis itself.

    Args:
        broker: a Redis broker of the application; it has to be connected while messages are
            handled.
        prefix: begins the names of the keys.
    """

    def __init__(
        self,
        broker: RedisBroker | RedisClusterBroker | RedisSentinelBroker,
        *,
        prefix: str = "ms:dedup:",
    ) -> None:
        if not prefix:
            raise SetupError("RedisDedup without a prefix", fix="keep its keys apart from others")
        self._broker, self._prefix = broker, prefix

    async def claim(self, key: str, lease: float) -> Claim:
        name = self._prefix + key
        found: bytes = await self._broker.driver.script(
            DEDUP_CLAIM, (name,), max(int(lease * 1000), 1)
        )
        return {b"mine": "mine", b"done": "done"}.get(found, "busy")  # type: ignore[return-value]

    async def done(self, key: str, ttl: float) -> None:
        name = self._prefix + key
        await self._broker.driver.call(name, "SET", name, "done", "PX", max(int(ttl * 1000), 1))

    async def release(self, key: str) -> None:
        await self._broker.driver.script(DEDUP_RELEASE, (self._prefix + key,))
