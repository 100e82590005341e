"""The Redis brokers and their router."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.retry import AbstractRetry

from ..broker import Broker, BrokerOptions, split_options
from ..endpoints import Endpoints, Route, RoutePublisher, Router, asks, declares, produces, sends
from ..errors import SetupError
from ..security import BaseSecurity, without_secrets
from .connection import (
    ClusterNetwork,
    Network,
    checked,
    cluster,
    security_options,
    sentinel,
    server,
)
from .driver import RedisDriver
from .formats import MessageFormat, check_format
from .options import RedisPublication, RedisPublish, RedisRequest, RedisSubscription

#: Where a server is by default.
LOCAL = "redis://localhost:6379"


class RedisConnect(BrokerOptions, total=False):
    """Options of a Redis broker: those of every broker, and redis-py's own.

    Keys:
        security: a user and password, or TLS; they may also stand in the address.
        message_format: how a body and its headers become one value where there is no place for
            headers; an envelope only where there are some, by default.
        reconnect_max: the longest wait between two attempts to connect in seconds; 2. The first
            attempts follow sooner, and they never end.
        socket_timeout: seconds after which an answer that does not come means that the server
            is gone; 5.
        socket_connect_timeout: seconds for one attempt to connect; 5.
        health_check_interval: seconds of silence after which the server is asked for a sign of
            life; 10. 0 for never: then a connection that is silent may be broken unnoticed.
        host, port, db, username, password, client_name, credential_provider, ssl and the
            ``ssl_...`` options, unix_socket_path, socket_keepalive, socket_keepalive_options,
            socket_read_size, protocol, encoding, encoding_errors: as redis-py takes them.
        connection_class, parser_class, encoder_class, max_connections, retry, retry_on_error,
            retry_on_timeout: the same, for redis-py's client in ``broker.client``.
    """

    security: BaseSecurity | None
    message_format: type[MessageFormat] | None
    reconnect_max: float
    socket_timeout: float
    socket_connect_timeout: float
    health_check_interval: float
    host: str
    port: int
    db: int
    username: str | None
    password: str | None
    client_name: str | None
    credential_provider: Any
    unix_socket_path: str | None
    ssl: bool
    ssl_keyfile: str | None
    ssl_certfile: str | None
    ssl_cert_reqs: Any
    ssl_ca_certs: str | None
    ssl_ca_path: str | None
    ssl_ca_data: str | None
    ssl_check_hostname: bool
    ssl_min_version: Any
    ssl_ciphers: str | None
    socket_keepalive: bool | None
    socket_keepalive_options: Any
    socket_read_size: int
    socket_type: int
    protocol: int
    encoding: str
    encoding_errors: str
    connection_class: Any
    parser_class: Any
    encoder_class: Any
    max_connections: int | None
    retry: Any
    retry_on_error: Any
    retry_on_timeout: bool


class RedisEndpoints(Endpoints):
    """What a Redis broker and its routers can declare."""

    subscriber = declares(RedisSubscription)
    publisher = produces(RedisPublication)


class RedisRouter(RedisEndpoints, Router):
    """Declarations to be included in a :class:`RedisBroker` or another router."""


class RedisRoute(Route):
    """A subscription with its handler, for ``RedisRouter(handlers=[...])``."""


class RedisPublisher(RoutePublisher):
    """The arguments of ``router.publisher``, to be declared with a :class:`RedisRoute`."""


#: Options that are ours and not redis-py's.
_OWN = (
    "publish_timeout",
    "message_format",
    "reconnect_max",
    "socket_timeout",
    "health_check_interval",
)


class _RedisBroker(RedisEndpoints, Broker):
    """What all three ways to reach Redis have in common."""

    publish = sends(RedisPublish)
    request = asks(RedisRequest)

    if TYPE_CHECKING:
        driver: RedisDriver

    def _begin(
        self,
        where: str,
        options: dict[str, Any],
        make: Callable[[dict[str, Any]], Any],
        network: type[Network] = Network,
    ) -> None:
        """Make the driver; ``make`` gives redis-py's client for its options."""
        given, common = split_options(options, RedisConnect, type(self).__name__)
        client_options = {k: v for k, v in given.items() if v is not None and k != "security"}
        if isinstance(common.get("retry"), AbstractRetry):  # redis-py's has the same name
            client_options["retry"] = common.pop("retry")
        client_options |= security_options(given.get("security"))
        own = {key: client_options.pop(key) for key in _OWN if key in client_options}
        for key in ("reconnect_max", "socket_timeout", "socket_connect_timeout"):
            if (client_options | own).get(key, 1) <= 0:
                raise SetupError(f"{key}={given[key]}", fix="give seconds, more than 0")
        if own.get("health_check_interval", 0) < 0:
            raise SetupError("a negative health_check_interval", fix="give seconds; 0 for never")
        if (format := own.get("message_format")) is not None:
            check_format(format)
        client_options.setdefault("protocol", 2)
        client_options.setdefault("socket_connect_timeout", 5.0)
        client_options["socket_timeout"] = own.setdefault("socket_timeout", 5.0)
        own["health_check_interval"] = own.get("health_check_interval", 10.0) or math.inf
        make(dict(client_options))  # a wrong option is told now

        def reach(wire: dict[str, Any], changed: Callable[[bool, str], None]) -> Network:
            return network(make(dict(client_options)), where, wire, changed)

        driver = RedisDriver(reach, where, **own)
        driver.counts_listeners = network is Network
        super().__init__(driver, **common)

    @property
    def client(self) -> Redis:
        """redis-py's client.

        Raises:
            NotConnected: before ``connect`` or after ``stop``.
        """
        return self.driver.client  # type: ignore[no-any-return]


class RedisBroker(_RedisBroker):
    """A connection to Redis, or to what speaks its protocol, with subscribers and publishers.

    Args:
        url: such as ``redis://localhost:6379/0``, ``rediss://user:password@redis.example.com``
            (TLS) or ``unix:///run/redis.sock``.
        options: see :class:`RedisConnect` and :class:`millstream.broker.BrokerOptions`.
    """

    def __init__(self, url: str = LOCAL, **options: Unpack[RedisConnect]) -> None:
        given = cast(dict[str, Any], dict(options))
        path = given.pop("unix_socket_path", None)
        url = f"unix://{path}" if path else _moved(url, given)
        self._begin(
            without_secrets(url), given, lambda options: server(_tls(url, options), options)
        )


class RedisClusterBroker(_RedisBroker):
    """The same for a Redis Cluster.

    Args:
        url: the address of one of its nodes.
        startup_nodes: further nodes to ask for the others, as (host, port).
        options: as of :class:`RedisBroker`.
    """

    def __init__(
        self,
        url: str = LOCAL,
        *,
        startup_nodes: Sequence[tuple[str, int]] | None = None,
        **options: Unpack[RedisConnect],
    ) -> None:
        given = cast(dict[str, Any], dict(options))
        if given.pop("db", None):
            raise SetupError("a cluster has one database", fix="leave out db=")
        if given.get("unix_socket_path"):
            raise SetupError(
                "a cluster is reached by no socket", fix="name a node: url='redis://...'"
            )
        nodes = list(startup_nodes or ())
        if nodes and url == LOCAL:
            url = _moved(url, {"host": nodes[0][0], "port": nodes[0][1]})
        url = _moved(url, given)
        self._begin(
            f"{without_secrets(url)} (cluster)",
            given,
            lambda options: cluster(_tls(url, options), nodes, options),
            ClusterNetwork,
        )


class RedisSentinelBroker(_RedisBroker):
    """The same for the server that Sentinel calls the master.

    Args:
        sentinels: their addresses, as (host, port).
        sentinel_master_name: the name that they watch the master under.
        sentinel_kwargs: redis-py's options of the connections to them, a password for instance.
        options: as of :class:`RedisBroker`, of the connections to the master.
    """

    def __init__(
        self,
        sentinels: Sequence[tuple[str, int]],
        *,
        sentinel_master_name: str = "mymaster",
        sentinel_kwargs: dict[str, Any] | None = None,
        **options: Unpack[RedisConnect],
    ) -> None:
        given = cast(dict[str, Any], dict(options))
        for name in ("host", "port", "unix_socket_path"):
            if given.get(name) is not None:
                raise SetupError(f"{name}= of a server that Sentinel names", fix="leave it out")
        try:
            where = ", ".join(f"{host}:{port:d}" for host, port in sentinels)
        except (TypeError, ValueError):
            where = ""
        if not where:
            raise SetupError(
                f"sentinels={sentinels!r}", fix="give (host, port) of each: [('localhost', 26379)]"
            )
        self._begin(
            f"{sentinel_master_name} of sentinel {where}",
            given,
            lambda options: sentinel(
                sentinels, sentinel_master_name, sentinel_kwargs or {}, options
            ),
        )


def _moved(url: str, given: dict[str, Any]) -> str:
    """An address with the host and port that were given beside it."""
    if not isinstance(url, str):
        raise SetupError(f"url={url!r}", fix=f"write {LOCAL}")
    host, port = given.pop("host", None), given.pop("port", None)
    if host is None and port is None:
        return url
    with checked(url):
        parts = urlsplit(url)
        login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        place = f"{login}{host or parts.hostname or 'localhost'}:{port or parts.port or 6379}"
        return urlunsplit(parts._replace(netloc=place))


def _tls(url: str, options: dict[str, Any]) -> str:
    """An address that says itself whether TLS is spoken there."""
    secured = options.pop("ssl", False) and url.startswith("redis:")
    return "rediss:" + url.removeprefix("redis:") if secured else url


__all__ = [
    "RedisBroker",
    "RedisClusterBroker",
    "RedisConnect",
    "RedisEndpoints",
    "RedisPublisher",
    "RedisRoute",
    "RedisRouter",
    "RedisSentinelBroker",
]
