"""One connection to a server: packets in and out, signs of life."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..errors import NotConnected
from .wire import (
    CONNACK,
    DISCONNECT,
    LARGEST,
    MALFORMED,
    PING,
    PINGRESP,
    PROTOCOL_ERROR,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREL,
    SUBACK,
    TOO_LARGE,
    UNSUBACK,
    Incoming,
    Malformed,
    read_ack,
    read_connack,
    read_disconnect,
    read_publish,
    read_suback,
    read_variable,
    reason_of,
    write_disconnect,
)

if TYPE_CHECKING:
    from .line import Line

log = logging.getLogger("millstream.mqtt")

#: Seconds in which the server has to take what was written when a connection is closed.
PARTING = 1.0


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
        self._end(self._over or (str(exc) if exc is not None else "the server closed it"), exc)

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

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        if self._beat is not None:
            self._beat.cancel()
        lost = NotConnected(f"the connection broke: {reason}", state="disconnected")
        lost.__cause__ = cause
        waiting: list[asyncio.Future[Any]] = [self.welcome, *self.answers.values(), *self.pings]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(lost)
                answer.exception()  # it may be that nobody waits any more
        self.answers.clear()
        self.pings.clear()
        self.writable.set()
        self.line.lost(self, reason)
