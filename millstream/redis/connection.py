"""How to reach Redis: one server, a server that Sentinel names, or the nodes of a cluster."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.connection import AbstractConnection, ConnectionPool, SSLConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    TryAgainError,
)

from ..errors import ConnectError, SetupError
from ..security import BaseSecurity, password_of, tls_fault, without_secrets
from .wire import BROKEN, Wire, drop, read, reason_of

#: What a node says that does not have a slot, or not yet.
MOVED = (MovedError, AskError, ClusterDownError, TryAgainError, MasterDownError)
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
        options["connection_class"] = ContextConnection
        if security.ssl_context is not None:
            options["ssl_context"] = security.ssl_context
    return options


class ContextConnection(SSLConnection):
    """A TLS connection by a given ``ssl.SSLContext``, which redis-py does not take."""

    def __init__(self, *, ssl_context: ssl.SSLContext | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._given = ssl_context

    def _connection_arguments(self) -> dict[str, Any]:
        arguments = dict(super()._connection_arguments())
        if self._given is not None:
            arguments["ssl"] = self._given
        return arguments


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

    def wire(self, key: str) -> Wire:
        """The connection for a key's commands."""
        return self._wires[""]

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
    connection: AbstractConnection = kind(**options)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        # redis-py says nothing of a login that is missing, or of a server that still loads.
        await connection.send_command("PING", check_health=False)
        with suppress(NoPermissionError):
            await read(connection)
    except BaseException:
        await drop(connection)
        raise
    return connection


class ClusterNetwork(Network):
    """The nodes of a cluster: a connection to each that something is asked of."""

    async def _start(self) -> None:
        await self.client.initialize()
        for node in self.client.get_primaries():
            await self._wire(node.name)

    def _node(self, key: str) -> Any:
        return self.client.get_node_from_key(key)

    def wire(self, key: str) -> Wire:
        name = self._node(key).name
        wire = self._wires.get(name)
        if wire is None:
            raise KeyError(name)
        return wire

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
    return _checked(url, lambda: Redis.from_url(url, **options))


def cluster(url: str, nodes: Sequence[tuple[str, int]] | None, options: dict[str, Any]) -> Any:
    """redis-py's client of a cluster."""
    from redis.asyncio.cluster import ClusterNode

    options.pop("db", None)
    if nodes:
        options["startup_nodes"] = [ClusterNode(host, port) for host, port in nodes]
    return _checked(url, lambda: RedisCluster.from_url(url, **options))


def sentinel(
    sentinels: Sequence[tuple[str, int]],
    master: str,
    sentinel_options: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """redis-py's client of the server that Sentinel calls the master."""
    timeouts = {"socket_timeout": 2.0, "protocol": 2}
    watched = Sentinel(  # type: ignore[no-untyped-call]
        list(sentinels), sentinel_kwargs={**timeouts, **sentinel_options}
    )
    return watched.master_for(master, **options)


def _checked(url: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise SetupError(
            f"{without_secrets(url)!r}: {error}",
            fix="write redis://localhost:6379/0 (or rediss://, unix:///path)",
        ) from error


def explain(where: str, error: BaseException) -> ConnectError:
    """Why there is no connection, and whether another attempt can help."""
    text = str(error)
    if isinstance(error, AuthenticationError | NoPermissionError) or "WRONGPASS" in text:
        reason = "the server refuses the credentials, or wants some"
        return ConnectError(f"{where}: {reason}", permanent=True)
    if fault := tls_fault(error):
        return ConnectError(f"{where}: {fault}", permanent=True)
    if "invalid DB index" in text or "DB index is out of range" in text:
        return ConnectError(f"{where}: {reason_of(error)}", permanent=True)
    return ConnectError(f"{where}: {reason_of(error)}")
