"""The Redis driver: the connections, and everything that goes over them."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from ..address import AddressSyntax
from ..base import BaseDriver, Questions, disconnected, not_yet_connected, reconnect_delay
from ..clock import Clock
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    ConnectError,
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishError,
    PublishTimeout,
    SetupError,
)
from ..message import Message
from .connection import MOVED, Network, explain
from .flow import ChannelFlow, Flow, log
from .formats import MessageFormat, PlainMessageFormat, check_format
from .groups import Groups
from .letters import RedisLetters
from .lists import ListFlow
from .message import DATA, STREAM, Entry, RedisChannelMessage
from .options import SYNTAX, RedisPublish, RedisSubscription, check_trimming, plain_name, split
from .streams import GroupFlow, StreamFlow
from .wire import Lost, Script, reason_of

#: Bytes of the largest value (redis.io, proto-max-bulk-len).
LARGEST = 512 * 1024 * 1024
#: No header can have this name.
_BODY = DATA.decode()
#: Seconds for which a read waits at the server for something new, at most.
BLOCK = 5.0
#: Seconds between two looks whether there is room for more.
ROOM = 0.005
#: Makes the network; called at each connect, so that a stopped broker can start again.
Reach = Callable[[dict[str, Any], Callable[[bool, str], None]], Network]


class RedisDriver(BaseDriver):
    """Connections to Redis, by redis-py.

    Args:
        reach: makes the network of servers.
        where: their address, without a password.
        publish_timeout: seconds that a publication waits for a lost connection and for its
            confirmation, where the command does not say it.
        message_format: how a body and its headers become one value.
        reconnect_max: the longest wait between two attempts to connect, in seconds.
        socket_timeout: seconds after which an answer that does not come means that the server
            is gone.
        health_check_interval: seconds of silence after which the server is asked for a sign of
            life.
        clock: the time that waits go by.
    """

    name: ClassVar[str] = "redis"
    syntax: ClassVar[AddressSyntax] = SYNTAX
    command: ClassVar[type[PublishCommand]] = RedisPublish
    control_headers: ClassVar[str | tuple[str, ...]] = ""
    #: Whether ``PUBLISH`` counts all that listen; a node of a cluster counts its own.
    counts_listeners = True

    def __init__(
        self,
        reach: Reach,
        where: str,
        *,
        publish_timeout: float = 5.0,
        message_format: type[MessageFormat] | None = None,
        reconnect_max: float = 2.0,
        socket_timeout: float = 5.0,
        health_check_interval: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(log, publish_timeout=publish_timeout, clock=clock)
        self._reach, self._where, self.message_format = reach, where, message_format
        self.cap, self.patience = reconnect_max, socket_timeout
        self.interval = health_check_interval
        #: Milliseconds for which a read waits at the server for something new.
        self.block = int(min(BLOCK, health_check_interval) * 1000)
        #: Seconds after which such a read must have ended.
        self.longest = self.block / 1000 + socket_timeout
        self.groups = Groups(self)
        self.largest = LARGEST
        self._network: Network | None = None
        self._up = asyncio.Event()
        self._reason = ""
        self._id = secrets.token_hex(5)
        self._members = itertools.count(1)
        self._inbox: ChannelFlow | None = None
        self._inbox_lock = asyncio.Lock()
        self.asked: Questions[str, Entry] = Questions()
        self._questions = itertools.count(1)

    def describe(self) -> str:
        return self._where

    # Connection

    @property
    def client(self) -> Any:
        """redis-py's client.

        Raises:
            NotConnected: before ``connect`` or after ``close``.
        """
        return self._connected().client

    def _connected(self) -> Network:
        if self._network is None:
            raise not_yet_connected(self._where)
        return self._network

    async def connect(self) -> None:
        if self._network is not None:
            return
        options = {"cap": self.cap, "patience": self.patience, "interval": self.interval}
        network = self._reach(options, self._changed)
        try:
            await network.open()
        except BaseException:
            with suppress(Exception):
                await network.close()
            raise
        self._network = network
        self._up.set()
        with suppress(RedisError, NotConnected):  # often forbidden; the default is as good
            found = await self.call("", "CONFIG", "GET", "proto-max-bulk-len")
            self.largest = int(found[1])
        self.spawn(self._look())

    async def close(self) -> None:
        await self.end()
        if self._inbox is not None:
            await self._inbox.close()
            self._inbox = None
        network, self._network = self._network, None
        self._up.clear()
        if network is not None:
            await network.close()

    async def ping(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self.call("", "PING")
        except (RedisError, NotConnected, TimeoutError):
            return False
        return True

    def _changed(self, up: bool, reason: str) -> None:
        self._reason = reason
        if up:
            self._up.set()
            self.notify("reconnected", self._where)
        elif self._network is not None:
            self._up.clear()
            self.notify("disconnected", reason or "the connection broke")

    def explain(self, error: Exception) -> ConnectError:
        """What an error while connecting is called here."""
        return explain(self._where, error)

    def passing(self, error: Exception) -> bool:
        """Whether the server says that it cannot at this moment; then it is looked for anew."""
        if isinstance(error, MOVED):
            self.spawn(self._connected().refresh())
            return True
        return str(error).startswith(("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN"))

    def refusal(self, what: str, error: Exception) -> SetupError:
        """What a refused subscription is called here."""
        return SetupError(f"{what}: the server refuses: {error}", fix=advice_for(error))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(min(self.interval, self.patience) / 2)
            for flow in (*self.flows, *((self._inbox,) if self._inbox is not None else ())):
                flow.look()

    def member(self, name: str | None) -> str:
        """A name that no other member of any group has."""
        return f"{name or 'ms'}-{self._id}-{next(self._members)}"

    async def dedicated(self, key: str) -> AbstractConnection:
        """A connection of one's own to where a key is."""
        network = self._network
        if network is None:
            raise Lost("closed", sent=False)
        return await network.dedicated(key)

    # Commands

    async def call(self, key: str, *args: Any, timeout: float | None = None) -> Any:
        """Carry out a command where ``key`` is, which may be done twice.

        Raises:
            NotConnected: the connection did not come back within the timeout.
            redis.exceptions.ResponseError: the server refuses.
        """
        end = time.monotonic() + (self.publish_timeout if timeout is None else timeout)
        while True:
            try:
                return await self._once(key, args, end)
            except Lost as error:
                if time.monotonic() >= end:
                    raise self._away(str(error)) from None

    async def _once(self, key: str, args: tuple[Any, ...], end: float) -> Any:
        """Carry out a command; :class:`Lost` if the connection broke meanwhile."""
        node = ""  # where it is asked for this once, while its slot moves
        for attempt in itertools.count():
            network = self._connected()
            try:
                wire = network.wire(key, node)
            except KeyError:
                await self._refreshed(network, attempt, end)
                continue
            if not wire.up.is_set() or wire.full:
                await self._wait(wire, end)
                continue
            if node:
                wire.tell("ASKING")
            future = wire.ask(*args)
            timer = asyncio.get_running_loop().call_later(
                max(end - time.monotonic(), 0.001), _late, future
            )
            try:
                return await future
            except MOVED as error:  # it was not carried out
                node = network.node_of(error)
                if not node:
                    await self._refreshed(network, attempt, end)
            finally:
                timer.cancel()

    async def _refreshed(self, network: Network, attempt: int, end: float) -> None:
        if time.monotonic() >= end:
            raise self._away("the cluster has no node for it")
        await network.refresh()
        await asyncio.sleep(max(reconnect_delay(attempt, self.cap), ROOM))

    async def _wait(self, wire: Any, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise self._away(self._reason or "it takes no data")
        if wire.up.is_set():
            await asyncio.sleep(min(ROOM, left))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await wire.up.wait()

    def _away(self, reason: str) -> NotConnected:
        return disconnected(self._where, reason)

    def send_now(self, key: str, *args: Any) -> asyncio.Future[Any]:
        """Send a command without waiting for anything; :class:`Lost` if it cannot be sent."""
        network = self._network
        try:
            if network is None:
                raise KeyError(key)
            return network.wire(key).ask(*args)
        except KeyError:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(Lost("not connected", sent=False))
            return future

    def tell(self, key: str, *args: Any) -> None:
        """Send a command whose reply does not matter, if that is possible."""
        self.send_now(key, *args).add_done_callback(_seen)

    async def script(self, script: Script, keys: Sequence[str], *args: Any) -> Any:
        """Run a script; it is not repeated if the connection breaks meanwhile.

        Raises:
            Lost: the connection broke.
            NotConnected: it did not come back within the timeout.
        """
        end = time.monotonic() + self.publish_timeout
        call = (script.digest, len(keys), *keys, *args)
        try:
            return await self._once(keys[0], ("EVALSHA", *call), end)
        except NoScriptError:
            return await self._once(keys[0], ("EVAL", script.source, *call[1:]), end)

    # Declarations and subscriptions

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            if isinstance(spec, RedisSubscription) and (stream := spec.stream_sub) is not None:
                await self.groups.ensure(stream)

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        assert isinstance(spec, RedisSubscription)
        flow: Flow
        if spec.list_sub is not None:
            flow = ListFlow(self, spec, sink, lost)
        elif spec.stream_sub is not None:
            flow = (GroupFlow if spec.acknowledged else StreamFlow)(self, spec, sink, lost)
        else:
            channel = spec.channel_sub
            assert channel is not None
            name = SYNTAX.compile(channel.channel).pattern
            flow = ChannelFlow(self, spec, sink, lost, pattern=channel.is_pattern, name=name)
        try:
            await self.begin(flow)
        except ResponseError as error:
            raise self.refusal(spec.destination, error) from error
        return flow

    # Publishing

    def frame(
        self, command: RedisPublish, data: bytes, headers: dict[str, str] | None, reply_to: str
    ) -> tuple[str, tuple[Any, ...]]:
        """The key and the Redis command of one message."""
        kind, name = split(command.destination)
        if not name:
            raise SetupError("a message to nowhere", fix="name a channel, a list or a stream")
        if reply_to:
            headers = {**(headers or {}), "reply_to": reply_to}
        format = command.message_format or self.message_format
        if format is not None:
            check_format(format)
        if len(data) > self.largest:
            raise MessageTooLarge(
                f"{len(data):,} bytes for {command.destination!r}: the server takes "
                f"{self.largest:,} at most (proto-max-bulk-len)"
            )
        if kind == "stream":
            fields: list[Any] = [DATA, data]
            if format is not None and not issubclass(format, PlainMessageFormat):
                fields = [DATA, format.encode(data, headers or {})]
            elif headers:
                if _BODY in headers:
                    raise SetupError(f"a header {_BODY!r}", fix="that is the field of the body")
                for header in headers.items():
                    fields += header
            return name, ("XADD", name, *_trim(*command.trimming), "*", *fields)
        value = (format or PlainMessageFormat).encode(data, headers or {})
        return name, (("RPUSH" if kind == "list" else "PUBLISH"), name, value)

    async def publish(
        self, command: RedisPublish, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        key, args = self.frame(command, data, headers, command.reply_to)
        if command.pipeline is not None:
            command.pipeline.execute_command(*args)
            return None
        reply = await self._publish(key, args, command.timeout)
        return reply.decode() if isinstance(reply, bytes) else reply

    async def _publish(self, key: str, args: tuple[Any, ...], timeout: float | None) -> Any:
        seconds = self.publish_timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        while True:
            try:
                return await self._once(key, args, end)
            except Lost as error:
                if error.sent:
                    raise PublishError(
                        f"{key!r}: the connection broke before it was confirmed ({error}); it may "
                        "have been stored"
                    ) from None
                if time.monotonic() >= end:
                    raise self._away(str(error)) from None
            except _Late:
                raise PublishTimeout(
                    f"no confirmation of a message to {key!r} within {seconds:g} s"
                ) from None
            except OutOfMemoryError as error:
                raise PublishError(f"{key!r} was not stored: {error}") from error
            except ResponseError as error:
                hint = f"; {advice}" if (advice := advice_for(error)) else ""
                raise PublishError(f"{key!r} was not published: {error}{hint}") from error

    async def request(
        self, command: RedisPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Entry:
        if command.pipeline is not None:
            raise SetupError("a request in a pipeline", fix="leave out pipeline=, or publish")
        end = asyncio.get_running_loop().time() + timeout
        inbox = await self._open_inbox(timeout)
        reply_to = f"{inbox}{next(self._questions):x}"
        with self.asked.ask(reply_to, command.destination, timeout, end) as answer:
            key, args = self.frame(command, data, headers, reply_to)
            heard = await self._publish(key, args, timeout)
            if not heard and args[0] == "PUBLISH" and self.counts_listeners:
                raise NoResponders(f"nobody listens to {command.destination!r}")
            return await answer

    async def _open_inbox(self, timeout: float) -> str:
        """Listen to the channels of this connection's replies; how their names begin."""
        prefix = f"ms:reply:{self._id}:"
        async with self._inbox_lock:
            if self._inbox is None:
                spec = RedisSubscription(f"{prefix}*")
                flow = ChannelFlow(
                    self, spec, self._answered, lambda error: None, pattern=True, name=f"{prefix}*"
                )
                try:
                    async with asyncio.timeout(timeout):
                        await flow.start()
                except TimeoutError:
                    await flow.close()
                    raise self._away("no answer in time") from None
                except (ConnectError, SetupError) as error:
                    raise self._away(reason_of(error)) from error
                self._inbox = flow
        return prefix

    async def _answered(self, entry: Entry) -> None:
        self.asked.answer(entry.source, entry)

    def reply_envelope(self) -> type[Message[Any]]:
        return RedisChannelMessage

    # Dead letters

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        return self.letters_at(spec, name)

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        return STREAM + (plain_name(name) if name else f"{literal(spec.destination)}.dlq")

    def letters(self, address: str) -> RedisLetters:
        return RedisLetters(self, plain_name(address))


def advice_for(error: Exception) -> str:
    """What to do about an error of the server; empty where that is plain."""
    if isinstance(error, NoPermissionError):
        return "grant the user the command and the key (docs/redis.md, Security)"
    if isinstance(error, AskError):  # and MovedError
        return "the server is part of a cluster: use RedisClusterBroker"
    if "WRONGTYPE" in str(error):
        return "another kind of value is stored under that name: use another one"
    return ""


def literal(address: str) -> str:
    """A name that a stream can have, from an address that may be a pattern."""
    return re.sub(r"[{}]", "", plain_name(address)).replace("*", "any")


def _trim(maxlen: int | None, max_age: float | None) -> tuple[Any, ...]:
    if maxlen is not None:
        check_trimming(maxlen, max_age)
        return ("MAXLEN", "~", maxlen)
    if max_age is not None:
        return ("MINID", "~", int((time.time() - max_age) * 1000))
    return ()


class _Late(NotConnected):
    """An answer did not come in time."""


def _late(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(_Late("no answer in time", state="disconnected"))


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
