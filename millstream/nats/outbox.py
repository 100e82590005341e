"""Publishing to NATS: fire and forget, confirmed by a stream, requests, and the JetStream API."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import (
    BadHeaderError,
    BadSubjectError,
    ConnectionClosedError,
    ConnectionDrainingError,
    MaxPayloadError,
    OutboundBufferLimitError,
)
from nats.errors import Error as NatsError
from nats.js.api import PubAck
from nats.js.errors import APIError

from ..base import disconnected
from ..errors import (
    MessageTooLarge,
    MillstreamError,
    NoResponders,
    PublishError,
    PublishTimeout,
    RequestTimeout,
)
from .connection import NoJetStream, reason_of
from .options import NatsPublish
from .replies import Replies

if TYPE_CHECKING:
    from .driver import NatsDriver

#: Seconds for a JetStream API call where nothing else is said.
API_TIMEOUT = 5.0
#: Seconds after which a message with an id is sent again if no confirmation came.
RESEND = 1.0
#: Bytes that may wait for the socket before publishers have to wait (nats-py's own default).
PENDING = 2 * 1024 * 1024
#: Seconds between two looks whether there is room again.
ROOM = 0.005
#: What nats-py's ``publish`` raises; RuntimeError is uvloop's word for a transport that was
#: closed a moment ago.
BROKEN = (NatsError, RuntimeError)


class Outbox:
    """All that the driver sends.

    Args:
        driver: whose it is.
        pending: bytes that may wait for the socket before publishers have to wait.
        prefix: how the subjects of the JetStream API begin.
        api_timeout: seconds for an answer of that API.
    """

    def __init__(
        self, driver: NatsDriver, *, pending: int | None, prefix: str, api_timeout: float
    ) -> None:
        self.driver, self.prefix = driver, prefix
        self._pending, self._api_timeout = pending or PENDING, api_timeout
        self.replies: Replies | None = None

    async def attach(self, client: Client) -> None:
        """Send by another connection from now on."""
        replies = Replies(client)
        await replies.open()
        self.replies = replies

    def detach(self) -> None:
        """There is no connection any more."""
        self.replies = None

    async def _ready(self, timeout: float, size: int = 0) -> float:
        """Wait until there is a connection, with room for ``size`` bytes more.

        Returns the seconds that are left of ``timeout``.

        Raises:
            NotConnected: not in time.
        """
        self.driver.client  # noqa: B018 - says so if there was no connection at all
        now = self.driver.clock.now
        end = now() + timeout
        while not self._room(size):
            left = end - now()
            if left <= 0:
                reason = "it takes no data" if self.driver.connected else self.driver.reason
                raise disconnected(self.driver.describe(), reason, timeout)
            if self.driver.connected:
                await self.driver.clock.sleep(min(ROOM, left))
                continue
            self.driver.up.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.driver.up.wait()
        return max(end - now(), 0.01)

    def _room(self, size: int) -> bool:
        client = self.driver.present
        if client is None or not client.is_connected:
            return False
        pending = client.pending_data_size
        return not pending or pending + size < self._pending

    async def publish(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None
    ) -> PubAck | None:
        timeout = command.timeout if command.timeout is not None else self.driver.publish_timeout
        if not self._room(len(data)):
            timeout = await self._ready(timeout, len(data))
        client = self.driver.client
        wire = headers or None
        if command.stored or command.subject in self.driver.streams.kept:
            wire = command.wire_headers(headers)
            self._check_size(client, command.subject, data, wire)
            return await self._store(command.subject, data, wire, timeout)
        self._check_size(client, command.subject, data, wire)
        try:
            await client.publish(command.subject, data, command.reply_to, wire)
        except BROKEN as error:
            raise self.refused(command.subject, error) from error
        return None

    def _check_size(
        self, client: Client, subject: str, data: bytes, headers: dict[str, str] | None
    ) -> None:
        # nats-py does not count the headers; the server would close the connection.
        size = len(data)
        if headers is not None:
            size += 16 + sum(len(key) + 4 + len(value.encode()) for key, value in headers.items())
        if size > client.max_payload:
            raise MessageTooLarge(
                f"{size:,} bytes for {subject!r}: the server takes {client.max_payload:,} at most "
                "(max_payload); send less, or put the body into an object store"
            )

    async def _store(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> PubAck:
        """Publish into a stream; nobody else has to wait for this confirmation."""
        now = self.driver.clock.now
        end = now() + timeout
        # With an id, the stream itself sees to it that trying again stores nothing twice.
        patience = RESEND if headers and "Nats-Msg-Id" in headers else timeout
        while True:
            try:
                left = max(end - now(), 0.01)
                reply = await self.ask(subject, data, headers, min(patience, left))
                break
            except RequestTimeout:
                if now() + 0.01 < end:
                    continue
                raise PublishTimeout(
                    f"no stream confirmed a message to {subject!r} within {timeout:g} s"
                ) from None
            except NoResponders:
                # A stream between two leaders answers again soon (as in nats.go, twice 250 ms).
                if now() + 0.25 > min(end, end - timeout + 0.6):
                    raise PublishError(
                        f"no stream stores {subject!r}: declare it with stream= on a subscriber "
                        "or publisher, or leave out stream= (and message_id=) here"
                    ) from None
                await self.driver.clock.sleep(0.25)
        answer = msgspec.json.decode(reply.data)
        if "error" in answer:
            error = answer["error"]
            hint = "; stream= names another stream" if error.get("err_code") == 10060 else ""
            raise PublishError(f"{subject!r} was not stored: {error.get('description')}{hint}")
        ack: PubAck = PubAck.from_response(answer)
        return ack

    async def request(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        if not self._room(len(data)):
            timeout = await self._ready(timeout, len(data))
        wire = command.wire_headers(headers)
        self._check_size(self.driver.client, command.subject, data, wire)
        return await self.ask(command.subject, data, wire, timeout)

    async def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish without any ado: acknowledgements and requests for messages."""
        try:
            await self.driver.client.publish(subject, data, reply)
        except BROKEN as error:
            raise self.refused(subject, error) from error

    async def acknowledge(self, reply: str) -> None:
        """Send ``+ACK`` to an address that the server gave.

        Does what nats-py's ``publish`` does, without its checks of what a user may give: they
        cost as much as all else that happens to a message here.
        """
        client = self.driver.client
        try:
            if client.is_connected and client._flush_queue is not None:
                await client._send_command(b"PUB %b 4\r\n+ACK\r\n" % reply.encode())
                if client._flush_queue.empty():
                    await client._flush_pending()
            else:
                await client.publish(reply, b"+ACK")
        except BROKEN as error:
            raise self.refused(reply, error) from error

    async def ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        """Publish and wait ``timeout`` seconds for the answer."""
        if self.replies is None:
            self.driver.client  # noqa: B018 - says that there is no connection
        assert self.replies is not None
        try:
            return await self.replies.ask(subject, data, headers, timeout)
        except BROKEN as error:
            raise self.refused(subject, error) from error

    def refused(self, subject: str, error: Exception) -> Exception:
        """What an error of nats-py's ``publish`` is called here."""
        if isinstance(error, MillstreamError):
            return error
        if isinstance(error, MaxPayloadError):
            return MessageTooLarge(f"too large for the server: {subject!r}")
        if isinstance(error, BadSubjectError):
            return PublishError(f"{subject!r} is no subject to publish to")
        if isinstance(error, BadHeaderError):
            return PublishError(f"{subject!r}: {reason_of(error)}")
        if isinstance(
            error,
            OutboundBufferLimitError | ConnectionClosedError | ConnectionDrainingError,
        ):
            return disconnected(self.driver.describe(), reason_of(error))
        if isinstance(error, RuntimeError):
            return disconnected(self.driver.describe(), "the connection broke")
        return PublishError(f"{subject!r}: {reason_of(error)}")

    async def api(self, path: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call the JetStream API and return its answer as it is.

        Raises:
            APIError: the server refuses; a subclass of nats-py's tells what.
            NoJetStream: the server runs without JetStream.
        """
        data = msgspec.json.encode(request) if request is not None else b""
        await self._ready(self._api_timeout)
        try:
            reply = await self.ask(f"{self.prefix}.{path}", data, None, self._api_timeout)
        except NoResponders:
            raise NoJetStream(
                f"{self.driver.describe()} has no JetStream",
                fix="start nats-server with -js, or enable JetStream for the account",
            ) from None
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        if "error" in answer:
            error = answer["error"]
            known = {key: error.get(key) for key in ("code", "description", "err_code")}
            APIError.from_error(known)
        return answer
