"""The NATS driver: one connection, and everything that goes over it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import PubAck

from ..address import AddressSyntax
from ..base import BaseDriver, not_yet_connected, reconnect_delay
from ..clock import Clock
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    ConnectError,
    NoResponders,
    NotConnected,
    RequestTimeout,
    SetupError,
)
from ..message import Message
from ..security import BaseSecurity, without_secrets
from .connection import (
    addresses,
    client_options,
    connect,
    discard,
    reason_of,
)
from .flow import CoreFlow, Flow, log
from .letters import NatsLetters
from .message import NatsMessage
from .options import SYNTAX, NatsPublish, NatsSubscription
from .outbox import API_TIMEOUT, Outbox
from .pull import PullFlow
from .push import PushFlow
from .stores import Stores
from .streams import Streams, letter_addresses

#: Seconds for each of the last things that are done at a close.
LAST = 2.0
#: Seconds after which a round trip that nobody waits for any more is given up.
PATIENT = 600


class NatsDriver(BaseDriver):
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
        security: BaseSecurity | None = None,
        publish_timeout: float = 5.0,
        clock: Clock | None = None,
        js_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(log, publish_timeout=publish_timeout, clock=clock)
        self.urls = addresses(servers)
        self.streams = Streams(self)
        self.stores = Stores(self)
        self._callbacks = {key: options.pop(key, None) for key in _CALLBACKS}
        options.setdefault("flush_timeout", publish_timeout)
        self._options = client_options(security, options)
        self._js_options = js_options or {}
        prefix = self._js_options.get("prefix", "$JS.API")
        if domain := self._js_options.get("domain"):
            prefix = f"$JS.{domain}.API"
        timeout = self._js_options.get("timeout", API_TIMEOUT)
        pending = options.get("pending_size")
        self.outbox = Outbox(self, pending=pending, prefix=prefix, api_timeout=timeout)
        #: nats-py's client, whatever its state; None before ``connect`` and after ``close``.
        self.present: Client | None = None
        self._js: JetStreamContext | None = None
        self.up = asyncio.Event()
        self._closing = False
        #: An attempt runs: what its client says of itself ends in the attempt's own error.
        self._opening = False
        #: Why the connection broke last.
        self.reason = ""
        self._id = secrets.token_hex(4)
        #: Round trips that are on their way.
        self._flushing: set[asyncio.Task[Any]] = set()
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
        if self.present is None:
            raise not_yet_connected(self.describe())
        return self.present

    @property
    def js(self) -> JetStreamContext:
        """nats-py's JetStream context of the present connection."""
        if self._js is None:
            self._js = self.client.jetstream(**self._js_options)
        return self._js

    @property
    def connected(self) -> bool:
        """Whether the connection is up at this moment."""
        return self.present is not None and self.present.is_connected

    async def connect(self) -> None:
        if self.present is not None:
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
        await self.outbox.attach(client)
        self.present, self._js = client, None
        self.stores.opened.clear()
        self.up.set()

    async def close(self) -> None:
        self._closing = True
        client = self.present
        if client is not None:
            if client.is_connected:
                for spec, name in self._ephemeral.values():
                    await self.forget(spec.stream_name or "", name)
                await self.flush(LAST)
            await discard(client, LAST)
        self.present = self._js = None
        self.outbox.detach()
        self._ephemeral.clear()
        self.up.clear()
        self._tasks.cancel()

    async def ping(self, timeout: float) -> bool:
        return self.connected and await self.flush(timeout)

    async def flush(self, timeout: float) -> bool:
        """Whether the server confirms within ``timeout`` seconds to have got everything so far.

        The round trip itself is not cancelled as long as its connection is there: a late answer to
        one that was would end nats-py's reader without a word.
        """
        flushing = self.spawn(self.client.flush(PATIENT))
        self._flushing.add(flushing)
        flushing.add_done_callback(self._flushing.discard)
        await asyncio.wait({flushing}, timeout=timeout)
        return flushing.done() and not flushing.cancelled() and flushing.exception() is None

    async def _on_error(self, error: Exception) -> None:
        self.reason = reason_of(error)
        if self.connected and not isinstance(error, OSError):
            self._denied(self.reason)
            self.notify("error", self.reason)
        await self._call("error_cb", error)

    def _denied(self, reason: str) -> None:
        """A subscription that the server does not permit never gets anything: it is lost."""
        marker = "permissions violation for subscription to "
        if marker not in reason:
            return
        subject = reason.split(marker, 1)[1].split('"')[1]
        for flow in list(self.flows):
            if isinstance(flow, CoreFlow) and flow.spec.pattern.lower() == subject:
                flow.deny(SetupError(reason, fix="grant the user the right to subscribe to it"))

    async def _on_disconnected(self) -> None:
        if self._opening:
            return
        self.up.clear()
        for flushing in self._flushing:  # nobody answers on that connection any more
            flushing.cancel()
        # This runs inside of nats-py's task that reconnects.
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(self._reconnecting_ended)
        if not self._closing:
            self.notify("disconnected", self.reason or "the connection broke")
        await self._call("disconnected_cb")

    def _reconnecting_ended(self, task: asyncio.Task[Any]) -> None:
        """nats-py's task dies of what it does not expect, and would leave us in silence."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._closing and self.present is not None:
            self.reason = reason_of(error)
            log.warning("%s: reconnecting ended with %r; trying anew", self.describe(), error)
            self.spawn(self._replace(self.present))

    async def _replace(self, client: Client) -> None:
        self._opening = True  # what the old client says of its end is of no interest
        await discard(client)
        self._opening = False
        await self._revive()

    async def _on_reconnected(self) -> None:
        url = self.present.connected_url if self.present is not None else None
        self.up.set()
        for flow in list(self.flows):
            flow.reconnected()
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
            self.notify("closed", f"gave up reconnecting: {self.reason}")
        else:
            self.spawn(self._revive())

    async def _revive(self) -> None:
        """A new client in place of one that is closed for good, with the same subscriptions."""
        for attempt in itertools.count(1):
            wait = reconnect_delay(attempt, self._options["reconnect_time_wait"])
            await self.clock.sleep(wait)
            try:
                await self._open()
                for flow in list(self.flows):
                    await flow.attach()
            except (ConnectError, NatsError) as error:
                self.reason = reason_of(error)
                log.debug("%s", error)
                if self.present is not None and not self.present.is_closed:
                    await discard(self.present)
                continue
            await self._on_reconnected()
            return

    async def _call(self, name: str, *args: Any) -> None:
        callback = self._callbacks[name]
        if callback is not None:
            await callback(*args)

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
        kind: type[Flow] = (
            CoreFlow if spec.stream_name is None else PushFlow if spec.push else PullFlow
        )
        flow = kind(self, spec, sink, lost)
        await self.begin(flow)
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
            await self.outbox.api(f"CONSUMER.DELETE.{stream}.{consumer}")

    # Publishing

    async def publish(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None
    ) -> PubAck | None:
        return await self.outbox.publish(command, data, headers)

    async def request(
        self, command: NatsPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        return await self.outbox.request(command, data, headers, timeout)

    def reply_envelope(self) -> type[Message[Any]]:
        return NatsMessage

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        assert isinstance(spec, NatsSubscription)
        return letter_addresses(spec, name)[0]

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
