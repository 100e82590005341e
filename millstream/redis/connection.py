"""How to reach Redis: one server, a server that Sentinel names, or the nodes of a cluster."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import SentinelManagedConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from ..errors import ConnectError, SetupError
from ..security import BaseSecurity, password_of, tls_fault, without_secrets
from .wire import BROKEN, Wire, drop, read, reason_of

#: What a node says that does not have a slot, or not yet.
MOVED = (MovedError, AskError, ClusterDownError, TryAgainError, MasterDownError)
#: What a server says to the wrong number of a database.
_NO_DATABASE = ("invalid DB index", "DB index is out of range", "value is not an integer")
Changed = Callable[[bool, str], None]


def security_options(security: BaseSecurity | None) -> dict[str, Any]:
    """What redis-py is told of who we are.

    Raises:
        SetupError: Redis knows no such way.
    """
    if security is None:
        return {}
    options: dict[str, Any] = {}
    if login := password_of(security, "Redis"):
        options = {"username": login.username, "password": login.password}
    if security.use_ssl:
        options |= {"ssl": True, "ssl_context": security.ssl_context}
    return options


class ContextConnection(SSLConnection):
    """A TLS connection by a given ``ssl.SSLContext``, which redis-py does not take."""

    def __init__(self, *, ssl_context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._given = ssl_context

    def _connection_arguments(self) -> dict[str, Any]:
        return {**super()._connection_arguments(), "ssl": self._given}


class WatchedContextConnection(SentinelManagedConnection, ContextConnection):
    """The same, to where Sentinel says."""


class Network:
    """One server, reached by the pool of a redis-py client.

    Args:
        client: redis-py's client.
        where: the address for people.
        options: of each :class:`Wire`.
        changed: called when the connection breaks and when it is back.
    """

    def __init__(self, client: Any, where: str, options: dict[str, Any], changed: Changed) -> None:
        self.client, self.where, self._options, self._changed = client, where, options, changed
        self._wires: dict[str, Wire] = {}

    async def open(self) -> None:
        """Connect.

        Raises:
            ConnectError: not reached, or not let in.
        """
        try:
            await self._start()
        except RedisClusterException as error:  # it tells why by what it was raised from
            raise explain(self.where, error.__cause__ or error) from error
        except (*BROKEN, RedisError) as error:
            raise explain(self.where, error) from error

    async def _start(self) -> None:
        await self._wire("")

    async def _wire(self, node: str) -> Wire:
        wire = Wire(lambda: self._connect(node), changed=self._wire_changed, **self._options)
        await wire.open()
        self._wires[node] = wire
        return wire

    def _wire_changed(self, wire: Wire, up: bool, reason: str) -> None:
        self._changed(up, reason)

    def wire(self, key: str, node: str = "") -> Wire:
        """The connection for a key's commands, or to a node; a KeyError if there is none yet."""
        return self._wires[""]

    def node_of(self, error: ResponseError) -> str:
        """The node that a command is to be sent to, this once; empty for one that is found anew.

        Raises:
            ResponseError: it has to be sent nowhere else.
        """
        raise error

    async def dedicated(self, key: str) -> AbstractConnection:
        """A connection of one's own to where a key is."""
        return await self._connect("")

    async def _connect(self, node: str) -> AbstractConnection:
        pool: ConnectionPool = self.client.connection_pool
        return await _open(pool.connection_class, pool.connection_kwargs)

    async def refresh(self) -> None:
        """Learn anew where things are."""

    async def close(self) -> None:
        for wire in self._wires.values():
            await wire.close()
        self._wires.clear()
        await self.client.aclose()
        manager = getattr(getattr(self.client, "connection_pool", None), "sentinel_manager", None)
        for one in manager.sentinels if manager is not None else ():
            await one.aclose()


async def _open(kind: Any, options: dict[str, Any]) -> AbstractConnection:
    # Whatever redis-py's client of the application speaks: here replies are read as RESP2's.
    connection: AbstractConnection = kind(**{**options, "protocol": 2, "encoding": "utf-8"})
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        # redis-py says nothing of a login that is missing, or of a server that still loads.
        async with asyncio.timeout(connection.socket_timeout):
            await connection.send_command("PING", check_health=False)
            with suppress(NoPermissionError):
                await read(connection)
    except BaseException:
        await drop(connection)
        raise
    connection.socket_timeout = None  # from now on each read has its own
    return connection


class ClusterNetwork(Network):
    """The nodes of a cluster: a connection to each that something is asked of."""

    async def _start(self) -> None:
        await self.client.initialize()
        for node in self.client.get_primaries():
            await self._wire(node.name)

    def _node(self, key: str) -> Any:
        return self.client.get_node_from_key(key)

    def wire(self, key: str, node: str = "") -> Wire:
        return self._wires[node or self._node(key).name]

    def node_of(self, error: ResponseError) -> str:
        if isinstance(error, AskError) and not isinstance(error, MovedError):
            return f"{error.host}:{error.port}"
        return ""

    async def dedicated(self, key: str) -> AbstractConnection:
        return await self._connect(self._node(key).name)

    async def _connect(self, node: str) -> AbstractConnection:
        found = self.client.get_node(node_name=node)
        if found is None:
            raise ConnectionError(f"{node} is no node of the cluster any more")
        return await _open(found.connection_class, found.connection_kwargs)

    async def refresh(self) -> None:
        try:
            await self.client.nodes_manager.initialize()
        except (*BROKEN, RedisError, RedisClusterException):
            return
        names = {node.name for node in self.client.get_primaries()}
        for name in self._wires.keys() - names:
            await self._wires.pop(name).close()
        for name in names - self._wires.keys():
            try:
                await self._wire(name)
            except (*BROKEN, RedisError):
                continue

    def _wire_changed(self, wire: Wire, up: bool, reason: str) -> None:
        super()._wire_changed(wire, up, reason)
        if not up:
            self._refreshing = asyncio.ensure_future(self.refresh())


def server(url: str, options: dict[str, Any]) -> Any:
    """redis-py's client of one server; nothing is connected yet."""
    own = _own(options, ContextConnection)
    with checked(url):
        client = Redis.from_url(url, **options)
        _add(client.connection_pool, own)
    return client


def cluster(url: str, nodes: Sequence[tuple[str, int]], options: dict[str, Any]) -> Any:
    """redis-py's client of a cluster."""
    own = _own(options, ContextConnection)
    known = inspect.signature(RedisCluster).parameters
    own |= {key: options.pop(key) for key in options.keys() - known}
    with checked(url):
        if nodes:
            options["startup_nodes"] = [ClusterNode(host, port) for host, port in nodes]
        client = RedisCluster.from_url(url, **options)
        for node in client.startup_nodes:
            _add(node, own)
    client.connection_kwargs.update(own)  # of the nodes that it gets to know
    return client


def sentinel(
    sentinels: Sequence[tuple[str, int]],
    master: str,
    sentinel_options: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """redis-py's client of the server that Sentinel calls the master."""
    own = _own(options, WatchedContextConnection)
    kind = own.get("connection_class", SentinelManagedConnection)
    if not issubclass(kind, SentinelManagedConnection):
        raise SetupError(
            f"connection_class={kind.__name__} asks no sentinel",
            fix="derive it from redis.asyncio.sentinel.SentinelManagedConnection",
        )
    timeouts = {"socket_timeout": 2.0, "protocol": 2}
    with checked(f"sentinel {master}"):
        watched = Sentinel(  # type: ignore[no-untyped-call]
            list(sentinels), sentinel_kwargs={**timeouts, **sentinel_options}
        )
        client = watched.master_for(master, **options)
        _add(client.connection_pool, own)
    return client


def _own(options: dict[str, Any], secured: type) -> dict[str, Any]:
    """Take what only connections know out of the options of a redis-py client."""
    context, kind = options.pop("ssl_context", None), options.pop("connection_class", None)
    own = {} if context is None else {"ssl_context": context, "connection_class": secured}
    return own if kind is None else {**own, "connection_class": kind}


def _add(place: Any, own: dict[str, Any]) -> None:
    """Have a pool or node make its connections with further options, and try one."""
    place.connection_kwargs.update(own)
    place.connection_class = place.connection_kwargs.pop("connection_class", place.connection_class)
    place.connection_class(**place.connection_kwargs)


@contextmanager
def checked(url: str) -> Iterator[None]:
    """What redis-py says of options is a :class:`SetupError`."""
    try:
        yield
    except (ValueError, TypeError, RedisError, RedisClusterException) as error:
        raise SetupError(
            f"{without_secrets(url)!r}: {error}",
            fix="write redis://localhost:6379/0 (or rediss://, unix:///path), and the options as "
            "redis-py's connections take them",
        ) from error


def explain(where: str, error: BaseException) -> ConnectError:
    """Why there is no connection, and whether another attempt can help."""
    text = str(error)
    if isinstance(error, AuthenticationError | NoPermissionError) or "WRONGPASS" in text:
        reason = "the server refuses the credentials, or wants some"
        return ConnectError(f"{where}: {reason}", permanent=True)
    if fault := tls_fault(error):
        return ConnectError(f"{where}: {fault}", permanent=True)
    if any(words in text for words in _NO_DATABASE):
        return ConnectError(f"{where}: {reason_of(error)}", permanent=True)
    return ConnectError(f"{where}: {reason_of(error)}")
