"""The NATS broker and its routers."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import Placement, RePublish, StorageType
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from ..broker import Broker, BrokerOptions, split_options
from ..checks import known_options
from ..endpoints import (
    Endpoints,
    Route,
    RoutePublisher,
    Router,
    asks,
    declares,
    produces,
    sends,
)
from ..security import BaseSecurity
from .driver import NatsDriver
from .options import NatsPublication, NatsPublish, NatsRequest, NatsSubscription

_Callback = Callable[[], Awaitable[None]]


class NatsConnect(BrokerOptions, total=False):
    """Options of a NATS broker: those of every broker, and nats-py's own.

    Keys:
        security: who we are, and TLS.
        name: shown in the server's monitoring.
        error_cb, disconnected_cb, reconnected_cb, closed_cb, discovered_server_cb: coroutine
            functions called when that happens.
        allow_reconnect: whether a lost connection is made again; True.
        max_reconnect_attempts: for each server; -1, the default, never gives up.
        reconnect_time_wait: the longest wait between two attempts in seconds; 2. The first
            attempts follow sooner.
        reconnect_to_server_handler: chooses the next server and the wait before it.
        connect_timeout: seconds for one attempt; 2.
        ping_interval: seconds between two signs of life of an idle connection; 20.
        max_outstanding_pings: how many may stay unanswered; 2.
        dont_randomize: keep the servers' order.
        no_echo: do not get messages that this connection published.
        inbox_prefix: begins the subjects of replies; ``_INBOX``.
        pending_size: bytes that may wait while the connection is down; 2 MiB.
        js_options: ``domain`` or ``prefix``, and ``timeout`` (seconds) of the JetStream API.
        tls, tls_hostname, user, password, token, signature_cb, user_jwt_cb, user_credentials,
            nkeys_seed, nkeys_seed_str: as nats-py takes them; ``security`` is clearer.
    """

    security: BaseSecurity | None
    name: str | None
    error_cb: Callable[[Exception], Awaitable[None]] | None
    disconnected_cb: _Callback | None
    reconnected_cb: _Callback | None
    closed_cb: _Callback | None
    discovered_server_cb: _Callback | None
    allow_reconnect: bool
    max_reconnect_attempts: int
    reconnect_time_wait: float
    reconnect_to_server_handler: Callable[..., Any] | None
    connect_timeout: float
    ping_interval: float
    max_outstanding_pings: int
    dont_randomize: bool
    no_echo: bool
    pedantic: bool
    verbose: bool
    inbox_prefix: str | bytes
    pending_size: int
    flush_timeout: float | None
    flusher_queue_size: int
    drain_timeout: float
    ws_connection_headers: dict[str, list[str]] | None
    js_options: dict[str, Any] | None
    tls: ssl.SSLContext | None
    tls_hostname: str | None
    tls_handshake_first: bool
    user: str | Callable[[], str] | None
    password: str | Callable[[], str] | None
    token: str | Callable[[], str] | None
    signature_cb: Callable[[str], bytes] | None
    user_jwt_cb: Callable[[], bytes | bytearray] | None
    user_credentials: Any
    nkeys_seed: str | None
    nkeys_seed_str: str | None


class BucketSettings(TypedDict, total=False):
    """Settings of a new bucket or object store.

    Keys:
        description: for people.
        ttl: seconds after which a value vanishes.
        max_bytes: bytes of the whole bucket.
        storage: file or memory.
        replicas: servers that keep it; 1.
        placement: which servers of a cluster.
    """

    description: str | None
    ttl: float | None
    max_bytes: int | None
    storage: StorageType | None
    replicas: int
    placement: Placement | None


class KeyValueSettings(BucketSettings, total=False):
    """Settings of a new key-value bucket: those of all, and its own.

    Keys:
        max_value_size: bytes of the largest value.
        history: revisions kept of each key, 64 at most; 1.
        republish: publish each change to a subject as well.
        direct: read from any replica.
    """

    max_value_size: int | None
    history: int
    republish: RePublish | None
    direct: bool | None


class NatsEndpoints(Endpoints):
    """What a NATS broker and its routers can declare."""

    subscriber = declares(NatsSubscription)
    publisher = produces(NatsPublication)


class NatsRouter(NatsEndpoints, Router):
    """Declarations to be included in a :class:`NatsBroker` or another router."""


class NatsRoute(Route):
    """A subscription with its handler, for ``NatsRouter(handlers=[...])``."""


class NatsPublisher(RoutePublisher):
    """The arguments of ``router.publisher``, to be declared with a :class:`NatsRoute`."""


class NatsBroker(NatsEndpoints, Broker):
    """A connection to NATS with its subscribers and publishers.

    Args:
        servers: one address or several (a list, or joined by commas), such as
            ``nats://localhost:4222`` or ``tls://user:password@nats.example.com``.
        options: see :class:`NatsConnect` and :class:`millstream.broker.BrokerOptions`.
    """

    publish = sends(NatsPublish)
    request = asks(NatsRequest)

    if TYPE_CHECKING:
        driver: NatsDriver

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://localhost:4222",
        **options: Unpack[NatsConnect],
    ) -> None:
        own, common = split_options(options, NatsConnect, type(self).__name__)
        super().__init__(NatsDriver(servers, **own), **common)

    @property
    def connection(self) -> Client:
        """nats-py's client.

        Raises:
            NotConnected: before ``connect`` or after ``stop``.
        """
        return self.driver.client

    @property
    def js(self) -> JetStreamContext:
        """nats-py's JetStream context."""
        return self.driver.js

    def new_inbox(self) -> str:
        """A subject nobody else uses, for replies."""
        return self.driver.client.new_inbox()

    async def key_value(
        self, bucket: str, *, declare: bool = True, **settings: Unpack[KeyValueSettings]
    ) -> KeyValue:
        """Open a key-value bucket; one that does not exist is created.

        Args:
            bucket: its name.
            declare: False if the bucket must exist.
            settings: of a new bucket.

        Raises:
            SetupError: it does not exist with ``declare=False``, or the server refuses it.
        """
        known_options(settings, KeyValueSettings, "a key-value bucket")
        return await self.driver.stores.key_value(bucket, declare=declare, **settings)

    async def object_storage(
        self, bucket: str, *, declare: bool = True, **settings: Unpack[BucketSettings]
    ) -> ObjectStore:
        """Open an object store; one that does not exist is created.

        The arguments are those of :meth:`key_value`.

        Raises:
            SetupError: it does not exist with ``declare=False``, or the server refuses it.
        """
        known_options(settings, BucketSettings, "an object store")
        return await self.driver.stores.object_storage(bucket, declare=declare, **settings)
