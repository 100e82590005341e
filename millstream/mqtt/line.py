"""A connection that comes back by itself, under one client identifier."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from typing import Any

from ..base import reconnect_delay
from ..errors import ConnectError, NotConnected
from ..security import tls_fault
from .connection import Connection, Settings
from .wire import FAREWELL, REASONS, TAKEN_OVER, V5, V311, Incoming, reason_of, said, write_connect

log = logging.getLogger("millstream.mqtt")

#: Seconds that a connection has to last before the next one may follow at once; and how many in
#: a row may not, until people are told why that may be.
LASTING, SUSPICIOUS = 10.0, 3
#: Seconds to stand back for whoever took the session over: at first, at most, and seconds that a
#: connection has to last until that is forgotten.
STAND_BACK, STAND_BACK_MAX, FORGET = 5.0, 60.0, 120.0
#: What the server says, by version, where another attempt cannot help.
_PERMANENT = {
    V5: {1, 0x81, 0x82, 0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x90, 0x95, 0x99, 0x9A, 0x9B, 0x9D},
    V311: {1, 2, 4, 5},
}
_REFUSED = {
    1: "the server does not know this version of MQTT",
    2: "the server does not take this client identifier",
    3: "the server is not available",
    4: "bad user name or password",
    5: "not authorized",
}


class Line:
    """A connection that comes back by itself, under one client identifier.

    Subclasses say what they do when it is there (``welcomed``, ``established``), with messages
    (``received``) and acknowledgements (``acknowledged``), and when it is lost (``dropped``).

    Args:
        settings: how to reach the server.
        client_id: the client identifier.
        changed: called with the line, whether it is up, and why not.
        error: called with what people should know.
    """

    #: CONNECT: begin a new session at the first connection of this process, and at the others.
    clean_first = clean = True
    #: Seconds for which the server keeps the session without a connection.
    expiry = 0
    #: Messages that the server may send before they are acknowledged.
    receive_maximum: int | None = None
    will: Any = None

    def __init__(
        self,
        settings: Settings,
        client_id: str,
        changed: Callable[[Line, bool, str], None],
        error: Callable[[str], None],
    ) -> None:
        self.settings, self.client_id = settings, client_id
        self.changed, self.error = changed, error
        self.connection: Connection | None = None
        #: Set while the line can be used.
        self.up = asyncio.Event()
        self.reason = "it was not connected yet"
        #: What the server said of itself at the last connection.
        self.limits: dict[str, Any] = {}
        self.closed = False
        self._known = False
        self._reviving: asyncio.Task[None] | None = None
        #: Times that somebody took the session over; connections in a row that did not last.
        self._thefts = self._short = 0
        self._stolen = False
        self._mid = 0

    # What subclasses do

    def welcomed(self, connection: Connection, present: bool, limits: dict[str, Any]) -> None:
        """The server took us; ``present`` says whether it knew the session."""
        self.connection, self.limits = connection, limits

    async def established(self, present: bool) -> None:
        """Do what has to be done before the line counts as up."""

    def received(self, message: Incoming) -> None:
        """A message arrived."""

    def acknowledged(self, kind: int, mid: int, code: int, reason: str) -> None:
        """PUBACK, PUBREC, PUBREL or PUBCOMP arrived."""

    def dropped(self) -> None:
        """The connection is gone."""

    # Life

    async def open(self) -> None:
        """Connect, in one attempt.

        Raises:
            ConnectError: not reached or not let in.
        """
        await self._connect()

    def hello(self) -> bytes:
        """CONNECT.

        Raises:
            ValueError: MQTT cannot say something of it.
        """
        settings = self.settings
        properties = {
            "session_expiry_interval": self.expiry or None,
            "receive_maximum": self.receive_maximum,
            "maximum_packet_size": settings.maximum_packet_size,
            "request_response_information": 1,
            "user_property": settings.user_properties,
        }
        return write_connect(
            settings.version,
            self.client_id,
            clean=self.clean if self._known else self.clean_first,
            keepalive=settings.keepalive,
            username=settings.username,
            password=settings.password,
            properties=properties,
            will=self.will,
        )

    async def _connect(self) -> None:
        settings, hello = self.settings, self.hello()
        loop = asyncio.get_running_loop()
        connection: Connection | None = None
        try:
            async with asyncio.timeout(settings.connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(
                        self, settings.version, settings.keepalive, settings.maximum_packet_size
                    ),
                    settings.host,
                    settings.port,
                    ssl=settings.ssl,
                )
                connection.write(hello)
                present, code, limits = await connection.welcome
                if code:
                    raise self._refused(code, said(limits))
                connection.live(limits.get("server_keep_alive", settings.keepalive))
                self._known = True
                await self.established(present)
        except BaseException as error:
            if connection is not None:
                self.connection = None
                connection.close("given up")
                await connection.ended()
            if isinstance(error, TimeoutError):
                error = TimeoutError(f"no answer within {settings.connect_timeout:g} s")
            if isinstance(error, OSError):  # a NotConnected is one, too
                raise self._explained(error) from error
            raise error
        self.up.set()
        self.changed(self, True, "")

    def _refused(self, code: int, text: str) -> ConnectError:
        version = self.settings.version
        what = reason_of(code, text) if code in REASONS else _REFUSED.get(code, f"code {code}")
        if code in (1, 0x84) and version == V5:
            what += '; try version="3.1.1"'
        return ConnectError(f"{self.settings.where}: {what}", permanent=code in _PERMANENT[version])

    def _explained(self, error: OSError) -> ConnectError:
        if isinstance(error, ConnectError):
            return error
        where = self.settings.where
        if fault := tls_fault(error):
            return ConnectError(f"{where}: {fault}", permanent=True)
        what = str(error) or type(error).__name__
        if not self._known and isinstance(error, NotConnected | ConnectionResetError):
            # Cut off before CONNACK, as where one side speaks TLS and the other does not.
            plain = self.settings.ssl is None
            what += f"; if that port has {'TLS, write mqtts' if plain else 'no TLS, write mqtt'}://"
        return ConnectError(f"{where}: {what}")

    def told(self, code: int) -> None:
        """The server ended the connection and said why."""
        if code == TAKEN_OVER:
            self._stolen, self._thefts = True, self._thefts + 1
            self.error(
                f"another client took over the session {self.client_id!r}: two processes share "
                "a client identifier; give each its own client_id="
            )

    def lost(self, connection: Connection, reason: str) -> None:
        """A connection ended."""
        if connection is not self.connection:
            return
        self.connection, self.reason = None, reason
        was_up = self.up.is_set()
        self.up.clear()
        self.dropped()
        if was_up and not self.closed:
            lived = connection.loop.time() - connection.began
            self._short = 0 if lived > LASTING else self._short + 1
            if self._short % 10 == SUSPICIOUS:  # Mosquitto does not say that somebody took it over
                self.error(
                    f"{self._short} connections of {self.client_id!r} in a row ended soon after "
                    "they began: if another process uses the same client identifier, give each "
                    "its own client_id="
                )
            if lived > FORGET:
                self._thefts = int(self._stolen)
            self.changed(self, False, reason)
            self.revive()

    def revive(self) -> None:
        """Connect in the background, for as long as it takes."""
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        for attempt in itertools.count(self._short):
            await asyncio.sleep(reconnect_delay(attempt, self.settings.reconnect_max))
            if self._stolen:
                self._stolen = False
                wait = min(STAND_BACK * 2 ** (self._thefts - 1), STAND_BACK_MAX)
                await asyncio.sleep(wait * (1 + random.random() / 2))
            if self.closed:
                return
            try:
                await self._connect()
                return
            except ConnectError as error:
                self.reason = str(error)
                log.debug("%s", error)
                if error.permanent:
                    self.error(str(error))
            except Exception as error:
                self.broken(error)
                return

    def broken(self, error: Exception) -> None:
        """It cannot be established for a reason that another connection does not change."""
        self.error(f"{type(error).__name__}: {error}")

    def ask(self, build: Callable[[int], bytes]) -> asyncio.Future[tuple[bytes, str]]:
        """Send SUBSCRIBE or UNSUBSCRIBE; its answer, which nobody has to wait for.

        Raises:
            NotConnected: there is no connection; the answer raises it if it breaks meanwhile.
        """
        connection = self.connection
        if connection is None:
            raise NotConnected(self.reason, state="disconnected")
        mid = self.next_mid()
        answer: asyncio.Future[tuple[bytes, str]] = connection.loop.create_future()
        connection.answers[mid] = answer
        connection.write(build(mid))
        return answer

    def next_mid(self) -> int:
        """A packet identifier that is free."""
        busy = self.connection.answers if self.connection is not None else {}
        while True:
            self._mid = self._mid % 65_535 + 1
            if self._mid not in busy and not self.in_use(self._mid):
                return self._mid

    def in_use(self, mid: int) -> bool:
        """Whether a packet identifier is taken by what was published."""
        return False

    async def close(self) -> None:
        """Disconnect; the will is not sent, the session is kept as long as it was asked for."""
        self.closed = True
        if self._reviving is not None and self._reviving is not asyncio.current_task():
            self._reviving.cancel()
            await asyncio.wait([self._reviving])
        connection = self.connection
        if connection is not None:
            connection.close("closed", FAREWELL)
            await connection.ended()
        self.up.clear()
