"""Exchanges, queues and bindings: declared at start, and again whenever they may be gone."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..base import disconnected
from ..driver import Spec
from ..errors import MillstreamError, SetupError
from .connection import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    RESOURCE_LOCKED,
    ChannelLost,
    Wire,
)
from .message import Delivery
from .options import (
    QueueType,
    RabbitExchange,
    RabbitPublication,
    RabbitQueue,
    RabbitSubscription,
    exchange_name,
)

if TYPE_CHECKING:
    from .driver import RabbitDriver

#: Seconds for which an unused delay queue stays, beyond what its messages need. The server
#: deletes an unused queue with all that is in it, so that the rest is for its own delays.
SPARE = 3600.0
#: Milliseconds of the longest delay: the server counts no queue's life in more than 32 bits.
LONGEST = 2**31
#: Seconds for which it is remembered that a message's last attempt began.
NOTE = 86_400
#: Notes that a process remembers as its own.
NOTES = 10_000
#: What the server says of a queue whose node is away, or begins: it is there all the same.
_AWAY = "is down or inaccessible"
#: What it says of an exchange whose plugin it does not have; the connection ends with it.
_NO_TYPE = "unknown exchange type"
#: What no letter reaches: newer servers drop a message of a quorum queue that came back 20 times.
UNLIMITED = 2**31 - 1


class Topology:
    """Declares on a channel of its own, since each refusal ends the channel."""

    def __init__(self, driver: RabbitDriver) -> None:
        self.driver = driver
        self._wire: Wire | None = None
        self._lock = asyncio.Lock()
        #: Exchanges that this process declared, by name.
        self._exchanges: dict[str, RabbitExchange] = {}
        #: Publications' queues, which no consumer declares again.
        self._queues: dict[str, RabbitQueue] = {}
        #: Queues of dead letters.
        self._letters: set[str] = set()
        #: Delay queue → the clock's time until which it surely lives.
        self._alive: dict[str, float] = {}
        #: Notes that this process made, or may have made: the answer can be lost.
        self._noted: dict[str, None] = {}
        self._best = True

    def forget(self) -> None:
        """The connection ended: what was declared may be gone."""
        self._wire = None
        self._alive.clear()

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call something that the server answers.

        Raises:
            ChannelLost: the server refused (``code``), or the connection broke.
        """
        await self.driver.consuming_line()
        async with self._lock:
            for attempt in (1, 2):
                wire = self._wire
                try:
                    if wire is None or not wire.open_:
                        wire = self._wire = await self.driver.consuming.wire()
                    return await wire.call(method, *args, **kwargs)
                except ChannelLost as lost:
                    if lost.code or attempt == 2 or self.driver.consuming.connection is None:
                        raise
                except TimeoutError:
                    self._wire = None
                    raise ChannelLost(TimeoutError()) from None
        raise AssertionError

    # What users declare

    async def declare(self, specs: Sequence[Spec]) -> None:
        """Declare what subscriptions and publications need.

        Raises:
            SetupError: something of that name is there with other settings, or not permitted.
            NotConnected: the connection broke meanwhile.
        """
        for spec in specs:
            if isinstance(spec, RabbitSubscription):
                await self.source(spec)
            elif isinstance(spec, RabbitPublication):
                exchange = self.driver.exchange_of(spec.exchange)
                await self.exchange(exchange)
                queue = spec.target
                if queue is not None and not exchange_name(exchange):
                    await self.queue(queue)
                    self._queues[queue.name] = queue

    async def restore(self) -> None:
        """Declare again what no subscription looks after; the server may have come back empty."""
        for exchange in list(self._exchanges.values()):
            if exchange.robust:
                await self.exchange(exchange)
        for queue in list(self._queues.values()):
            if queue.robust:
                await self.queue(queue)

    async def again(self, exchange: str) -> bool:
        """Declare an exchange again that is gone; False if nobody here declared it."""
        default = self.driver.default_exchange
        known = self._exchanges.get(exchange)
        if known is None and isinstance(default, RabbitExchange) and default.name == exchange:
            known = default
        if known is None or not known.robust:
            return False
        await self.exchange(known)
        return True

    async def source(self, spec: RabbitSubscription) -> None:
        """Declare a subscription's exchange and queue, and bind them."""
        queue, exchange = spec.source, self.driver.exchange_of(spec.exchange)
        await self.exchange(exchange)
        await self.queue(queue)
        name = exchange_name(exchange)
        if name and queue.declare:
            await self._refusable(
                f"binding {queue.name!r} to {name!r}",
                *("queue_bind", queue.name, name),
                routing_key=spec.binding,
                arguments=queue.bind_arguments,
            )

    async def exchange(self, exchange: str | RabbitExchange | None) -> None:
        """Declare an exchange and what it is bound to; a mere name is taken as it is there."""
        name = exchange_name(exchange)
        if not name:
            return
        if isinstance(exchange, str):
            if await self.exists("exchange", name):
                return
            exchange = RabbitExchange(name)
        assert isinstance(exchange, RabbitExchange)
        what = f"exchange {name!r}"
        if not exchange.declare or name.startswith("amq."):
            if not await self.exists("exchange", name):
                raise SetupError(f"there is no {what}", fix="create it, or leave out declare=False")
        else:
            await self._refusable(
                what,
                *("exchange_declare", name, exchange.type.value),
                durable=exchange.durable,
                auto_delete=exchange.auto_delete,
                arguments=exchange.arguments,
            )
        self._exchanges[name] = exchange
        if exchange.bind_to is not None:
            await self.exchange(exchange.bind_to)
            await self._refusable(
                f"binding {name!r} to {exchange.bind_to.name!r}",
                *("exchange_bind", name, exchange.bind_to.wire_name),
                routing_key=exchange.routing_key,
                arguments=exchange.bind_arguments,
            )

    async def queue(self, queue: RabbitQueue) -> None:
        """Declare a queue; one without settings of its own is taken as it is there."""
        if not queue.declare or queue.as_it_is:
            if await self.exists("queue", queue.name):
                return
            if not queue.declare:
                raise SetupError(
                    f"there is no queue {queue.name!r}",
                    fix="create it, or leave out declare=False",
                )
        await self._refusable(
            f"queue {queue.name!r}",
            *("queue_declare", queue.name),
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=queue.settings(),
        )

    async def exists(self, kind: str, name: str) -> bool:
        """Whether there is a queue or an exchange of a name."""
        try:
            await self.call(f"{kind}_declare", name, passive=True)
        except ChannelLost as lost:
            if lost.code == NOT_FOUND and _AWAY not in lost.text:
                return False
            raise self.explained(f"{kind} {name!r}", lost) from lost
        return True

    async def depth(self, queue: str) -> tuple[int, int]:
        """Messages that wait in a queue, and its consumers."""
        answer = await self.call("queue_declare", queue, passive=True)
        return answer.message_count, answer.consumer_count

    async def _refusable(self, what: str, /, *args: Any, **kwargs: Any) -> None:
        try:
            await self.call(*args, **kwargs)
        except ChannelLost as lost:
            raise self.explained(what, lost) from lost

    def explained(self, what: str, lost: ChannelLost) -> MillstreamError:
        """What to tell people when the server refused something, or its connection broke."""
        if _NO_TYPE in lost.text:
            return SetupError(
                f"the server refuses the {what}: {lost.text}",
                fix="enable the plugin that brings this type (rabbitmq-plugins enable ...)",
            )
        if lost.code == PRECONDITION_FAILED and "inequivalent" in lost.text:
            return SetupError(
                f"the server refuses the {what}: {lost.text}",
                fix="declare it with the settings that it has there, or delete it; a queue that "
                "is named only (without RabbitQueue settings) and declare=False take it as it is",
            )
        if lost.code == ACCESS_REFUSED:
            return SetupError(
                f"the server refuses the {what}: {lost.text}",
                fix="grant the user the right to configure it, or use declare=False",
            )
        if lost.code == RESOURCE_LOCKED:
            return SetupError(
                f"the {what} is another connection's: {lost.text}", fix="leave out exclusive=True"
            )
        if lost.code and _AWAY not in lost.text:
            return SetupError(f"the server refuses the {what}: {lost.text}")
        return disconnected(self.driver.describe(), lost.text)

    # What this driver declares for itself

    async def dead_letters(self, name: str) -> None:
        """Have a queue for dead letters, which keeps them however often they are looked at."""
        self._letters.add(name)
        if await self.exists("queue", name):
            return
        arguments = {"x-queue-type": QueueType.QUORUM.value, "x-delivery-limit": UNLIMITED}
        await self._refusable(
            f"queue {name!r}", "queue_declare", name, durable=True, arguments=arguments
        )

    async def revived(self, queue: str) -> bool:
        """Declare a queue of this driver's own again that somebody deleted; False if it is none."""
        if queue not in self._letters:
            return self._alive.pop(queue, None) is not None
        await self.dead_letters(queue)
        return True

    async def delay(self, source: str, seconds: float) -> str:
        """The queue whose messages come to ``source`` again after up to ``seconds``.

        There is one for each power of two, which holds delays of more than half of it; messages
        carry their exact time. It vanishes when it was not used for a while.
        """
        step = 1
        while step < seconds * 1000 and step < LONGEST:
            step *= 2
        name = f"{source}.retry.{_length(step)}"
        now = self.driver.clock.now()
        longest = step / 1000
        if self._alive.get(name, 0.0) > now + longest + SPARE / 2:
            return name
        arguments: dict[str, Any] = {
            "x-message-ttl": step,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": source,
            "x-expires": min(int((2 * longest + SPARE) * 1000), 2 * LONGEST - 1),
        }
        # A quorum queue hands its messages over with a confirmation (server 3.10 and newer).
        safe = {
            "x-queue-type": QueueType.QUORUM.value,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        for best in (True, False) if self._best else (False,):
            try:
                settings = arguments | (safe if best else {"x-queue-type": "classic"})
                await self.call("queue_declare", name, durable=True, arguments=settings)
                break
            except ChannelLost as lost:
                if not best or lost.code in (0, ACCESS_REFUSED):
                    raise self.explained(f"queue {name!r}", lost) from lost
                self._best = lost.code == PRECONDITION_FAILED and "inequivalent" in lost.text
        self._alive[name] = now + 2 * longest + SPARE
        return name

    async def begun(self, raw: Delivery) -> bool:
        """Note that the last attempt at a message begins; whether another process noted it before.

        A queue keeps no notes on messages, and a message cannot be changed in its place. The note
        is an empty queue that vanishes after a day, named after the message. One of our own says
        that a connection broke: we would not be here if the message had ended the process.
        """
        properties = raw.properties
        token = hashlib.sha256(raw.queue.encode())
        token.update(msgspec.msgpack.encode([properties.message_id, properties.correlation_id]))
        if properties.message_id is None:
            token.update(raw.body)
        name = f"ms-begun.{token.hexdigest()[:32]}"
        if name in self._noted:
            return False
        try:
            await self.call("queue_declare", name, passive=True)
            return True
        except ChannelLost as lost:
            if lost.code != NOT_FOUND:
                raise self.explained(f"queue {name!r}", lost) from lost
        while len(self._noted) >= NOTES:
            del self._noted[next(iter(self._noted))]
        self._noted[name] = None
        arguments = {"x-queue-type": "classic", "x-expires": NOTE * 1000}
        await self._refusable(
            f"queue {name!r}", "queue_declare", name, durable=True, arguments=arguments
        )
        return False


def _length(milliseconds: int) -> str:
    return f"{milliseconds}ms" if milliseconds < 1024 else f"{milliseconds // 1024}s"
