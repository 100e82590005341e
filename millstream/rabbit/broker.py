"""The RabbitMQ broker and its routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, get_type_hints

import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from ..broker import Broker, BrokerOptions, split_options
from ..endpoints import Endpoints, Route, RoutePublisher, Router, asks, declares, produces, sends
from ..errors import NotConnected
from ..security import BaseSecurity
from .driver import RabbitDriver
from .options import (
    Channel,
    RabbitExchange,
    RabbitPublication,
    RabbitPublish,
    RabbitQueue,
    RabbitRequest,
    RabbitSubscription,
    typed,
)


class RabbitConnect(BrokerOptions, total=False):
    """Options of a RabbitMQ broker, besides those of every broker.

    Keys:
        security: who we are, and TLS.
        host, port, virtualhost: instead of what the address says.
        ssl_options: pika's ``SSLOptions``; ``security`` is clearer.
        heartbeat: seconds between two signs of life; 15. After two missing ones the connection
            is made anew.
        timeout: seconds for one attempt to connect; 10.
        client_properties: shown in the server's management.
        reconnect_interval: the longest wait between two attempts to reconnect in seconds; 5. The
            first attempts follow sooner, and they never end.
        fail_fast: accepted for callers of other frameworks; ``startup_timeout`` says how long a
            start waits.
        on_close: called with the connection and the reason when one is lost.
        on_reconnected: called with the connection when it is there again.
        default_channel: for subscriptions that give no channel.
        default_exchange: for subscribers, publishers and publications that name no exchange;
            otherwise a name is that of a queue.
        app_id: sent with each message.
    """

    security: BaseSecurity | None
    host: str | None
    port: int | None
    virtualhost: str | None
    ssl_options: pika.SSLOptions | None
    heartbeat: int
    timeout: float | None
    client_properties: Mapping[str, Any] | None
    reconnect_interval: float
    fail_fast: bool
    on_close: Sequence[Callable[..., Any]]
    on_reconnected: Sequence[Callable[..., Any]]
    default_channel: Channel | None
    default_exchange: str | RabbitExchange | None
    app_id: str | None


class RabbitEndpoints(Endpoints):
    """What a RabbitMQ broker and its routers can declare."""

    subscriber = declares(RabbitSubscription)
    publisher = produces(RabbitPublication)


class RabbitRouter(RabbitEndpoints, Router):
    """Declarations to be included in a :class:`RabbitBroker` or another router."""


class RabbitRoute(Route):
    """A subscription with its handler, for ``RabbitRouter(handlers=[...])``."""


class RabbitPublisher(RoutePublisher):
    """The arguments of ``router.publisher``, to be declared with a :class:`RabbitRoute`."""


class RabbitBroker(RabbitEndpoints, Broker):
    """A connection to RabbitMQ with its subscribers and publishers.

    Args:
        url: one address or several (a list, or joined by commas; the nodes of a cluster), such
            as ``amqp://user:password@localhost:5672/vhost`` or ``amqps://...``.
        options: see :class:`RabbitConnect` and :class:`millstream.broker.BrokerOptions`.
    """

    publish = sends(RabbitPublish)
    request = asks(RabbitRequest)

    if TYPE_CHECKING:
        driver: RabbitDriver

    def __init__(
        self,
        url: str | Sequence[str] = "amqp://guest:guest@localhost:5672/",
        **options: Unpack[RabbitConnect],
    ) -> None:
        owner = type(self).__name__
        kinds, given = get_type_hints(RabbitConnect), dict[str, Any](options)
        for name, value in options.items():
            if name in kinds and name not in BrokerOptions.__annotations__:
                given[name] = typed(owner, name, value, kinds[name])
        own, common = split_options(given, RabbitConnect, owner)
        own.pop("fail_fast", None)
        tls: pika.SSLOptions | None = own.pop("ssl_options", None)
        if tls is not None:
            own |= {"ssl_context": tls.context, "ssl_hostname": tls.server_hostname}
        super().__init__(RabbitDriver(url, **own), **common)

    @property
    def connection(self) -> AsyncioConnection:
        """pika's connection that publishes.

        Raises:
            NotConnected: before ``connect``, after ``stop``, or while it is lost.
        """
        connection = self.driver.publishing.connection
        if connection is None:
            raise NotConnected(f"not connected to {self.driver.describe()}")
        return connection

    async def declare_queue(self, queue: str | RabbitQueue) -> RabbitQueue:
        """Declare a queue; idempotent.

        Raises:
            SetupError: there is one with other settings, or it is not permitted.
        """
        found = queue if isinstance(queue, RabbitQueue) else RabbitQueue(queue)
        await self.driver.topology.queue(found)
        return found

    async def declare_exchange(self, exchange: str | RabbitExchange) -> RabbitExchange:
        """Declare an exchange and what it is bound to; idempotent.

        Raises:
            SetupError: there is one with other settings, or it is not permitted.
        """
        found = exchange if isinstance(exchange, RabbitExchange) else RabbitExchange(exchange)
        await self.driver.topology.exchange(exchange)
        return found
