"""Dead letters in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from ..errors import NoLetters, NoResponders
from ..letters import Letter
from ..message import Link
from .flow import ids
from .formats import BinaryMessageFormatV1
from .message import LIST, STREAM, RedisStreamMessage, open_fields
from .options import RedisPublish

if TYPE_CHECKING:
    from .driver import RedisDriver

#: Letters that are read at once.
PAGE = 100


class RedisLetters:
    """The dead letters of one stream; a letter's id is its entry's."""

    def __init__(self, driver: RedisDriver, stream: str) -> None:
        self.driver, self.stream = driver, stream
        self._link = Link(driver, None)

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        await self.count()
        last, left = after or "0", limit
        while left is None or left > 0:
            most = PAGE if left is None else min(PAGE, left)
            found = await self.driver.call(
                *(self.stream, "XREAD", "COUNT", most, "STREAMS", self.stream, last)
            )
            if not found:
                return
            for id, fields in found[0][1]:
                entry = open_fields(self.stream, id, fields, BinaryMessageFormatV1)
                last = id.decode()
                stored = datetime.fromtimestamp(ids(id)[0] / 1000, UTC)
                yield Letter(last, RedisStreamMessage(entry, self._link), stored)
            left = None if left is None else left - len(found[0][1])

    async def count(self) -> int:
        kind = await self.driver.call(self.stream, "TYPE", self.stream)
        if kind != b"stream":
            raise NoLetters(f"there is no stream {self.stream!r}")
        return int(await self.driver.call(self.stream, "XLEN", self.stream))

    async def remove(self, id: str) -> bool:
        try:
            return bool(await self.driver.call(self.stream, "XDEL", self.stream, id))
        except ResponseError:
            return False  # it is no entry's id

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        command, origin = RedisPublish(), letter.origin
        command.destination = origin
        heard = await self.driver.publish(command, letter.message.body, headers)
        if not heard and not origin.startswith((STREAM, LIST)) and self.driver.counts_listeners:
            raise NoResponders(f"nobody listens to {origin!r}")
