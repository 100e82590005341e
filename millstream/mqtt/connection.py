"""One connection to a server, and a line: a connection that comes back by itself."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from ..errors import ConnectError, NotConnected
from ..intake import reconnect_delay
from ..security import tls_fault
from .wire import (
    CONNACK,
    DISCONNECT,
    FAREWELL,
    LARGEST,
    MALFORMED,
    PING,
    PINGRESP,
    PROTOCOL_ERROR,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREL,
    REASONS,
    SUBACK,
    TAKEN_OVER,
    TOO_LARGE,
    UNSUBACK,
    V5,
    V311,
    Incoming,
    Malformed,
    read_ack,
    read_connack,
    read_disconnect,
    read_publish,
    read_suback,
    read_variable,
    reason_of,
    write_connect,
    write_disconnect,
)

log = logging.getLogger("millstream.mqtt")

#: Seconds that a connection has to last before the next one may follow at once; and how many in
#: a row may not, until people are told why that may be.
LASTING, SUSPICIOUS = 10.0, 3
#: Seconds in which the server has to take what was written when a connection is closed.
PARTING = 1.0
#: Seconds to stand back for whoever took the session over: at first, at most, and seconds that a
#: connection has to last until that is forgotten.
STAND_BACK, STAND_BACK_MAX, FORGET = 5.0, 60.0, 120.0
#: What the server says, by version, where another attempt cannot help.
_PERMANENT = {
    V5: {0x81, 0x82, 0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x90, 0x95, 0x99, 0x9A, 0x9B, 0x9D},
    V311: {1, 2, 4, 5},
}
_REFUSED = {
    1: "the server does not know this version of MQTT",
    2: "the server does not take this client identifier",
    3: "the server is not available",
    4: "bad user name or password",
    5: "not authorized",
}


class Settings(msgspec.Struct, kw_only=True):
    """What all connections of a broker have in common."""

    host: str
    port: int
    ssl: ssl.SSLContext | None
    version: int
    username: str | None
    password: str | bytes | None
    keepalive: int
    connect_timeout: float
    reconnect_max: float
    maximum_packet_size: int | None
    user_properties: Sequence[tuple[str, str]]

    @property
    def where(self) -> str:
        """The address for people."""
        return f"{'mqtts' if self.ssl is not None else 'mqtt'}://{self.host}:{self.port}"


class Connection(asyncio.Protocol):
    """A connection: packets in and out, signs of life, answers to what was asked.

    Args:
        line: whose connection this is.
        version: of MQTT.
        keepalive: seconds within which the server wants to hear of us, and we of it.
        largest: bytes of the largest packet that it may send.
    """

    def __init__(
        self, line: Line, version: int, keepalive: int, largest: int | None = None
    ) -> None:
        self.line, self.version, self.keepalive = line, version, keepalive
        self.largest = largest or LARGEST
        self.loop = asyncio.get_running_loop()
        #: CONNACK: whether there was a session, reason code, properties.
        self.welcome: asyncio.Future[tuple[bool, int, dict[str, Any]]] = self.loop.create_future()
        #: Packet identifier → whoever waits for its SUBACK or UNSUBACK.
        self.answers: dict[int, asyncio.Future[tuple[bytes, str]]] = {}
        self.pings: list[asyncio.Future[None]] = []
        #: Cleared while the other side takes no data.
        self.writable = asyncio.Event()
        self.writable.set()
        self.reading = True
        #: Done once nothing of it is left.
        self.over: asyncio.Future[None] = self.loop.create_future()
        self.began = self.loop.time()
        self._transport: asyncio.Transport | None = None
        self._chunks: list[bytes] = []
        #: Bytes that are there, and that are needed before there is another packet.
        self._size = self._needed = 0
        self._out: list[bytes] = []
        self._heard = self._told = self._asked = False
        self._beat: asyncio.TimerHandle | None = None
        self._over = ""
        self._received = self._early

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.over.done():
            self.over.set_result(None)
        self._end(self._over or (str(exc) if exc is not None else "the server closed it"))

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._chunks:
            self._chunks.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return
            data = b"".join(self._chunks)
            self._chunks.clear()
        try:
            rest = self._read(data)
        except (Malformed, IndexError, UnicodeDecodeError) as error:
            code = error.code if isinstance(error, Malformed) else MALFORMED
            what = "a packet that is cut off" if isinstance(error, IndexError) else error
            self.close(
                f"the server sent what is not MQTT: {what}", write_disconnect(self.version, code)
            )
            return
        if rest < len(data):
            self._chunks.append(data[rest:])
            self._size = len(data) - rest

    def _read(self, data: bytes) -> int:
        """Take all whole packets; returns where the first begins that is not all there."""
        at, size, version, received = 0, len(data), self.version, self._received
        while size - at > 1:
            head, length, start = data[at], data[at + 1], at + 2
            if length > 127:
                try:
                    length, start = read_variable(data, at + 1)
                except IndexError:
                    break
                if length > self.largest:
                    raise Malformed(f"a packet of {length:,} bytes", TOO_LARGE)
            end = start + length
            if end > size:
                self._needed = end - at
                return at
            if head & 0xF0 == PUBLISH:
                received(read_publish(data, start, end, head & 15, version))
            else:
                self._take(head, data[start:end])
                if self._over:
                    return size
                received = self._received
            at = end
        self._needed = 0
        return at

    def _take(self, head: int, body: bytes) -> None:
        line, kind, welcomed = self.line, head & 0xF0, self.welcome.done()
        if head & 15 != (2 if kind == PUBREL else 0):
            raise Malformed(f"a packet that begins with 0x{head:02X}")
        if welcomed is (kind == CONNACK):
            raise Malformed(f"a packet of kind 0x{kind:02X} at this point", PROTOCOL_ERROR)
        if PUBACK <= kind <= PUBCOMP:
            line.acknowledged(kind, *read_ack(body))
        elif kind in (SUBACK, UNSUBACK):
            mid, codes, reason = read_suback(body, self.version)
            if kind == SUBACK and not codes:
                raise Malformed("a SUBACK without a reason code")
            answer = self.answers.pop(mid, None)
            if answer is not None and not answer.done():
                answer.set_result((codes, reason))
        elif kind == PINGRESP:
            self._asked = False
            for ping in self.pings:
                if not ping.done():
                    ping.set_result(None)
            self.pings.clear()
        elif kind == CONNACK:
            welcome = read_connack(body, self.version)
            if welcome[1] == 0:
                # Its messages may stand behind it already.
                self._received = line.received
                line.welcomed(self, welcome[0], welcome[2])
            self.welcome.set_result(welcome)
        elif kind == DISCONNECT:
            code, reason = read_disconnect(body)
            line.told(code)
            self.close(reason_of(code, reason))
        else:
            raise Malformed(f"a packet of kind 0x{kind:02X}", PROTOCOL_ERROR)

    def _early(self, message: Incoming) -> None:
        raise Malformed("a message before CONNACK", PROTOCOL_ERROR)

    # Writing

    def write(self, data: bytes) -> None:
        """Send a packet, together with all others of this turn of the event loop."""
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and not self._transport.is_closing():
            self._told = True
            self._transport.write(b"".join(out))

    def read_on(self, on: bool) -> None:
        """Read from the server, or let it wait."""
        if on != self.reading and self._transport is not None:
            self.reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    # Life

    def live(self, keepalive: int) -> None:
        """Begin to give and to watch for signs of life."""
        self.keepalive = keepalive
        if keepalive:
            self._beat = self.loop.call_later(keepalive / 2, self._look)

    def _look(self) -> None:
        """Every half of the keepalive: ask after half of it in silence, end after another."""
        if self._heard or not self.reading:
            self._asked = False
        elif self._asked:
            self.close(f"no sign of life for {self.keepalive} s")
            return
        if not (self._heard and self._told):
            self._asked = not self._heard
            self.write(PING)
        self._heard = self._told = False
        self._beat = self.loop.call_later(self.keepalive / 2, self._look)

    async def ping(self) -> None:
        """Return when the server has answered."""
        answer: asyncio.Future[None] = self.loop.create_future()
        self.pings.append(answer)
        self.write(PING)
        await answer

    def close(self, reason: str, farewell: bytes = b"") -> None:
        """End the connection now, after what was written and ``farewell``."""
        self._over = self._over or reason
        if farewell:
            self._out.append(farewell)
        if self._out:
            self._flush()
        transport = self._transport
        if transport is not None and not farewell:
            transport.abort()
        elif transport is not None and not transport.is_closing():
            transport.close()
            self.loop.call_later(PARTING, transport.abort)
        self._end(self._over)

    async def ended(self) -> None:
        """Return when nothing of it is left."""
        if self._transport is not None:
            await self.over

    def _end(self, reason: str) -> None:
        if self._beat is not None:
            self._beat.cancel()
        lost = NotConnected(f"the connection broke: {reason}", state="disconnected")
        waiting: list[asyncio.Future[Any]] = [self.welcome, *self.answers.values(), *self.pings]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(lost)
                answer.exception()  # it may be that nobody waits any more
        self.answers.clear()
        self.pings.clear()
        self.writable.set()
        self.line.lost(self, reason)


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

    async def _connect(self) -> None:
        settings = self.settings
        loop = asyncio.get_running_loop()
        clean = self.clean if self._known else self.clean_first
        properties = {
            "session_expiry_interval": self.expiry or None,
            "receive_maximum": self.receive_maximum,
            "maximum_packet_size": settings.maximum_packet_size,
            "request_response_information": 1,
            "user_property": settings.user_properties,
        }
        hello = write_connect(
            settings.version,
            self.client_id,
            clean=clean,
            keepalive=settings.keepalive,
            username=settings.username,
            password=settings.password,
            properties=properties,
            will=self.will,
        )
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
                    raise self._refused(code, limits.get("reason_string", ""))
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
        if fault := tls_fault(error):
            return ConnectError(f"{self.settings.where}: {fault}", permanent=True)
        return ConnectError(f"{self.settings.where}: {error or type(error).__name__}")

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

    async def ask(self, build: Callable[[int], bytes]) -> tuple[bytes, str]:
        """Send SUBSCRIBE or UNSUBSCRIBE and return its answer.

        Raises:
            NotConnected: the connection broke meanwhile.
        """
        connection = self.connection
        if connection is None:
            raise NotConnected(self.reason, state="disconnected")
        mid = self.next_mid()
        answer: asyncio.Future[tuple[bytes, str]] = connection.loop.create_future()
        connection.answers[mid] = answer
        connection.write(build(mid))
        return await answer

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
