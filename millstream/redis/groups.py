"""The groups of streams: made where they are missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, ResponseError

from ..errors import SetupError
from .flow import ids, log, pairs
from .options import StreamSub

if TYPE_CHECKING:
    from .driver import RedisDriver


class Groups:
    """Makes groups, and makes them again."""

    def __init__(self, driver: RedisDriver) -> None:
        self.driver = driver

    async def ensure(
        self,
        sub: StreamSub,
        *,
        again: bool = False,
        last: str = "",
        unsettled: Iterable[bytes] = (),
    ) -> None:
        """Make the group of a subscription be there, and the stream with it.

        Args:
            sub: the subscription.
            again: it was there before.
            last: the last entry that it is known to have got.
            unsettled: what was not settled then, and has to come again.

        Raises:
            SetupError: it is not there and is not to be made, or the server refuses.
        """
        if sub.group is None:
            return
        start = sub.last_id or "0"
        if start == ">":
            start = "$"
        if again:
            start = await self._resume(sub.stream, last, unsettled)
        elif not sub.declare and not await self._there(sub):
            raise SetupError(
                f"stream {sub.stream!r} has no group {sub.group!r}",
                fix="leave out declare=False, or make it: "
                f"XGROUP CREATE {sub.stream} {sub.group} 0 MKSTREAM",
            )
        elif not sub.declare:
            return
        try:
            await self.driver.call(
                *(sub.stream, "XGROUP", "CREATE", sub.stream, sub.group, start, "MKSTREAM")
            )
        except ResponseError as error:
            if "BUSYGROUP" in str(error):
                return
            if isinstance(error, NoPermissionError) and await self._there(sub):
                return
            raise self.driver.refusal(f"group {sub.group!r} of {sub.stream!r}", error) from error
        if again:
            log.warning(
                "group %s of stream %s was gone and is made again, from entry %s",
                *(sub.group, sub.stream, start),
            )

    async def _there(self, sub: StreamSub) -> bool:
        try:
            found: list[Any] = await self.driver.call(sub.stream, "XINFO", "GROUPS", sub.stream)
        except ResponseError:
            return False
        return any(pairs(info)[b"name"] == str(sub.group).encode() for info in found)

    async def _resume(self, stream: str, last: str, unsettled: Iterable[bytes]) -> str:
        """Behind which entry a group reads that was deleted: nothing may be missed."""
        if not last:
            return "0"
        try:
            info = await self.driver.call(stream, "XINFO", "STREAM", stream)
        except ResponseError:
            return "0"
        newest = pairs(info)[b"last-generated-id"]
        if ids(newest) < ids(last):
            return "0"  # another stream of the same name
        first, second = min([ids(last), *(_before(*ids(id)) for id in unsettled)])
        return f"{first}-{second}"


def _before(first: int, second: int) -> tuple[int, int]:
    return (first, second - 1) if second else (max(first - 1, 0), 2**64 - 1)
