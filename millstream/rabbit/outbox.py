"""Publishing: every message is confirmed, and many are on their way at once."""

from __future__ import annotations

import asyncio
import re
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec
from pika.exceptions import ShortStringTooLong, UnsupportedAMQPFieldException
from pika.spec import Basic, BasicProperties

from ..base import disconnected
from ..errors import (
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishError,
    PublishTimeout,
    RequestTimeout,
)
from ..message import new_id
from .connection import ACCESS_REFUSED, NOT_FOUND, UNWRITABLE, ChannelLost, Wire
from .message import Delivery
from .options import milliseconds

if TYPE_CHECKING:
    from .driver import RabbitDriver

#: Unconfirmed messages, and their bytes, from which on publishers wait for room.
MOST, MOST_BYTES = 16_384, 64 * 1024 * 1024
#: The queue from which a connection reads the answers to its requests.
REPLIES = "amq.rabbitmq.reply-to"
#: Seconds within which messages are given up together.
_CLOSE = 0.01
#: Channels that may end with a message under way before it is taken for the reason.
_STRIKES = 2


class Unroutable(NoResponders, PublishError):
    """No queue gets a message that is ``mandatory``."""


def unwritable(key: str, error: Exception) -> PublishError:
    """What to tell people of a message that pika cannot write."""
    text = str(error)
    if isinstance(error, UnsupportedAMQPFieldException):
        text = f"a header cannot be of the type {type(error.args[-1]).__name__}; write it as text"
    elif isinstance(error, ShortStringTooLong):
        text = "a name, a routing key or an id has more than 255 bytes"
    return PublishError(f"{str(key)[:255]!r}: the message cannot be written: {text}")


class _Sent(msgspec.Struct, gc=False):
    """A message that waits for its confirmation.

    Fields:
        confirmed: ends with it, or with what went wrong.
        end: the event loop's time until which somebody waits; that of an answer is not here.
        id: of a message that may come back; None for others.
        size: its bytes.
        where: exchange and routing key.
        timeout: seconds that are waited for in all.
    """

    confirmed: asyncio.Future[None]
    end: float
    id: str | None
    size: int
    where: tuple[str, str]
    timeout: float


class Outbox:
    """The channel of all publications and requests."""

    def __init__(self, driver: RabbitDriver) -> None:
        self.driver = driver
        self._wire: Wire | None = None
        self._tag = 0
        #: By delivery tag.
        self._pending: dict[int, _Sent] = {}
        #: When it is looked for messages whose time is over; one timer serves all of them.
        self._look_at = inf
        self._bytes = 0
        #: Bytes of the largest message, once the server refused one; 0 while nobody knows.
        self._largest = 0
        #: Why the server takes nothing at the moment; empty while it does.
        self._blocked = ""
        #: Whether answers are read, now and after the next reconnect.
        self._asking = False
        #: Correlation id → the requests that wait for an answer with it.
        self._questions: dict[str, list[_Question]] = {}
        #: Set, and replaced, whenever something changed that publishers wait for.
        self._change: asyncio.Future[None] | None = None

    # Its channel

    async def attach(self) -> None:
        """Open the channel on the present connection."""
        line = self.driver.publishing
        assert line.connection is not None
        self._blocked = ""
        line.connection.add_on_connection_blocked_callback(
            lambda _, frame: self._block(frame.method.reason or "short of resources")
        )
        line.connection.add_on_connection_unblocked_callback(lambda *_: self._block(""))
        await self._open()

    async def _open(self) -> None:
        wire = await self.driver.publishing.wire(self._lost)
        wire.channel.add_on_return_callback(self._returned)
        await wire.call("confirm_delivery", self._confirmed)
        if self._asking:
            await wire.call("basic_consume", REPLIES, self._answered, auto_ack=True)
        self._wire, self._tag = wire, 0
        self._changed()

    def _block(self, reason: str) -> None:
        if reason and not self._blocked:
            self.driver.notify("error", f"the server takes no messages: {reason}")
        self._blocked = reason
        self._changed()

    def _changed(self) -> None:
        change, self._change = self._change, None
        if change is not None and not change.done():
            change.set_result(None)

    def _lost(self, reason: ChannelLost) -> None:
        """Tell who waits, and open another channel if the connection is still there."""
        self._wire = None
        pending, self._pending, self._bytes = self._pending, {}, 0
        for sent in pending.values():
            future = sent.confirmed
            if not future.done():
                future.set_exception(reason)
                future.exception()  # whoever gave up does not have to look
        for questions in self._questions.values():
            for question in questions:
                if question.sent and not question.answer.done():
                    question.answer.set_exception(
                        NotConnected("the connection broke while an answer was awaited")
                    )
        if self.driver.publishing.up.is_set():
            self.driver.spawn(self._reopen())

    async def _reopen(self) -> None:
        while self.driver.publishing.up.is_set() and self._wire is None:
            try:
                await self._open()
            except (ChannelLost, TimeoutError):
                await self.driver.clock.sleep(0.1)

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        tag = method.delivery_tag
        pending = self._pending
        if method.multiple:
            tags = []
            for one in pending:
                if one > tag:
                    break
                tags.append(one)
        else:
            tags = [tag] if tag in pending else []
        refused = isinstance(method, Basic.Nack)
        full = len(pending) >= MOST or self._bytes >= MOST_BYTES
        for one in tags:
            sent = pending.pop(one)
            self._bytes -= sent.size
            future = sent.confirmed
            if not future.done():
                if refused:
                    future.set_exception(
                        PublishError("the server refused the message: a queue is full or failed")
                    )
                else:
                    future.set_result(None)
        if full:
            self._changed()

    def _returned(
        self, _: Any, method: Basic.Return, properties: BasicProperties, body: bytes
    ) -> None:
        # It comes before the confirmation of the same message.
        where = f"queue {method.routing_key!r}"
        if method.exchange:
            where = f"queue bound to {method.exchange!r} for {method.routing_key!r}"
        for sent in self._pending.values():
            future = sent.confirmed
            if sent.id == properties.message_id and not future.done():
                future.set_exception(Unroutable(f"nobody gets the message: there is no {where}"))
                return

    # Publishing

    async def publish(
        self,
        exchange: str,
        key: str,
        data: bytes,
        properties: BasicProperties,
        mandatory: bool,
        timeout: float,
    ) -> None:
        """Publish and wait for the confirmation.

        A message whose connection broke before it was confirmed is sent again, with the same
        id, until the time is over: it may then be there twice.

        Raises:
            NotConnected: the connection did not come back in time.
            PublishTimeout: no confirmation in time.
            MessageTooLarge: over the server's maximum.
            Unroutable: it is mandatory, and no queue gets it.
            PublishError: refused for another reason.
        """
        loop = asyncio.get_running_loop()
        end, strikes = 0.0, 0
        while True:
            wire = self._wire
            if (
                wire is None
                or self._blocked
                or len(self._pending) >= MOST
                or self._bytes >= MOST_BYTES
            ):
                end = end or loop.time() + timeout
                wire = await self._ready(end, timeout)
            if self._largest and len(data) > self._largest:
                raise self._too_large(len(data), exchange, key)
            end = end or loop.time() + timeout  # the time begins with the first attempt
            try:
                future = self._send(wire, exchange, key, data, properties, mandatory, end, timeout)
                if not mandatory and key.startswith(REPLIES):
                    return None  # it goes straight to whoever asked, and is stored nowhere
                return await future
            except ChannelLost as lost:
                strikes += lost.code != 0
                await self._refused(lost, len(data), exchange, key, strikes)

    def _send(
        self,
        wire: Wire,
        exchange: str,
        key: str,
        data: bytes,
        properties: BasicProperties,
        mandatory: bool,
        end: float,
        timeout: float,
    ) -> asyncio.Future[None]:
        try:
            wire.publish(exchange, key, data, properties, mandatory)
        except UNWRITABLE as error:
            raise unwritable(key, error) from error
        self._tag += 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        size = len(data)
        id = properties.message_id if mandatory else None
        self._pending[self._tag] = _Sent(future, end, id, size, (exchange, key), timeout)
        self._bytes += size
        if end < self._look_at:
            self._look_at = end
            loop.call_at(end, self._look)
        return future

    def _look(self) -> None:
        """Give up what was not confirmed in its time."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now < self._look_at - _CLOSE:
            return  # a later timer than the one that counts
        left = inf
        for sent in self._pending.values():
            if sent.confirmed.done():
                continue
            if sent.end > now + _CLOSE:
                left = min(left, sent.end)
                continue
            exchange, key = sent.where
            where = f"{exchange!r} for {key!r}" if exchange else repr(key)
            why = f": the server takes no messages ({self._blocked})" if self._blocked else ""
            sent.confirmed.set_exception(
                PublishTimeout(
                    f"no confirmation of a message to {where} in {sent.timeout:g} s{why}"
                )
            )
        self._look_at = left
        if left < inf:
            loop.call_at(left, self._look)

    async def _ready(self, end: float, timeout: float) -> Wire:
        """Wait until there is a channel, the server takes messages, and there is room."""
        loop = asyncio.get_running_loop()
        driver = self.driver
        while True:
            wire = self._wire
            room = len(self._pending) < MOST and self._bytes < MOST_BYTES
            if wire is not None and not self._blocked and room:
                return wire
            left = end - loop.time()
            if left <= 0:
                if wire is None:
                    raise disconnected(driver.describe(), driver.publishing.reason, timeout)
                if self._blocked:
                    raise PublishTimeout(
                        f"{driver.describe()} takes no messages: {self._blocked}; "
                        f"waited {timeout:g} s"
                    )
                raise PublishTimeout(
                    f"{len(self._pending)} messages wait for their confirmation by "
                    f"{driver.describe()}, and there was no room within {timeout:g} s"
                )
            if self._change is None:
                self._change = loop.create_future()
            await asyncio.wait([self._change], timeout=left)

    async def _refused(
        self, lost: ChannelLost, size: int, exchange: str, key: str, strikes: int
    ) -> None:
        """Raise if it was this message that cost the channel; otherwise it is sent again."""
        text = lost.text
        found = re.search(r"message size (\d+) .*max size (\d+)", text)
        if found:
            self._largest = int(found[2])
            if size > self._largest:
                raise self._too_large(size, exchange, key) from lost
        named = f"exchange '{exchange}' " in f"{text} "
        if lost.code == NOT_FOUND and named:
            if await self.driver.topology.again(exchange):
                return
            raise PublishError(
                f"there is no exchange {exchange!r}: declare it by a publisher or subscriber "
                "with exchange=RabbitExchange(...), or by broker.declare_exchange()"
            ) from lost
        if (lost.code == ACCESS_REFUSED and named) or "user_id" in text or strikes > _STRIKES:
            raise PublishError(f"{exchange or key!r}: {text}") from lost

    def _too_large(self, size: int, exchange: str, key: str) -> MessageTooLarge:
        return MessageTooLarge(
            f"{size:,} bytes to {exchange or key!r}: the server takes {self._largest:,} at most "
            "(max_message_size); send less, or a reference to where the body is"
        )

    # Requests

    async def request(
        self,
        exchange: str,
        key: str,
        data: bytes,
        properties: BasicProperties,
        timeout: float,
    ) -> Delivery:
        """Send a request and return the first answer (Direct Reply-to).

        A request that nobody took by then expires in its queue.

        Raises:
            RequestTimeout: no answer in time.
            Unroutable: there is no queue for it.
            NotConnected: the connection broke meanwhile.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        if properties.correlation_id is None:
            properties.correlation_id = new_id()
        properties.reply_to = REPLIES
        if properties.expiration is None:  # nobody works for a caller who has given up
            properties.expiration = milliseconds(timeout, 0.0)
        questions = self._questions.setdefault(properties.correlation_id, [])
        strikes = 0
        while True:
            wire = self._wire
            if wire is None or self._blocked:
                wire = await self._ready(end, timeout)
            if not self._asking:
                self._asking = True
                try:
                    await wire.call("basic_consume", REPLIES, self._answered, auto_ack=True)
                except (ChannelLost, TimeoutError):
                    continue
            question = _Question(loop.create_future())
            questions.append(question)
            left = max(end - loop.time(), 0.0)
            timer = loop.call_later(left, _expire_request, question.answer, exchange, key, timeout)
            try:
                sent = self._send(wire, exchange, key, data, properties, True, inf, timeout)
                sent.add_done_callback(question.confirmed)
                return await question.answer
            except ChannelLost as lost:
                strikes += lost.code != 0
                await self._refused(lost, len(data), exchange, key, strikes)
            finally:
                timer.cancel()
                question.answer.cancel()
                questions.remove(question)
                if not questions:
                    self._questions.pop(properties.correlation_id, None)

    def _answered(
        self, channel: Any, method: Any, properties: BasicProperties, body: bytes
    ) -> None:
        for question in self._questions.get(properties.correlation_id or "", ()):
            if not question.answer.done():
                question.answer.set_result(Delivery(channel, method, properties, body))
                return


class _Question:
    """A request that waits for its answer; ``sent`` once the server has it."""

    def __init__(self, answer: asyncio.Future[Delivery]) -> None:
        self.answer, self.sent = answer, False

    def confirmed(self, sent: asyncio.Future[None]) -> None:
        """The server has the request, or refused it."""
        error = sent.exception()
        if error is None:
            self.sent = True
        elif not self.answer.done():
            self.answer.set_exception(error)


def _expire_request(
    future: asyncio.Future[Delivery], exchange: str, key: str, timeout: float
) -> None:
    if not future.done():
        where = f"{key!r} of {exchange!r}" if exchange else repr(key)
        future.set_exception(RequestTimeout(f"no answer from {where} within {timeout:g} s"))
