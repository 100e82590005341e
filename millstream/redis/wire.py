"""One connection that everybody's commands share, in the order in which they were given.

Commands of one turn of the event loop leave together, and nobody waits for anybody's reply:
Redis answers in order. What redis-py's pool would need a connection each for costs one here.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..base import reconnect_delay

Make = Callable[[], Awaitable[AbstractConnection]]

#: What ends a connection; RuntimeError is uvloop's word for a transport that was closed.
BROKEN = (RedisConnectionError, RedisTimeoutError, OSError, RuntimeError, TimeoutError)
#: Bytes that may wait for the socket before callers have to wait.
ROOM = 4 * 1024 * 1024


class Lost(Exception):
    """The connection broke; ``sent`` says that the command may have been carried out."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode()).hexdigest()


async def read(connection: AbstractConnection) -> Any:
    """The next reply as bytes; a :class:`ResponseError` is raised."""
    return await connection.read_response(
        disable_decoding=True, timeout=math.inf, disconnect_on_error=False
    )


async def drop(connection: AbstractConnection | None) -> None:
    """Close a connection, whatever its state."""
    if connection is not None:
        with suppress(Exception):
            await connection.disconnect(nowait=True)


def cut(connection: AbstractConnection | None) -> None:
    """Break a connection that somebody else reads from; the reader is told."""
    writer = getattr(connection, "_writer", None)
    if writer is not None:
        writer.transport.abort()


def reason_of(error: BaseException) -> str:
    """A short text for people."""
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "no answer in time"
    if isinstance(error, asyncio.IncompleteReadError):
        return "the server closed the connection"
    return str(error).strip().rstrip(".") or type(error).__name__


class Wire:
    """A connection that comes back by itself.

    Args:
        make: gives a connected connection.
        cap: the longest wait between two attempts to connect, in seconds.
        patience: seconds after which a reply that does not come means that the peer is gone.
        interval: seconds of silence after which the peer is asked for a sign of life.
        changed: called with whether it is up, and why not.
    """

    def __init__(
        self,
        make: Make,
        *,
        cap: float,
        patience: float,
        interval: float,
        changed: Callable[[Wire, bool, str], None],
    ) -> None:
        self._make, self._cap, self._changed = make, cap, changed
        self._patience, self._interval = patience, interval
        self._connection: AbstractConnection | None = None
        self._out: list[bytes] = []
        #: Who waits for a reply, in order; None for a reply that nobody wants.
        self._waiting: deque[asyncio.Future[Any] | None] = deque()
        self._heard = 0.0
        self._flushing = False
        self._writer: Any = None
        self.up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.closed = False

    async def open(self) -> None:
        """Connect; raises what redis-py does. From then on the connection comes back by itself."""
        self._take(await self._make())
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._live()), loop.create_task(self._watch())]

    def _take(self, connection: AbstractConnection) -> None:
        self._connection = connection
        # The only way to write without a task for each command.
        self._writer = connection._writer
        self._heard = asyncio.get_running_loop().time()
        self.up.set()

    def ask(self, *args: Any) -> asyncio.Future[Any]:
        """Send a command; the future gets its reply, or :class:`Lost`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._writer is None:
            future.set_exception(Lost("not connected", sent=False))
            return future
        self._put(pack_command(args), future)
        return future

    def tell(self, *args: Any) -> None:
        """Send a command whose reply does not matter; nothing if there is no connection."""
        if self._writer is not None:
            self._put(pack_command(args), None)

    def _put(self, data: bytes, future: asyncio.Future[Any] | None) -> None:
        if not self._waiting:
            self._heard = asyncio.get_running_loop().time()
        self._waiting.append(future)
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Write what has come together."""
        self._flushing = False
        out, self._out = self._out, []
        if self._writer is not None and out:
            with suppress(OSError, RuntimeError):  # the reader finds out what is wrong
                self._writer.write(b"".join(out) if len(out) > 1 else out[0])

    @property
    def full(self) -> bool:
        """Whether so much waits for the socket that callers have to wait."""
        writer = self._writer
        return writer is not None and writer.transport.get_write_buffer_size() > ROOM

    async def _live(self) -> None:
        while not self.closed:
            reason = await self._read()
            await self._break(reason)
            await self._reconnect()

    async def _read(self) -> str:
        connection, waiting = self._connection, self._waiting
        assert connection is not None
        loop, count = asyncio.get_running_loop(), 0
        while True:
            error: Exception | None = None
            reply: Any = None
            try:
                reply = await read(connection)
            except (BusyLoadingError, ReadOnlyError) as reason:
                if waiting:  # it was not carried out
                    future = waiting.popleft()
                    if future is not None and not future.done():
                        future.set_exception(Lost(reason_of(reason), sent=False))
                return reason_of(reason)
            except ResponseError as reason:
                error = reason
            except (*BROKEN, RedisError) as reason:
                return reason_of(reason)
            self._heard = loop.time()
            if not waiting:
                continue
            future = waiting.popleft()
            if future is not None and not future.done():
                if error is None:
                    future.set_result(reply)
                else:
                    future.set_exception(error)
            count += 1
            if count % 256 == 0:  # replies that are there already are read without a pause
                await asyncio.sleep(0)

    async def _break(self, reason: str) -> None:
        self.up.clear()
        self._writer = None
        connection, self._connection = self._connection, None
        unsent = len(self._out)
        self._out.clear()
        waiting = list(self._waiting)
        self._waiting.clear()
        for index, future in enumerate(waiting):
            if future is not None and not future.done():
                future.set_exception(Lost(reason, sent=index < len(waiting) - unsent))
        await drop(connection)
        if not self.closed:
            self._changed(self, False, reason)

    async def _reconnect(self) -> None:
        for attempt in itertools.count():
            await asyncio.sleep(reconnect_delay(attempt, self._cap))
            if self.closed:
                return
            try:
                self._take(await self._make())
            except (*BROKEN, RedisError) as error:
                self._changed(self, False, reason_of(error))
                continue
            self._changed(self, True, "")
            return

    async def _watch(self) -> None:
        """Notice a peer that is gone without a word."""
        loop = asyncio.get_running_loop()
        while not self.closed:
            await asyncio.sleep(min(self._interval, self._patience) / 2)
            if self._writer is None:
                continue
            silent = loop.time() - self._heard
            if self._waiting and silent > self._patience:
                self.cut()
            elif not self._waiting and silent > self._interval:
                self.tell("PING")

    def cut(self) -> None:
        """Break the connection: its peer does not answer."""
        cut(self._connection)

    async def close(self) -> None:
        """Close for good; what was given before has left, and is answered or not."""
        self.closed = True
        if self._waiting and self._writer is not None:
            with suppress(Exception):
                async with asyncio.timeout(1.0):
                    await self.ask("PING")
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._break("closed")
