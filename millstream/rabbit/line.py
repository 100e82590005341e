"""A connection that comes back by itself, endlessly."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ..base import reconnect_delay
from ..errors import ConnectError
from .connection import ChannelLost, Connection, Wire, abort, connect, disconnect, log, reason_of

if TYPE_CHECKING:
    from .driver import RabbitDriver


#: Seconds for an answer on the one connection when the other was lost.
_PROBE = 2.0


class Line:
    """One of the driver's two connections.

    The server stops reading from a connection that publishes while it is short of memory or
    disk. What is consumed must still be acknowledged then, so that publishing has a connection
    of its own.

    Args:
        driver: whose it is.
        attach: sets up what lives on the connection, at each connect.
    """

    def __init__(self, driver: RabbitDriver, attach: Callable[[], Awaitable[None]]) -> None:
        self.driver = driver
        self.connection: Connection | None = None
        self.up = asyncio.Event()
        self.reason = ""
        self._attach = attach
        self._closing = False
        self._turn = 0
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Connect in one attempt, unless it is connected.

        Raises:
            ConnectError: not reached or not let in.
        """
        async with self._opening:
            if self.connection is not None:
                return
            self._closing = False
            await self._open()

    async def _open(self) -> None:
        driver = self.driver
        address = driver.addresses[self._turn % len(driver.addresses)]
        ended: list[BaseException] = []

        def closed(reason: BaseException) -> None:
            ended.append(reason)
            if connection is not None and self.connection is connection:
                self._closed(connection, reason)

        connection = None
        try:
            connection = await connect(address, closed)
            if ended:
                raise ChannelLost(ended[0])
            self.connection = connection
            await self._attach()
        except (ConnectError, ChannelLost, TimeoutError) as error:
            self._turn += 1  # the next attempt is for the next server
            self.connection = None
            if connection is not None:
                abort(connection)
            if isinstance(error, ConnectError):
                raise
            raise ConnectError(f"{address}: {reason_of(error)}") from error
        self.up.set()
        self.driver.spawn(self._watch(connection))

    async def _watch(self, connection: Connection) -> None:
        """End a connection from which nothing comes for two heartbeats."""
        client: Any = connection
        beat = client.params.heartbeat
        frames, silent = -1, 0
        while beat and self.connection is connection:
            await self.driver.clock.sleep(beat / 2)
            silent = silent + 1 if client.frames_received == frames else 0
            frames = client.frames_received
            if silent >= 4 and self.connection is connection:
                abort(connection)

    async def probe(self) -> bool:
        """Whether the server answers on this connection; one that is dead is ended."""
        connection = self.connection
        if connection is None or not self.up.is_set():
            return False
        try:
            async with asyncio.timeout(_PROBE):
                await (await self.wire()).close()
            return self.up.is_set()
        except (ChannelLost, TimeoutError):
            if self.connection is connection:
                abort(connection)
            return False

    def _closed(self, connection: Connection, reason: BaseException) -> None:
        self.connection = None
        if self._closing or not self.up.is_set():
            return
        self.up.clear()
        self.reason = reason_of(reason)
        self.driver.line_lost(connection, reason)
        self.driver.spawn(self._revive())

    async def _revive(self) -> None:
        driver = self.driver
        for attempt in itertools.count():
            await driver.clock.sleep(reconnect_delay(attempt, driver.reconnect_interval))
            if self._closing:
                return
            try:
                await self._open()
            except ConnectError as error:
                self.reason = reason_of(error.__cause__ or error)
                log.debug("%s", error)
                continue
            driver.line_back(self)
            return

    async def wire(self, on_close: Callable[[ChannelLost], None] = lambda reason: None) -> Wire:
        """Open a channel.

        Raises:
            ChannelLost: not connected, or no longer.
        """
        if self.connection is None:
            raise ChannelLost(None)
        return await Wire.open(self.connection, on_close)

    async def close(self) -> None:
        """Disconnect for good."""
        self._closing = True
        self.up.clear()
        connection, self.connection = self.connection, None
        if connection is not None:
            await disconnect(connection)
