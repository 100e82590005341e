"""One connection to RabbitMQ: pika's callbacks as futures, and how to reach a server."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Sequence
from copy import copy
from struct import Struct
from struct import error as StructError
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.credentials import ExternalCredentials, PlainCredentials
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    IncompatibleProtocolError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)
from pika.frame import Method, decode_frame
from pika.spec import Basic, BasicProperties

from ..errors import ConnectError, SetupError
from ..security import tls_fault, without_secrets

log = logging.getLogger("millstream.rabbit")
# pika writes several ERRORs for each attempt that fails; what matters is raised or notified by us.
if logging.getLogger("pika").level == logging.NOTSET:
    logging.getLogger("pika").setLevel(logging.CRITICAL)

#: Seconds for one answer of the server, such as that to a declaration.
API_TIMEOUT = 10.0
#: Seconds between two signs of life.
HEARTBEAT = 15
#: How pika says that a connection broke, and what the system said of it.
_STREAM_LOST = re.compile(r"Stream connection lost: \w+\((?:\d+, )?['\"](.*)['\"]\)")
#: Bytes that are read at once; pika reads 4 KiB.
_READ = 64 * 1024
#: Bytes around a frame's payload, and of them those before it.
_AROUND, _BEFORE = 8, 7
#: Kinds of publications of which the first frame is kept.
_HEADS = 256
#: A frame's type, channel and size; a content header's, with class, weight and the body's size
#: (AMQP 0-9-1, 2.3.5 and 4.2.6.1).
_FRAME, _HEADER, _END = Struct(">BHL"), Struct(">BHLHHQ"), b"\xce"
#: Reply codes of the server (AMQP 0-9-1, "Reply codes").
ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 403, 404, 405, 406
#: What pika raises for a value that has no place in a frame.
UNWRITABLE = (AMQPError, TypeError, ValueError, AttributeError, AssertionError, StructError)


class ChannelLost(Exception):
    """A channel ended; ``code`` is the server's, 0 where its connection ended."""

    def __init__(self, reason: BaseException | None) -> None:
        self.code: int = 0
        if isinstance(reason, ChannelClosedByBroker):
            self.code = reason.reply_code
        self.text = reason_of(reason) if reason is not None else "the connection broke"
        super().__init__(self.text)


class Connection(AsyncioConnection):  # type: ignore[misc]
    """pika's connection, which reads and writes in larger pieces, and writes at once.

    pika writes when the event loop says that the socket takes something, which it nearly always
    does: the question costs more than the writing.
    """

    _transport: Any
    _process_frame: Callable[[Any], None]
    _deliver_frame_to_channel: Callable[[Any], None]
    _plain = False
    _frame_buffer: bytes

    def _proto_connection_made(self, transport: Any) -> None:
        self._plain = not isinstance(transport._sock, ssl.SSLSocket)
        transport._MAX_RECV_BYTES = _READ
        super()._proto_connection_made(transport)  # pyright: ignore[reportAttributeAccessIssue]

    def _adapter_emit_data(self, data: bytes) -> None:
        transport = self._transport
        active = transport._state == transport._STATE_ACTIVE
        if self._plain and active and not transport._tx_buffers:
            try:
                sent = transport._sock.send(data)
            except OSError:  # full, or broken: pika tries again, and finds out
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def _on_data_available(self, data_in: bytes) -> None:
        data = self._frame_buffer + data_in if self._frame_buffer else data_in
        if data.startswith(b"AMQP"):  # the server speaks another version
            super()._on_data_available(data_in)  # pyright: ignore[reportAttributeAccessIssue]
            return
        at, end = 0, len(data)
        while at + _AROUND <= end:
            after = at + _AROUND + int.from_bytes(data[at + 3 : at + _BEFORE])
            if after > end:
                break
            self.bytes_received += after - at
            _, found = decode_frame(data[at:after])
            at = after
            if type(getattr(found, "method", None)) is Basic.Deliver:  # nobody else waits for it
                self.frames_received += 1
                self._deliver_frame_to_channel(found)
            else:
                self._process_frame(found)
        self._frame_buffer = data[at:]

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        data = b"".join(marshaled_frames)
        self.bytes_sent += len(data)
        self.frames_sent += len(marshaled_frames)
        self._adapter_emit_data(data)  # pyright: ignore[reportAttributeAccessIssue]


class Address:
    """Where a server is and how we log in, from an address and the options that override it.

    Raises:
        SetupError: it is not an address.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        if "://" not in url:
            url = f"amqp://{url}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit("amqp://"), 0
        if parts.scheme not in ("amqp", "amqps") or port == 0:
            raise SetupError(
                f"{without_secrets(url)!r} is not a server's address",
                fix="write amqp://user:password@host:5672/vhost (or amqps://)",
            )
        context: ssl.SSLContext | None = options.get("ssl_context")
        secure = bool(options.get("use_ssl") or context or parts.scheme == "amqps")
        self.host = options.get("host") or parts.hostname or "localhost"
        self.port = options.get("port") or port or (5671 if secure else 5672)
        vhost = options.get("virtualhost")
        self.vhost = vhost if vhost is not None else unquote(parts.path[1:]) or "/"
        self.scheme = "amqps" if secure else "amqp"
        self._context = context or (ssl.create_default_context() if secure else None)
        self._hostname = options.get("ssl_hostname") or self.host
        self._user = options.get("username") or unquote(parts.username or "guest")
        self._password = options.get("password") or unquote(parts.password or "guest")
        self._external = options.get("external", False)
        try:
            self._parameters = self._lasting(dict(parse_qsl(parts.query)), options)
        except (TypeError, ValueError) as error:
            raise SetupError(f"{self}: {error}") from error

    def __str__(self) -> str:
        where = f"{self.scheme}://{self.host}:{self.port}"
        return where if self.vhost == "/" else f"{where}/{quote(self.vhost, safe='')}"

    def _lasting(self, query: dict[str, str], options: dict[str, Any]) -> Any:
        """pika's parameters, without the login; ``query`` is what it reads from an address."""
        found: Any = pika.ConnectionParameters()
        if query:
            found = pika.URLParameters(f"amqp://localhost/?{urlencode(query)}")
        found.host, found.port, found.virtual_host = self.host, self.port, self.vhost
        if self._context is not None:
            found.ssl_options = pika.SSLOptions(self._context, self._hostname)
        if "heartbeat" not in query:
            found.heartbeat = options.get("heartbeat", HEARTBEAT)
        timeout = options.get("timeout") or 10.0
        found.socket_timeout, found.stack_timeout = timeout, timeout + 5.0
        found.connection_attempts = 1
        properties = {"product": "millstream", **(options.get("client_properties") or {})}
        found.client_properties = properties
        return found

    def parameters(self) -> pika.ConnectionParameters:
        """pika's parameters; callables for the user and the password are asked each time."""
        found: Any = copy(self._parameters)  # pika writes in them what the server wants
        found.credentials = (
            ExternalCredentials()
            if self._external
            else PlainCredentials(_asked(self._user), _asked(self._password))
        )
        return cast("pika.ConnectionParameters", found)


def _asked(secret: Any) -> str:
    return str(secret() if callable(secret) else secret)


def addresses(urls: str | Sequence[str], options: dict[str, Any]) -> list[Address]:
    """The servers of a cluster; the first one is tried first."""
    given = urls.split(",") if isinstance(urls, str) else list(urls)
    found = [Address(url.strip(), options) for url in given if url.strip()]
    return found or [Address("amqp://localhost", options)]


async def connect(address: Address, on_close: Callable[[BaseException], None]) -> Connection:
    """Connect in one attempt; ``on_close`` is called once, when the connection ends.

    Raises:
        ConnectError: not reached or not let in.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[None] = loop.create_future()

    def failed(_: Any, error: BaseException | str) -> None:
        if not opened.done():
            opened.set_exception(error if isinstance(error, BaseException) else OSError(error))

    def up(_: Any) -> None:
        if not opened.done():
            opened.set_result(None)

    try:
        connection = Connection(
            address.parameters(),
            on_open_callback=up,
            on_open_error_callback=failed,
            on_close_callback=lambda _, reason: on_close(reason),
            custom_ioloop=loop,
        )
    except Exception as error:  # a credentials callable, or a client certificate
        raise ConnectError(f"{address}: {reason_of(error)}") from error
    try:
        await opened
    except asyncio.CancelledError:
        if not connection.is_closed:
            connection.close()
        raise
    except Exception as error:
        text, permanent = _explain(error)
        raise ConnectError(f"{address}: {text}", permanent=permanent) from error
    return connection


async def disconnect(connection: AsyncioConnection, patience: float = 2.0) -> None:
    """Close a connection in an orderly way, and without any where the server does not answer."""
    if connection.is_closed:
        return
    ended = asyncio.Event()
    connection.add_on_close_callback(lambda *_: ended.set())
    if not connection.is_closing:
        connection.close()
    try:
        async with asyncio.timeout(patience):
            await ended.wait()
    except TimeoutError:
        abort(connection)


def abort(connection: AsyncioConnection) -> None:
    """Drop a connection whose server does not answer."""
    if not connection.is_closed:
        # pika has no public way: its `close` waits for the server without end.
        end: Any = connection._terminate_stream  # pyright: ignore[reportAttributeAccessIssue]
        end(AMQPError("the server does not answer"))


def _explain(error: BaseException) -> tuple[str, bool]:
    """What to tell people about a failed attempt, and whether another one cannot help."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        inner = getattr(seen, "exceptions", None) or getattr(seen, "exception", None)
        if isinstance(inner, list | tuple):
            inner = inner[-1] if inner else None
        first = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else None
        seen = inner if isinstance(inner, BaseException) else first
    for one in chain:
        if fault := tls_fault(one):
            return fault, True
        if isinstance(one, ProbableAuthenticationError) or "ACCESS_REFUSED" in str(one):
            return "the server refuses the credentials", True
        if isinstance(one, ProbableAccessDeniedError) or "NOT_ALLOWED" in str(one):
            return "the virtual host does not exist, or is not for this user", True
        if isinstance(one, IncompatibleProtocolError):
            return "the server does not speak AMQP 0-9-1, or wants TLS", False
    for one in reversed(chain):
        if isinstance(one, OSError) and not isinstance(one, TimeoutError) and one.strerror:
            return one.strerror, False
    return reason_of(chain[-1]), False


def reason_of(error: BaseException) -> str:
    """A short text for people."""
    if isinstance(error, ChannelClosedByBroker | ConnectionClosedByBroker):
        return f"{error.reply_text}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = str(error)
    lost = _STREAM_LOST.fullmatch(text)
    if lost:
        text = lost[1]
    elif text == "Transport indicated EOF":
        text = "the server ended it"
    return text or type(error).__name__


class Wire:
    """A channel whose calls are awaited.

    Args:
        channel: pika's, open.
        on_close: called once with the reason when the channel ends, unless :meth:`close` did it.
    """

    def __init__(self, channel: Channel, on_close: Callable[[ChannelLost], None]) -> None:
        self.channel = channel
        self._on_close = on_close
        self._waiting: set[asyncio.Future[Any]] = set()
        self._closing = False
        self.lost: ChannelLost | None = None
        #: The first frame of a publication, by what is in it.
        self._heads: dict[tuple[str, str, bool], bytes] = {}
        channel.add_on_close_callback(self._closed)

    @classmethod
    async def open(
        cls,
        connection: AsyncioConnection,
        on_close: Callable[[ChannelLost], None] = lambda reason: None,
    ) -> Wire:
        """Open a channel.

        Raises:
            ChannelLost: the connection broke, or has no channel left.
        """
        opened: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

        def closed(_: Any, reason: BaseException) -> None:
            if not opened.done():
                opened.set_exception(ChannelLost(reason))

        def up(channel: Channel) -> None:
            if not opened.done():
                opened.set_result(channel)

        try:
            channel = connection.channel(on_open_callback=up)
        except AMQPError as error:
            raise ChannelLost(error) from error
        channel.add_on_close_callback(closed)
        async with asyncio.timeout(API_TIMEOUT):
            return cls(await opened, on_close)

    @property
    def open_(self) -> bool:
        """Whether it can be used at this moment."""
        return self.lost is None and self.channel.is_open

    def _closed(self, _: Any, reason: BaseException) -> None:
        self.lost = ChannelLost(reason)
        for future in self._waiting:
            if not future.done():
                future.set_exception(self.lost)
        if not self._closing:
            self._on_close(self.lost)

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of pika's channel that the server answers; returns the answer.

        Raises:
            ChannelLost: the server refused, which ends the channel, or the connection broke.
            TimeoutError: no answer in time.
        """
        if self.lost is not None:
            raise self.lost
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)

        def done(frame: Any) -> None:
            if not future.done():
                future.set_result(frame.method)

        try:
            getattr(self.channel, method)(*args, callback=done, **kwargs)
            async with asyncio.timeout(API_TIMEOUT):
                return await future
        except AMQPError as error:
            raise ChannelLost(error) from error
        finally:
            self._waiting.discard(future)

    def publish(
        self, exchange: str, key: str, body: bytes, properties: BasicProperties, mandatory: bool
    ) -> None:
        """As pika's ``basic_publish``, without making anew what is the same for each message."""
        channel: Any = self.channel
        if not channel.is_open:
            raise self.lost or ChannelLost(None)
        number, connection = channel.channel_number, channel.connection
        head = self._heads.get((exchange, key, mandatory))
        if head is None:
            if len(self._heads) >= _HEADS:
                self._heads.clear()
            method = Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
            head = self._heads[exchange, key, mandatory] = Method(number, method).marshal()
        fields, size = b"".join(properties.encode()), len(body)
        frames = [head, _HEADER.pack(2, number, 12 + len(fields), 60, 0, size), fields, _END]
        most = connection._body_max_length
        for at in range(0, size, most):
            piece = body if size <= most else body[at : at + most]
            frames += _FRAME.pack(3, number, len(piece)), piece, _END
        connection._output_marshaled_frames(frames)

    async def close(self) -> None:
        """End the channel; what it delivered and nobody acknowledged goes back."""
        self._closing = True
        if not self.channel.is_open:
            return
        ended = asyncio.Event()
        self.channel.add_on_close_callback(lambda *_: ended.set())
        self.channel.close()
        try:
            async with asyncio.timeout(2.0):
                await ended.wait()
        except TimeoutError:
            log.debug("a channel did not close in time")
