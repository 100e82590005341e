"""The NATS driver: one connection, and everything that goes over it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

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
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import APIError

from ..address import AddressSyntax
from ..clock import Clock, LoopClock
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    ConnectError,
    MessageTooLarge,
    MillstreamError,
    NoResponders,
    NotConnected,
    PublishError,
    PublishTimeout,
    RequestTimeout,
    SetupError,
)
from ..intake import Tasks, disconnected, not_yet_connected, reconnect_delay
from ..message import Message
from ..security import without_secrets
from .connection import (
    NoJetStream,
    addresses,
    client_options,
    connect,
    discard,
    reason_of,
)
from .flow import CoreFlow, Flow, log
from .jetstream import PullFlow, PushFlow, StreamFlow
from .letters import NatsLetters
from .message import NatsMessage
from .options import SYNTAX, NatsPublish, NatsSubscription
from .replies import Replies
from .security import NatsSecurity
from .stores import Stores
from .streams import Streams

#: Seconds for a JetStream API call where nothing else is said.
API_TIMEOUT = 5.0
#: Seconds after which a message with an id is sent again if no confirmation came.
RESEND = 1.0
#: Bytes that may wait for the socket before publishers have to wait (nats-py's own default).
PENDING = 2 * 1024 * 1024
#: Seconds between two looks whether there is room again.
ROOM = 0.005
#: Seconds for each of the last things that are done at a close.
LAST = 2.0
#: What nats-py's ``publish`` raises; RuntimeError is uvloop's word for a transport that was
#: closed a moment ago.
BROKEN = (NatsError, RuntimeError)
#: Seconds after which a round trip that nobody waits for any more is given up.
PATIENT = 600


class NatsDriver:
    """One connection to a NATS server or cluster, by nats-py.

    Args:
        servers: one address, several in a list, or several joined by commas.
        security: who we are; a user and password or a token may also stand in the address.
        publish_timeout: seconds that ``publish`` waits for a lost connection and for a
            stream's confirmation, where the command does not say it.
        clock: the time that waits go by.
        js_options: ``domain`` or ``prefix``, and ``timeout`` (seconds) of the JetStream API.
        options: any further keyword of nats-py's ``connect``. ``reconnect_time_wait`` is the
            longest wait between two attempts, and attempts never end by default.
    """

    name: ClassVar[str] = "nats"
    syntax: ClassVar[AddressSyntax] = SYNTAX
    command: ClassVar[type[PublishCommand]] = NatsPublish
    control_headers: ClassVar[str | tuple[str, ...]] = "Nats-"

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        *,
        security: NatsSecurity | None = None,
        publish_timeout: float = 5.0,
        clock: Clock | None = None,
        js_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.urls = addresses(servers)
        self.clock: Clock = clock or LoopClock()
        self.publish_timeout = publish_timeout
        self.notify: Callable[[str, str], None] = lambda event, reason: None
        self.streams = Streams(self)
        self.stores = Stores(self)
        self.intakes: set[Flow] = set()
        self._callbacks = {key: options.pop(key, None) for key in _CALLBACKS}
        self._pending_size = options.get("pending_size") or PENDING
        options.setdefault("flush_timeout", publish_timeout)
        self._options = client_options(security, options)
        self._js_options = js_options or {}
        self.prefix = self._js_options.get("prefix", "$JS.API")
        if domain := self._js_options.get("domain"):
            self.prefix = f"$JS.{domain}.API"
        self._api_timeout = self._js_options.get("timeout", API_TIMEOUT)
        self._client: Client | None = None
        self._js: JetStreamContext | None = None
        self._replies: Replies | None = None
        self._up = asyncio.Event()
        self._closing = False
        #: An attempt runs: what its client says of itself ends in the attempt's own error.
        self._opening = False
        self._reason = ""
        self._tasks = Tasks(log)
        #: Runs something on the side until it is done or the driver closes.
        self.spawn = self._tasks.spawn
        self._id = secrets.token_hex(4)
        #: Names of consumers that end with this process, by the subscription's identity.
        self._ephemeral: dict[int, tuple[NatsSubscription, str]] = {}

    def describe(self) -> str:
        return ", ".join(without_secrets(url) for url in self.urls)

    # Connection

    @property
    def client(self) -> Client:
        """The connected client of nats-py.

        Raises:
            NotConnected: before ``connect`` or after ``close``.
        """
        if self._client is None:
            raise not_yet_connected(self.describe())
        return self._client

    @property
    def js(self) -> JetStreamContext:
        """nats-py's JetStream context of the present connection."""
        if self._js is None:
            self._js = self.client.jetstream(**self._js_options)
        return self._js

    @property
    def connected(self) -> bool:
        """Whether the connection is up at this moment."""
        return self._client is not None and self._client.is_connected

    async def connect(self) -> None:
        if self._client is not None:
            return
        self._closing = False
        await self._open()

    async def _open(self) -> None:
        self._opening = True
        try:
            client = await connect(
                self.urls,
                self._options,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                discovered_server_cb=self._callbacks["discovered_server_cb"],
            )
        finally:
            self._opening = False
        replies = Replies(client)
        await replies.open()
        self._client, self._replies, self._js = client, replies, None
        self.stores.opened.clear()
        self._up.set()

    async def close(self) -> None:
        self._closing = True
        client = self._client
        if client is not None:
            if client.is_connected:
                for spec, name in self._ephemeral.values():
                    await self.forget(spec.stream_name or "", name)
                await self.flush(LAST)
            await discard(client, LAST)
        self._client = self._replies = self._js = None
        self._ephemeral.clear()
        self._up.clear()
        self._tasks.cancel()

    async def ping(self, timeout: float) -> bool:
        return self.connected and await self.flush(timeout)

    async def flush(self, timeout: float) -> bool:
        """Whether the server confirms within ``timeout`` seconds to have got everything so far.

        The round trip itself is never cancelled: a late answer to one that was would end
        nats-py's reader without a word.
        """
        flushing = self.spawn(self.client.flush(PATIENT))
        await asyncio.wait({flushing}, timeout=timeout)
        return flushing.done() and not flushing.cancelled() and flushing.exception() is None

    async def _on_error(self, error: Exception) -> None:
        self._reason = reason_of(error)
        if self.connected and not isinstance(error, OSError):
            self._denied(self._reason)
            self.report(self._reason)
        await self._call("error_cb", error)

    def _denied(self, reason: str) -> None:
        """A subscription that the server does not permit never gets anything: it is lost."""
        marker = "permissions violation for subscription to "
        if marker not in reason:
            return
        subject = reason.split(marker, 1)[1].split('"')[1]
        for intake in list(self.intakes):
            if isinstance(intake, CoreFlow) and intake.spec.pattern.lower() == subject:
                intake.deny(SetupError(reason, fix="grant the user the right to subscribe to it"))

    async def _on_disconnected(self) -> None:
        if self._opening:
            return
        self._up.clear()
        # This runs inside of nats-py's task that reconnects.
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(self._reconnecting_ended)
        if not self._closing:
            self.notify("disconnected", self._reason or "the connection broke")
        await self._call("disconnected_cb")

    def _reconnecting_ended(self, task: asyncio.Task[Any]) -> None:
        """nats-py's task dies of what it does not expect, and would leave us in silence."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._closing and self._client is not None:
            self._reason = reason_of(error)
            log.warning("%s: reconnecting ended with %r; trying anew", self.describe(), error)
            self.spawn(self._replace(self._client))

    async def _replace(self, client: Client) -> None:
        self._opening = True  # what the old client says of its end is of no interest
        await discard(client)
        self._opening = False
        await self._revive()

    async def _on_reconnected(self) -> None:
        url = self._client.connected_url if self._client is not None else None
        self._up.set()
        for intake in list(self.intakes):
            intake.reconnected()
        self.notify("reconnected", without_secrets(url.geturl()) if url else self.describe())
        await self._call("reconnected_cb")

    async def _on_closed(self) -> None:
        """nats-py gave up, or the server threw us out (an expired login, for instance)."""
        if self._opening:
            return
        await self._call("closed_cb")
        if self._closing:
            return
        limited = self._options["max_reconnect_attempts"] >= 0
        if limited or not self._options.get("allow_reconnect", True):
            self.notify("closed", f"gave up reconnecting: {self._reason}")
        else:
            self.spawn(self._revive())

    async def _revive(self) -> None:
        """A new client in place of one that is closed for good, with the same subscriptions."""
        for attempt in itertools.count(1):
            wait = reconnect_delay(attempt, self._options["reconnect_time_wait"])
            await self.clock.sleep(wait)
            try:
                await self._open()
                for intake in list(self.intakes):
                    await intake.attach()
            except (ConnectError, NatsError) as error:
                self._reason = reason_of(error)
                log.debug("%s", error)
                if self._client is not None and not self._client.is_closed:
                    await discard(self._client)
                continue
            await self._on_reconnected()
            return

    async def _call(self, name: str, *args: Any) -> None:
        callback = self._callbacks[name]
        if callback is not None:
            await callback(*args)

    def report(self, reason: str) -> None:
        """Tell the application of an error that ends nothing."""
        self.notify("error", reason)

    # Declarations and subscriptions

    async def declare(self, specs: Sequence[Spec]) -> None:
        await self.streams.declare(specs)
        for spec in specs:
            if isinstance(spec, NatsSubscription) and spec.watch is not None:
                await self.stores.declare(spec)

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        assert isinstance(spec, NatsSubscription)
        kind = CoreFlow if spec.stream_name is None else PushFlow if spec.push else PullFlow
        flow: CoreFlow | StreamFlow = kind(self, spec, sink, lost)
        self.intakes.add(flow)
        try:
            if isinstance(flow, StreamFlow):
                await flow.start()
            else:
                await flow.attach()
                await self.flush(API_TIMEOUT)  # the server knows it, or refused it, by now
                if flow.denied is not None:
                    raise flow.denied
                flow.live = True
        except BaseException:
            await flow.close()
            raise
        return flow

    def inbox(self, prefix: str | bytes) -> str:
        """A new inbox's subject, under ``prefix`` or the connection's own."""
        start = prefix.decode() if isinstance(prefix, bytes) else prefix
        own = self.client.new_inbox()
        return f"{start.rstrip('.')}.{own.rsplit('.', 1)[1]}" if start else own

    def ephemeral_name(self, spec: NatsSubscription) -> str:
        """The name of a consumer that ends with this process: the same for the same spec."""
        known = self._ephemeral.get(id(spec))
        if known is None:
            known = self._ephemeral[id(spec)] = (spec, f"ms-{self._id}-{len(self._ephemeral)}")
        return known[1]

    async def forget(self, stream: str, consumer: str) -> None:
        """Delete a consumer that nobody needs any more; the server would, in a while."""
        with suppress(NatsError, NoResponders, RequestTimeout, NotConnected):
            await self.api(f"CONSUMER.DELETE.{stream}.{consumer}")

    # Publishing

    async def _ready(self, timeout: float, size: int = 0) -> float:
        """Wait until there is a connection, with room for ``size`` bytes more.

        Returns the seconds that are left of ``timeout``.

        Raises:
            NotConnected: not in time.
        """
        self.client  # noqa: B018 - says so if there was no connection at all
        now = self.clock.now
        end = now() + timeout
        while not self._room(size):
            left = end - now()
            if left <= 0:
                reason = "it takes no data" if self.connected else self._reason
                raise disconnected(self.describe(), reason, timeout)
            if self.connected:
                await self.clock.sleep(min(ROOM, left))
                continue
            self._up.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._up.wait()
        return max(end - now(), 0.01)

    def _room(self, size: int) -> bool:
        client = self._client
        if client is None or not client.is_connected:
            return False
        pending = client.pending_data_size
        return not pending or pending + size < self._pending_size

    async def publish(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None
    ) -> PubAck | None:
        timeout = command.timeout if command.timeout is not None else self.publish_timeout
        if not self._room(len(data)):
            timeout = await self._ready(timeout, len(data))
        client = self.client
        wire = headers or None
        if command.stored or command.subject in self.streams.kept:
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
        now = self.clock.now
        end = now() + timeout
        # With an id, the stream itself sees to it that trying again stores nothing twice.
        patience = RESEND if headers and "Nats-Msg-Id" in headers else timeout
        while True:
            try:
                left = max(end - now(), 0.01)
                reply = await self._ask(subject, data, headers, min(patience, left))
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
                await self.clock.sleep(0.25)
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
        self._check_size(self.client, command.subject, data, wire)
        return await self._ask(command.subject, data, wire, timeout)

    async def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish without any ado: acknowledgements and requests for messages."""
        try:
            await self.client.publish(subject, data, reply)
        except BROKEN as error:
            raise self.refused(subject, error) from error

    async def acknowledge(self, reply: str) -> None:
        """Send ``+ACK`` to an address that the server gave.

        Does what nats-py's ``publish`` does, without its checks of what a user may give: they
        cost as much as all else that happens to a message here.
        """
        client = self.client
        try:
            if client.is_connected and client._flush_queue is not None:
                await client._send_command(b"PUB %b 4\r\n+ACK\r\n" % reply.encode())
                if client._flush_queue.empty():
                    await client._flush_pending()
            else:
                await client.publish(reply, b"+ACK")
        except BROKEN as error:
            raise self.refused(reply, error) from error

    async def ask(self, subject: str, data: bytes, timeout: float | None = None) -> Msg:
        """Publish and wait for the answer, up to ``publish_timeout`` by default."""
        return await self._ask(subject, data, None, timeout or self.publish_timeout)

    async def _ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        if self._replies is None:
            self.client  # noqa: B018 - says that there is no connection
        assert self._replies is not None
        try:
            return await self._replies.ask(subject, data, headers, timeout)
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
            return NotConnected(f"{self.describe()}: {reason_of(error)}", state="disconnected")
        if isinstance(error, RuntimeError):
            return NotConnected(f"{self.describe()}: the connection broke", state="disconnected")
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
            reply = await self._ask(f"{self.prefix}.{path}", data, None, self._api_timeout)
        except NoResponders:
            raise NoJetStream(
                f"{self.describe()} has no JetStream",
                fix="start nats-server with -js, or enable JetStream for the account",
            ) from None
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        if "error" in answer:
            error = answer["error"]
            known = {key: error.get(key) for key in ("code", "description", "err_code")}
            APIError.from_error(known)
        return answer

    def reply_envelope(self) -> type[Message[Any]]:
        return NatsMessage

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        assert isinstance(spec, NatsSubscription)
        return await self.streams.dead_letter(spec, name, declare=declare)

    def letters(self, address: str) -> NatsLetters:
        return NatsLetters(self, address)


_CALLBACKS = (
    "error_cb",
    "disconnected_cb",
    "reconnected_cb",
    "closed_cb",
    "discovered_server_cb",
)
