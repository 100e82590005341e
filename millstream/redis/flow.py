"""How messages get from Redis to the sink where nothing is acknowledged: channels and streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from ..base import BaseIntake, reconnect_delay
from ..driver import CANCELLED, Sink
from .formats import MARK, BinaryMessageFormatV1, MessageFormat
from .message import Entry, open_value
from .wire import BROKEN, Lost, cut, drop, read, reason_of

if TYPE_CHECKING:
    from .driver import RedisDriver
    from .options import RedisSubscription

log = logging.getLogger("millstream.redis")

#: Messages that are read at once, at most, where nobody says it.
MOST = 256
#: Seconds before something that the server refused for the moment is tried again.
PAUSE = 0.1


class Flow(BaseIntake):
    """One subscription with a connection of its own, which comes back by itself."""

    def __init__(
        self,
        driver: RedisDriver,
        spec: RedisSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
    ) -> None:
        super().__init__(spec.destination, sink, log)
        self.driver, self.spec, self.lost = driver, spec, lost
        self.name = spec.name
        self.format: type[MessageFormat] = (
            spec.message_format or driver.message_format or BinaryMessageFormatV1
        )
        #: Whether a value without an envelope is its body.
        self.plain = issubclass(self.format, BinaryMessageFormatV1)
        self.connection: AbstractConnection | None = None
        self._task: asyncio.Task[None] | None = None
        #: Set once the subscription is in place for the first time, or refused.
        self._begun: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begin; returns when the server knows of it, and raises what it refuses."""
        loop = asyncio.get_running_loop()
        self._begun = loop.create_future()
        self._task = loop.create_task(self._live())
        await self._begun

    def _is_live(self) -> None:
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(None)

    async def _live(self) -> None:
        """Read; after a broken connection on a new one."""
        attempt = 0
        while not self.paused:
            await asyncio.sleep(reconnect_delay(attempt, self.driver.cap))
            attempt += 1
            try:
                self.connection = await self.driver.dedicated(self.name)
                await self._attach(self.connection)
                self._is_live()
                attempt = 0
                await self._read(self.connection)
            except ResponseError as error:
                if not self.driver.passing(error):
                    self._fail(self.driver.refusal(self.where, error))
                    return
                log.debug("%s: %s", self.where, error)
                await asyncio.sleep(PAUSE)
            except (*BROKEN, RedisError, Lost) as error:
                if self._begun is not None and not self._begun.done():
                    self._begun.set_exception(self.driver.explain(error))
                    return
                log.debug("%s: %s", self.where, reason_of(error))
            finally:
                connection, self.connection = self.connection, None
                await drop(connection)

    def _fail(self, error: Exception) -> None:
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(error)
        elif not self.paused:
            self.paused = True
            self.lost(error)

    async def _attach(self, connection: AbstractConnection) -> None:
        """Subscribe on a new connection."""

    async def _read(self, connection: AbstractConnection) -> None:
        """Read and give to the sink until the end."""
        raise NotImplementedError

    async def ask(
        self, connection: AbstractConnection, *command: Any, within: float | None = None
    ) -> Any:
        """The reply to a command; a TimeoutError if the peer seems to be gone."""
        await connection.send_command(*command, check_health=False)
        async with asyncio.timeout(self.driver.patience if within is None else within):
            return await read(connection)

    def look(self) -> None:
        """Called now and then: whether the peer is still there."""

    async def pause(self) -> int:
        self.paused = True
        await self._interrupt()
        if self._task is not None and asyncio.current_task() is not self._task:
            await asyncio.wait([self._task])
        return 0

    async def _interrupt(self) -> None:
        """Let a read that waits for something end."""

    async def close(self) -> None:
        self.paused = True
        self.driver.flows.discard(self)
        if self._task is not None and asyncio.current_task() is not self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CANCELLED)
        await drop(self.connection)


class ChannelFlow(Flow):
    """A channel or a pattern: the server sends, and keeps nothing."""

    def __init__(self, *args: Any, pattern: bool, name: str = "") -> None:
        super().__init__(*args)
        self.pattern = pattern
        self._prefix = "P" if pattern else ""
        self.channel = name or self.name
        address = self.driver.syntax.compile(self.where)
        #: Redis's ``*`` takes any text; a placeholder takes what lies between two separators.
        self._matches = address.matcher.fullmatch if address.places else None
        self._heard = 0.0
        self._reading = False

    async def _attach(self, connection: AbstractConnection) -> None:
        await self.ask(connection, f"{self._prefix}SUBSCRIBE", self.channel)

    async def _read(self, connection: AbstractConnection) -> None:
        kind, at = (b"pmessage", 2) if self.pattern else (b"message", 1)
        over = f"{self._prefix}UNSUBSCRIBE".lower().encode()
        loop, matches, plain, format = (
            asyncio.get_running_loop(),
            self._matches,
            self.plain,
            self.format,
        )
        if self.paused:
            await self._interrupt()
        while True:
            self._heard, self._reading = loop.time(), True
            reply = await read(connection)
            self._reading = False
            if reply[0] == kind:
                channel = reply[at].decode("utf-8", "replace")
                if matches is not None and matches(channel) is None:
                    continue
                value = reply[at + 1]
                if plain and value[:1] != MARK:
                    await self.give(Entry(channel, value))
                else:
                    await self.give(open_value(channel, value, format))
            elif reply[0] == over:
                return

    def look(self) -> None:
        connection = self.connection
        if connection is None or not self._reading:
            return
        silent = asyncio.get_running_loop().time() - self._heard
        if silent > self.driver.interval + self.driver.patience:
            cut(connection)
        elif silent > self.driver.interval:
            self.driver.spawn(self._command(connection, "PING"))

    async def _interrupt(self) -> None:
        if self.connection is not None:
            await self._command(self.connection, f"{self._prefix}UNSUBSCRIBE", self.channel)

    async def _command(self, connection: AbstractConnection, *args: str) -> None:
        try:
            await connection.send_command(*args, check_health=False)
        except (*BROKEN, RedisError) as error:
            log.debug("%s: %s", self.where, reason_of(error))

    async def pause(self) -> int:
        self.paused = True
        if self.connection is None and self._task is not None:
            self._task.cancel()
        return await super().pause()


def gone(error: Exception) -> bool:
    """Whether the server says that there is no such group, or stream."""
    text = str(error)
    return "NOGROUP" in text or "no such key" in text or "UNBLOCKED" in text


def pairs(flat: Sequence[bytes]) -> dict[bytes, Any]:
    """A reply of names and values, one behind the other."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def ids(id: bytes | str) -> tuple[int, int]:
    """An entry's id as something that can be compared."""
    text = id.decode() if isinstance(id, bytes) else id
    first, _, second = text.partition("-")
    return int(first), int(second or 0)
