"""The RabbitMQ driver: two connections, and everything that goes over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pika.spec import BasicProperties

from ..address import AddressSyntax
from ..base import BaseDriver, not_yet_connected
from ..clock import Clock
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import NotConnected, PublishError
from ..message import Message, new_id
from .connection import UNWRITABLE, ChannelLost, Connection, addresses, log, reason_of
from .flow import Flow
from .letters import RabbitLetters
from .line import Line
from .message import CONTROL, PROPERTIES, RabbitMessage
from .options import (
    NOT_IMMEDIATE,
    SYNTAX,
    Channel,
    RabbitExchange,
    RabbitPublish,
    RabbitSubscription,
    exchange_name,
    milliseconds,
)
from .outbox import Outbox, Unroutable
from .security import options_of
from .topology import Topology


class RabbitDriver(BaseDriver):
    """The connections to a RabbitMQ server or cluster, by pika.

    Args:
        url: one address, several in a list, or several joined by commas.
        security: who we are, and TLS; a user and password may also stand in the address.
        publish_timeout: seconds that ``publish`` waits for a lost connection and for the
            confirmation, where the command does not say it.
        default_channel: for subscriptions that give no channel.
        default_exchange: for subscribers, publishers and publications that name no exchange.
        app_id: sent with each message.
        reconnect_interval: the longest wait between two attempts to reconnect, in seconds.
        on_close: called with pika's connection and the reason when one is lost.
        on_reconnected: called with pika's connection when it is there again.
        clock: the time that waits go by.
        options: host, port, virtualhost, heartbeat, timeout, client_properties.
    """

    name: ClassVar[str] = "rabbit"
    syntax: ClassVar[AddressSyntax] = SYNTAX
    command: ClassVar[type[PublishCommand]] = RabbitPublish
    control_headers: ClassVar[str | tuple[str, ...]] = CONTROL

    def __init__(
        self,
        url: str | Sequence[str] = "amqp://guest:guest@localhost:5672/",
        *,
        security: Any = None,
        publish_timeout: float = 5.0,
        default_channel: Channel | None = None,
        default_exchange: str | RabbitExchange | None = None,
        app_id: str | None = None,
        reconnect_interval: float = 5.0,
        on_close: Sequence[Callable[..., Any]] = (),
        on_reconnected: Sequence[Callable[..., Any]] = (),
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        super().__init__(log, publish_timeout=publish_timeout, clock=clock)
        self.addresses = addresses(url, {**options, **options_of(security)})
        self.default_channel, self.default_exchange = default_channel, default_exchange
        self._exchange = exchange_name(default_exchange)
        self._app_id = app_id
        self.reconnect_interval = reconnect_interval
        self._on_close, self._on_reconnected = on_close, on_reconnected
        self.outbox = Outbox(self)
        self.topology = Topology(self)
        self.publishing = Line(self, self.outbox.attach)
        self.consuming = Line(self, self._restored)
        self._connected = False
        #: Whether it was said that a connection broke, and not yet that all is well again.
        self._broken = False

    def describe(self) -> str:
        return ", ".join(map(str, self.addresses))

    # Connections

    async def connect(self) -> None:
        await self.publishing.open()
        self._connected = True

    async def consuming_line(self) -> None:
        """Have the connection that consumes and declares.

        Raises:
            ConnectError: not reached.
            NotConnected: before ``connect``.
        """
        if self.consuming.connection is None and not self.consuming.up.is_set():
            if not self._connected:
                raise not_yet_connected(self.describe())
            if not self.consuming.reason:
                await self.consuming.open()

    async def _restored(self) -> None:
        self.topology.forget()

    async def close(self) -> None:
        self._connected = False
        await self.end()
        await self.consuming.close()
        await self.publishing.close()

    def line_lost(self, connection: Connection, reason: BaseException) -> None:
        """A connection broke; it comes back by itself."""
        self._broken = True
        self.notify("disconnected", reason_of(reason))
        self._call(self._on_close, connection, reason)

    def line_back(self, line: Line) -> None:
        """A connection is there again."""
        self.spawn(self._restore(line))

    async def _restore(self, line: Line) -> None:
        if line is self.consuming:
            try:
                await self.topology.restore()
            except Exception as error:
                self.notify("error", str(error))
            for flow in list(self.flows):
                flow.line_back()
        other = self.publishing if line is self.consuming else self.consuming
        # What cut this connection may have cut the other one as well, unnoticed so far.
        unused = not other.reason and not other.up.is_set()
        whole = unused or await other.probe()
        # Both may have come back at the same time, or one broke again during the probe.
        if whole and line.up.is_set() and self._broken:
            self._broken = False
            self.notify("reconnected", self.describe())
            self._call(self._on_reconnected, line.connection)

    def _call(self, callbacks: Sequence[Callable[..., Any]], *args: Any) -> None:
        for callback in callbacks:
            try:
                result = callback(*args)
                if hasattr(result, "__await__"):
                    self.spawn(result)
            except Exception:
                log.exception("a callback of the connection failed")

    async def ping(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                wire = await self.publishing.wire()
                await wire.close()
                return self.consuming.up.is_set() or not self.flows
        except (ChannelLost, TimeoutError):
            return False

    # Declarations and subscriptions

    def exchange_of(self, exchange: str | RabbitExchange | None) -> str | RabbitExchange | None:
        """The exchange that a declaration means."""
        return self.default_exchange if exchange is None else exchange

    async def declare(self, specs: Sequence[Spec]) -> None:
        try:
            await self.topology.declare(specs)
        except ChannelLost as lost:
            raise NotConnected(f"{self.describe()}: {lost}", state="disconnected") from lost

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        assert isinstance(spec, RabbitSubscription)
        await self.consuming_line()
        flow = Flow(self, spec, sink, lost)
        try:
            await self.begin(flow)
        except ChannelLost as error:
            raise self.topology.explained(f"consumer of {flow.queue!r}", error) from error
        except TimeoutError as error:
            raise NotConnected(f"{self.describe()}: {error}", state="disconnected") from error
        return flow

    # Publishing

    def route(self, command: RabbitPublish) -> tuple[str, str]:
        """The exchange and the routing key of a message."""
        exchange = command.exchange
        return (
            self._exchange if exchange is None else exchange_name(exchange),
            command.destination,
        )

    async def publish(
        self, command: RabbitPublish, data: bytes, headers: dict[str, str] | None
    ) -> None:
        if not self._connected:
            raise not_yet_connected(self.describe())
        exchange, key = self.route(command)
        mandatory = not exchange if command.mandatory is None else command.mandatory
        properties = properties_of(command, headers, self._app_id, self.clock.wall)
        timeout = self.publish_timeout if command.timeout is None else command.timeout
        try:
            await self.outbox.publish(exchange, key, data, properties, mandatory, timeout)
        except Unroutable:
            if exchange or not await self.topology.revived(key):
                raise
            await self.outbox.publish(exchange, key, data, properties, mandatory, timeout)

    async def request(
        self, command: RabbitPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        if not self._connected:
            raise not_yet_connected(self.describe())
        exchange, key = self.route(command)
        properties = properties_of(command, headers, self._app_id, self.clock.wall)
        if command.persist is None:
            properties.delivery_mode = 1
        return await self.outbox.request(exchange, key, data, properties, timeout)

    def reply_envelope(self) -> type[Message[Any]]:
        return RabbitMessage

    # Dead letters

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        assert isinstance(spec, RabbitSubscription)
        return name or f"{spec.source.name}.dlq"

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        queue = self.letters_at(spec, name)
        if declare:
            await self.topology.dead_letters(queue)
        return queue

    def letters(self, address: str) -> RabbitLetters:
        return RabbitLetters(self, address)


def properties_of(
    command: RabbitPublish,
    headers: dict[str, str] | None,
    app_id: str | None,
    wall: Callable[[], float],
) -> BasicProperties:
    """What goes with a message's body.

    Raises:
        PublishError: the command wants what RabbitMQ does not have, or is of a wrong type.
    """
    if command.immediate:
        raise PublishError(f"immediate=True: {NOT_IMMEDIATE}")
    found = BasicProperties(
        delivery_mode=1 if command.persist is False else 2,
        priority=command.priority,
        reply_to=command.reply_to or None,
        message_id=command.message_id,
        type=command.message_type,
        user_id=command.user_id,
        app_id=command.app_id or app_id,
        content_encoding=command.content_encoding,
    )
    if headers:
        # Those that the protocol has a place for.
        named = PROPERTIES.keys() & headers.keys()
        if named:
            headers = dict(headers)
            for name in named:
                setattr(found, PROPERTIES[name], headers.pop(name))
        found.headers = headers or None
    if found.message_id is None:
        found.message_id = new_id()
    expiration, stamp = command.expiration, command.timestamp
    try:
        if expiration is not None:
            found.expiration = milliseconds(expiration, wall())
        if stamp is not None:
            found.timestamp = int(stamp if isinstance(stamp, int | float) else stamp.timestamp())
    except UNWRITABLE as error:
        raise PublishError(f"{expiration=}, timestamp={stamp!r}: {error}") from error
    return found
