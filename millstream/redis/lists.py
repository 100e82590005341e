"""Lists: what is taken lies in a hash of this process until it is settled."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from .flow import PAUSE
from .formats import MARK
from .kept import Kept
from .message import Entry, open_value
from .options import sibling
from .scripts import (
    LIST_LEAVE,
    LIST_NACK,
    LIST_TAKE,
    LIST_TICK,
    unwrap,
)


class ListFlow(Kept):
    """A list: what is taken lies in a hash of this process until it is settled."""

    def __init__(self, *args: Any) -> None:
        spec, driver = args[1], args[0]
        sub = spec.list_sub
        assert sub is not None
        super().__init__(*args, member=driver.member(None), ack_wait=sub.ack_wait, parts=())
        self.taken, self.next = sibling(self.name, "taken", self.me), self.key("next")
        self.ack = ("HDEL", self.taken)
        #: Numbers that no element has yet begin here.
        self.number = 0
        #: Whether there was nothing more the last time.
        self.dry = False

    async def ensure(self) -> None:
        kind = await self.driver.call(self.name, "TYPE", self.name)
        if kind not in (b"list", b"none"):
            raise self.driver.refusal(self.where, ResponseError("WRONGTYPE no list"))

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        if self.dry:
            command = ("BLMOVE", self.name, self.next, "LEFT", "RIGHT", self.driver.block / 1000)
            try:
                if await self.ask(connection, *command, within=self.driver.longest) is None:
                    return []
            except OutOfMemoryError:  # what is there can be taken all the same
                await asyncio.sleep(PAUSE)
        first = self._numbers(count)
        call = (3, self.name, self.next, self.taken, self.me, first, count)
        try:
            found = await self.ask(connection, "EVALSHA", LIST_TAKE.digest, *call)
        except NoScriptError:
            found = await self.ask(connection, "EVAL", LIST_TAKE.source, *call)
        self.dry = len(found) < count
        return self._entries(first, found)

    def _numbers(self, count: int) -> int:
        """The first of so many numbers that no element has."""
        self.number += count
        return self.number - count

    def _entries(self, first: int, elements: list[bytes]) -> list[Entry]:
        name, plain, id = self.name, self.plain, f"{self.me}-%d".encode()
        return [
            Entry(name, element, id % number)
            if plain and element[:1] != MARK
            else open_value(name, element, self.format, id % number)
            for number, element in enumerate(elements, first)
        ]

    def _known(self, id: bytes, value: bytes) -> Entry:
        element, count = unwrap(value)
        return open_value(self.name, element, self.format, id, count)

    async def claim(self, room: int, dead_room: int) -> tuple[list[Entry], bool, float, int]:
        first = self._numbers(room)
        found, again, more, due, there = await self.driver.script(
            LIST_TICK,
            (self.next, self.taken, self.key("alive"), self.key("later")),
            *(self.me, first, int(self.ack_wait * 1000), room, dead_room, self.key("taken:")),
        )
        old = [self._known(*pair) for pair in zip(again[::2], again[1::2], strict=True)]
        return self._entries(first, found) + old, bool(more), due, there

    async def held(self) -> list[bytes]:
        self.dry = False
        found: list[bytes] = await self.driver.call(self.name, "HKEYS", self.taken)
        return sorted(found, key=lambda id: int(id.rpartition(b"-")[2]))

    async def fetch(self, ids: list[bytes]) -> list[Entry]:
        found = await self.driver.call(self.name, "HMGET", self.taken, *ids)
        pairs = zip(ids, found, strict=True)
        return [self._known(id, value) for id, value in pairs if value is not None]

    async def nack(self, ids: list[bytes], ms: int, fresh: int) -> None:
        keys = (self.name, self.taken, self.key("later"))
        await self.driver.script(LIST_NACK, keys, ms, fresh, *ids)

    async def leave(self) -> None:
        keys = (self.name, self.next, self.taken, self.key("alive"))
        await self.driver.script(LIST_LEAVE, keys, self.me)

    async def lag(self) -> int | None:
        total = len(self.waiting)
        for count in (("ZCARD", self.key("later")), ("LLEN", self.name), ("LLEN", self.next)):
            total += await self.driver.call(self.name, *count)
        return total
