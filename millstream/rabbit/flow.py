"""One subscription: from pika's callback to the sink, acknowledgements, and healing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pika.exceptions import AMQPError
from pika.spec import Basic, BasicProperties

from ..ack import Settlement
from ..base import Feed, reconnect_delay
from ..driver import Sink
from ..errors import MillstreamError, SetupError
from .connection import ChannelLost, Wire, log
from .message import (
    CONTROL,
    DELIVERIES,
    EXCHANGE,
    ROUTING_KEY,
    Delivery,
    deliveries_before,
    settlement,
    table,
)
from .options import milliseconds
from .outbox import Unroutable

if TYPE_CHECKING:
    from .driver import RabbitDriver
    from .options import RabbitSubscription

#: The most messages that the server sends ahead where the user set no number.
MOST = 256
#: Seconds of work that are sent ahead: a fast handler never waits, a slow one hoards nothing.
AHEAD = 0.1
#: Messages taken no more than ``concurrency`` at once at the beginning, and after one came that
#: was delivered before: if it takes the process down, nothing else is counted with it.
CAREFUL = 4
#: Seconds between two looks whether the consumer still is one.
LOOK = 20.0


class Flow(Feed):
    """A consumer on a channel of its own, and a queue."""

    def __init__(
        self,
        driver: RabbitDriver,
        spec: RabbitSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
    ) -> None:
        super().__init__(spec.destination, self._taken, log)
        self._deliver = sink
        self.driver, self.spec, self._report = driver, spec, lost
        self.queue = spec.source.name
        self.streaming = spec.streaming
        self._wire: Wire | None = None
        self._consumer = ""
        self._healing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        # Acknowledgements: all tags up to `floor` are told, and those in `told` above it; `done`
        # are to be told by the flush that `flushing` says is coming.
        self._latest = self._floor = 0
        #: The last tag of the consumers before the present one, whose messages do not count
        #: against what the server may send ahead.
        self._before = 0
        self._done: set[int] = set()
        self._told: set[int] = set()
        self._flushing = self._held = False
        # How much is sent ahead.
        channel = spec.channel or driver.default_channel
        size = spec.batch.size if spec.batch is not None else 1
        self._fixed = channel is not None and channel.prefetch_count is not None
        self._least = max(spec.lanes * size, 1)
        self._normal = spec.prefetch
        self.window = self._least
        if channel is not None and channel.prefetch_count is not None:
            self.window = channel.prefetch_count
        elif self.streaming:
            self._fixed, self.window = True, max(MOST, spec.prefetch)
        #: Messages that the sink had taken at the last look at the speed, and with which one comes
        #: the next.
        self._looked, self._look_at = 0, CAREFUL
        self._since = driver.clock.now()
        #: The offset of the last message of a stream.
        self._offset: int | None = None

    # The consumer

    async def start(self) -> None:
        """Declare and consume; raises what cannot heal."""
        await self._attach()
        self._keeper = self.driver.spawn(self._keep())

    async def _attach(self, again: bool = False) -> None:
        topology = self.driver.topology
        if again and self.spec.source.declare and not await topology.exists("queue", self.queue):
            log.warning("queue %r was gone and is made again", self.queue)
            if self.streaming:
                self._offset = -1  # its numbers begin anew
        await topology.source(self.spec)
        wire = await self.driver.consuming.wire(self._channel_lost)
        wire.channel.add_on_cancel_callback(self._cancelled)
        self._latest = self._floor = 0
        self._done.clear()
        self._told.clear()
        self._held = False
        self._wire = wire
        try:
            await wire.call("basic_qos", prefetch_count=self.window)
            await self._consume(wire)
        except BaseException:
            self._wire = None
            raise

    async def _consume(self, wire: Wire) -> None:
        arguments = dict(self.spec.consume_args or {})
        if self._offset is not None:
            arguments["x-stream-offset"] = self._offset + 1
        self._before = self._latest
        answer = await wire.call(
            "basic_consume", self.queue, self._arrived, arguments=arguments or None
        )
        self._consumer = answer.consumer_tag

    def _arrived(
        self, channel: Any, method: Basic.Deliver, properties: BasicProperties, body: bytes
    ) -> None:
        self._latest = method.delivery_tag
        self.put(Delivery(channel, method, properties, body, self.queue))

    async def _taken(self, raw: Delivery) -> None:
        if self.streaming:
            # It is ours from now on: consumers that begin meanwhile begin behind it.
            self._offset = int(table(raw)["x-stream-offset"])
        elif raw.method.redelivered and await self._again(raw):
            return
        await self._deliver(raw)
        if self.streaming:
            self._streamed(raw)
        if self.given >= self._look_at:
            await self._fit()

    def ended(self) -> bool:
        # What cannot be handed back is still given to the sink.
        return not (self.streaming and self.waiting)

    def _streamed(self, raw: Delivery) -> None:
        """A stream's message is never settled; an acknowledgement only asks for the next."""
        if self._wire is not None and raw.channel is self._wire.channel:
            self._done.add(raw.method.delivery_tag)
            self._flush_soon()

    async def _again(self, raw: Delivery) -> bool:
        """Look at a message that was delivered before; whether it was sent round once more.

        A quorum queue counts. Of another queue one only knows that it was not the first time: the
        message is published anew with its count, so that one that kills its workers comes to an
        end.
        """
        self._look_at = self.given + CAREFUL
        headers = table(raw)
        if "x-delivery-count" in headers:
            return False
        count = deliveries_before(True, headers, raw.queue)
        try:
            await self._publish_anew(raw, self.queue, count, None)
        except MillstreamError as error:
            log.debug("%r: cannot count a message: %s", self.queue, error)
            return False
        if self._wire is not None and raw.channel is self._wire.channel:
            self._done.add(raw.method.delivery_tag)
            self._flush_soon()
        return True

    async def _publish_anew(
        self, raw: Delivery, queue: str, count: int, expiration: str | None
    ) -> None:
        """Publish a copy straight to a queue; it remembers where it came from."""
        old, known = raw.properties, table(raw)
        headers = {k: v for k, v in known.items() if not k.startswith(CONTROL)}
        headers[DELIVERIES] = count
        headers[ROUTING_KEY] = known.get(ROUTING_KEY, raw.method.routing_key)
        headers[EXCHANGE] = known.get(EXCHANGE, raw.method.exchange or "")
        copy = BasicProperties(**{k: v for k, v in old.__dict__.items() if v is not None})
        copy.headers, copy.expiration = headers, expiration
        copy.delivery_mode = 2
        copy.user_id = None
        driver = self.driver
        await driver.outbox.publish("", queue, raw.body, copy, True, driver.publish_timeout)

    # How much is sent ahead

    async def _fit(self) -> None:
        """Fit what the server sends ahead to the handler's speed.

        It is fixed for a consumer, so that another one takes its place. That is safe only while
        the server has sent all it may: nothing is on its way then that would be sent back.
        """
        if self._fixed:
            self._look_at = 2**62
            return
        now = self.driver.clock.now()
        rate = (self.given - self._looked) / max(now - self._since, 1e-6)
        full = self._latest - max(self._floor, self._before) >= self.window + sum(
            tag > self._before for tag in self._told
        )
        self._looked, self._since = self.given, now
        self._look_at = self.given + max(self.window, CAREFUL)
        most = max(MOST, self._normal)
        wanted = min(max(int(rate * AHEAD), self._normal), most)
        near = self.window / 4 < wanted < self.window * 2 and self.window >= self._normal
        near = near and not wanted == most > self.window
        if not full or near:
            return
        wire, self._held = self._wire, True  # acknowledgements wait meanwhile
        try:
            if wire is not None and wire.open_ and self._consumer:
                self.window = wanted
                await wire.call("basic_cancel", self._consumer)
                await wire.call("basic_qos", prefetch_count=wanted)
                await self._consume(wire)
        except (ChannelLost, TimeoutError, AMQPError) as error:
            log.debug("%r: %s", self.queue, error)
        finally:
            self._held = False
            self._flush_soon()

    # Settlement

    async def settle(
        self, raw: Delivery, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        if self.streaming or how is Settlement.NONE:
            return
        wire = self._wire
        if wire is None or raw.channel is not wire.channel:
            # Nobody can be told. The log says that the connection was lost; the message comes
            # again, as after an acknowledgement that was lost on its way.
            log.debug("%r: a message whose channel is gone is delivered again", self.queue)
            return
        if options:
            how = settlement(how, options)
        tag = raw.method.delivery_tag
        if how is Settlement.ACK:
            self._done.add(tag)
            if not self._flushing:
                self._flushing = True
                asyncio.get_running_loop().call_soon(self._flush)
        elif how is Settlement.REJECT:
            self._tell(wire, "basic_reject", tag, requeue=False)
        elif delay and delay > 0 and await self._delay(raw, delay):
            if self._wire is wire:
                self._done.add(tag)
                self._flush_soon()
        else:
            self._tell(wire, "basic_nack", tag, requeue=True)

    def _tell(self, wire: Wire, method: str, tag: int, **options: Any) -> None:
        try:
            getattr(wire.channel, method)(tag, **options)
        except AMQPError as error:
            log.debug("%r delivers a message again: %s", self.queue, error)
            return
        self._told.add(tag)
        self._flush_soon()

    async def _delay(self, raw: Delivery, delay: float) -> bool:
        """Put a message where it waits for its redelivery; the original goes when that is safe."""
        headers = raw.properties.headers
        count = deliveries_before(raw.method.redelivered, headers, raw.queue) + 1
        try:
            topology, expiration = self.driver.topology, milliseconds(delay, 0.0)
            queue = await topology.delay(self.queue, delay)
            try:
                await self._publish_anew(raw, queue, count, expiration)
            except Unroutable:  # somebody deleted it
                await topology.revived(queue)
                await topology.delay(self.queue, delay)
                await self._publish_anew(raw, queue, count, expiration)
        except (MillstreamError, ChannelLost) as error:
            # There is no deadline by which the server would deliver it again by itself.
            log.warning("%r: a message waits in this process: %s", self.queue, error)
            await self.driver.clock.sleep(delay)
            return False
        return True

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Acknowledge what is done: one frame for all that follow each other."""
        self._flushing = False
        wire, done, told = self._wire, self._done, self._told
        if self._held or wire is None or not wire.open_:
            return
        floor, last = self._floor, 0
        while True:
            tag = floor + 1
            if tag in done:
                done.discard(tag)
                last = tag
            elif tag in told:
                told.discard(tag)
            else:
                break
            floor = tag
        try:
            if last:
                wire.channel.basic_ack(last, multiple=last - self._floor > 1)
            self._floor = floor
            if done:
                for tag in done:
                    wire.channel.basic_ack(tag)
                told |= done
                done.clear()
        except AMQPError as error:
            log.debug("%r: acknowledgements are lost: %s", self.queue, error)

    async def ours(self, raws: list[Any], /) -> list[Any]:
        if self.streaming:
            return raws
        channel = self._wire.channel if self._wire is not None else None
        return [raw for raw in raws if raw.channel is channel]

    async def begun(self, raw: Delivery, /) -> bool:
        try:
            return await self.driver.topology.begun(raw)
        except (ChannelLost, MillstreamError, TimeoutError) as error:
            log.debug("%r: cannot note that a last attempt begins: %s", self.queue, error)
            return False

    async def lag(self) -> int | None:
        ready, _ = await self.driver.topology.depth(self.queue)
        return ready + len(self.waiting)

    # Healing

    def _cancelled(self, frame: Any) -> None:
        """The server cancelled the consumer: its queue was deleted, or moves to another node."""
        if frame.method.consumer_tag == self._consumer and not self.paused:
            self._heal("the server cancelled the consumer")

    def _channel_lost(self, reason: ChannelLost) -> None:
        self.waiting.clear()  # all of it is delivered again
        self._wire = None
        if not self.paused:
            self._heal(reason.text if reason.code else "")

    def line_back(self) -> None:
        """The connection is there again."""
        if self._wire is None and not self.paused:
            self._heal("")

    def _heal(self, reason: str) -> None:
        if self._keeper is None:
            return  # it begins, and whoever starts it is told
        if self._healing is None or self._healing.done():
            if reason:
                self.driver.notify("error", f"{self.queue!r}: {reason}; consuming anew")
            self._healing = self.driver.spawn(self._healed())

    async def _healed(self) -> None:
        attempt = 0
        while not self.paused:
            if not self.driver.consuming.up.is_set():
                return  # called again when it is
            wire, self._wire = self._wire, None
            try:
                if wire is not None:
                    await wire.close()
                    self.waiting.clear()
                await self._attach(again=True)
                return
            except SetupError as error:
                self.paused = True
                self.wake()
                self._report(error)
                return
            except (ChannelLost, TimeoutError, MillstreamError) as error:
                log.debug("%r: not back yet: %s", self.queue, error)
            attempt += 1
            await self.driver.clock.sleep(reconnect_delay(attempt, self.driver.reconnect_interval))

    async def _keep(self) -> None:
        """Notice a consumer that silently died: messages wait, and none comes."""
        before = -1
        while True:
            await self.driver.clock.sleep(LOOK * random.uniform(0.8, 1.2))
            wire = self._wire
            if wire is None or self.paused:
                before = -1
                continue
            try:
                ready, consumers = await self.driver.topology.depth(self.queue)
            except (ChannelLost, MillstreamError, TimeoutError):
                continue
            idle = self._latest == self._floor and self._latest == before and not self.streaming
            single = (self.spec.source.arguments or {}).get("x-single-active-consumer")
            if self._wire is wire and (not consumers or (ready and idle and not single)):
                self._heal("the consumer is dead")
            before = self._latest

    # The end

    async def pause(self) -> int:
        self.paused = True
        self.wake()
        if self._healing is not None and self._healing is not asyncio.current_task():
            self._healing.cancel()
        wire, consumer = self._wire, self._consumer
        self._consumer = ""
        if wire is not None and wire.open_ and consumer:
            try:
                await wire.call("basic_cancel", consumer)
            except (ChannelLost, TimeoutError) as error:
                log.debug("%r: %s", self.queue, error)
        if self.streaming:
            await self.finish()
            return 0
        back = list(self.waiting)
        self.waiting.clear()
        self._flush()
        for raw in back:
            wire = self._wire
            if wire is None or raw.channel is not wire.channel:
                return 0  # the server has them back already
            self._tell(wire, "basic_nack", raw.method.delivery_tag, requeue=True)
        return len(back)

    async def close(self) -> None:
        self.driver.flows.discard(self)
        for task in (self._keeper, self._healing):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        await self.cut_off()
        wire = self._wire
        if wire is not None:
            self._flush()
            self._wire = None
            await wire.close()
