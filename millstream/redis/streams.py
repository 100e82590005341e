"""Streams: read by a group that keeps what is not settled, or without acknowledgements."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from .flow import MOST, Flow, gone, ids, pairs
from .kept import Kept
from .message import Entry, is_plain, open_fields
from .scripts import (
    STREAM_LEAVE,
    STREAM_MINE,
    STREAM_NACK,
    STREAM_TICK,
)
from .wire import cut

#: Milliseconds after which an entry is taken over from a consumer that is not Millstream's.
FOREIGN = 60_000


class GroupFlow(Kept):
    """A group of a stream."""

    def __init__(self, *args: Any) -> None:
        spec, driver = args[1], args[0]
        sub = spec.stream_sub
        assert sub is not None and sub.group is not None
        member = driver.member(sub.consumer)
        super().__init__(*args, member=member, ack_wait=sub.ack_wait, parts=(sub.group,))
        self.sub, self.group = sub, sub.group
        self.ack = ("XACK", self.name, self.group)
        idle = sub.min_idle_time if sub.min_idle_time is not None else sub.claim_min_idle_time
        self.foreign = FOREIGN if idle is None else idle
        #: The last entry that the group is known to have got, and where other members held some,
        #: the first that was not settled then.
        self.last, self.floor = "", b""
        #: What this process had when the group was made again: it comes once more.
        self.had: set[bytes] = set()

    @property
    def reads(self) -> bool:
        return self.sub.min_idle_time is None

    async def ensure(self) -> None:
        await self.driver.groups.ensure(self.sub)

    async def rebuild(self) -> None:
        self.had = self.known()
        later = await self.driver.call(self.name, "ZRANGE", self.key("later"), 0, -1)
        await self.driver.groups.ensure(
            self.sub,
            again=True,
            last=self.last,
            unsettled=[*self.open, *later, *((self.floor,) if self.floor else ())],
        )

    async def take(self, connection: AbstractConnection, count: int) -> list[Entry]:
        command = ("XREADGROUP", "GROUP", self.group, self.me, "COUNT", count)
        how = ("BLOCK", self.driver.block, "STREAMS", self.name, ">")
        found = await self.ask(connection, *command, *how, within=self.driver.longest)
        if not found:
            return []
        name, plain, entries = self.name, self.plain, found[0][1]
        self.last = entries[-1][0].decode()
        out = [
            Entry(name, fields[1], id)
            if plain and is_plain(fields)
            else open_fields(name, id, fields, self.format)
            for id, fields in entries
        ]
        return out if not self.had else [entry for entry in out if self._is_new(entry.id)]

    def _is_new(self, id: bytes) -> bool:
        if id not in self.had:
            return True
        self.had.discard(id)
        if id not in self.open:  # it was settled, and that was lost with the group
            self.acks.append(id)
        return False

    async def claim(self, room: int, dead_room: int) -> tuple[list[Entry], bool, float, int]:
        keys = (self.name, self.key("alive"), self.key("later"))
        found, more, due, there, last, self.floor = await self.driver.script(
            STREAM_TICK,
            keys,
            *(self.group, self.me, int(self.ack_wait * 1000), room, dead_room, self.foreign),
        )
        if not self.last or ids(last) > ids(self.last):
            self.last = last.decode()
        return self._entries(found), bool(more), due, there

    def _entries(self, found: list[Any]) -> list[Entry]:
        return [
            open_fields(self.name, id, fields, self.format, count) for id, fields, count in found
        ]

    async def held(self) -> list[bytes]:
        command = ("XPENDING", self.name, self.group, "-", "+", 10_000, self.me)
        return [id for id, *_ in await self.driver.call(self.name, *command)]

    async def fetch(self, ids: list[bytes]) -> list[Entry]:
        found = await self.driver.script(STREAM_MINE, (self.name,), self.group, self.me, *ids)
        return self._entries(found)

    async def nack(self, ids: list[bytes], ms: int, fresh: int) -> None:
        self.had.difference_update(ids)
        keys = (self.name, self.key("later"))
        await self.driver.script(STREAM_NACK, keys, self.group, self.me, ms, fresh, *ids)

    async def touch(self, raw: Any, /) -> None:
        """Make an entry look young to consumers that are not ours; ours go by signs of life."""
        if asyncio.get_running_loop().time() - self.beaten < self.ack_wait / 2:
            self.driver.tell(
                *(self.name, "XCLAIM", self.name, self.group, self.me, 0, raw.id, "JUSTID")
            )

    async def leave(self) -> None:
        keys = (self.name, self.key("alive"))
        await self.driver.script(STREAM_LEAVE, keys, self.group, self.me)

    async def lag(self) -> int | None:
        later = await self.driver.call(self.name, "ZCARD", self.key("later"))
        for info in await self.driver.call(self.name, "XINFO", "GROUPS", self.name):
            group = pairs(info)
            if group[b"name"] == self.group.encode():
                new = group.get(b"lag")
                return None if new is None else int(new) + later + len(self.waiting)
        return None


class StreamFlow(Flow):
    """A stream without acknowledgements: by a group, or each process on from where it began."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        sub = self.spec.stream_sub
        assert sub is not None
        self.sub, self.group = sub, sub.group
        self.last = sub.last_id or "$"
        self.me = self.driver.member(sub.consumer)
        self.count = sub.max_records or MOST

    async def _attach(self, connection: AbstractConnection) -> None:
        if self.group is not None:
            await self.driver.groups.ensure(self.sub)
        elif self.last == "$":  # as of now, also when the connection breaks before the first entry
            newest = await self.ask(connection, "XREVRANGE", self.name, "+", "-", "COUNT", 1)
            self.last = newest[0][0].decode() if newest else "0-0"

    async def _read(self, connection: AbstractConnection) -> None:
        how = ("COUNT", self.count, "BLOCK", self.driver.block)
        while not self.paused:
            command: tuple[Any, ...] = ("XREAD", *how, "STREAMS", self.name, self.last)
            if self.group is not None:
                group = ("GROUP", self.group, self.me)
                command = ("XREADGROUP", *group, *how, "NOACK", "STREAMS", self.name, ">")
            try:
                found = await self.ask(connection, *command, within=self.driver.longest)
            except ResponseError as error:
                if not gone(error):
                    raise
                await self.driver.groups.ensure(self.sub, again=True)
                continue
            if not found:
                if self.group is None:
                    await self._check(connection)
                continue
            for id, fields in found[0][1]:
                if self.plain and is_plain(fields):
                    await self.give(Entry(self.name, fields[1], id))
                else:
                    await self.give(open_fields(self.name, id, fields, self.format))
                self.last = id.decode()

    async def _check(self, connection: AbstractConnection) -> None:
        """A stream that was deleted and made anew counts from wherever it likes."""
        newest = await self.ask(connection, "XREVRANGE", self.name, "+", "-", "COUNT", 1)
        if newest and ids(newest[0][0]) < ids(self.last):
            self.last = "0-0"

    async def _interrupt(self) -> None:
        cut(self.connection)

    async def close(self) -> None:
        await super().close()
        if self.group is not None:
            self.driver.tell(self.name, "XGROUP", "DELCONSUMER", self.name, self.group, self.me)
