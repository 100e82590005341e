"""Dead letters in a queue: taken out to be looked at, and put back where they were."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from pika.spec import Basic, BasicProperties

from ..errors import AddressError, NoLetters
from ..letters import Letter
from ..message import Link
from .connection import API_TIMEOUT, NOT_FOUND, ChannelLost, Wire
from .message import CONTROL, EXCHANGE, Delivery, RabbitMessage, table
from .options import RabbitPublish

if TYPE_CHECKING:
    from .driver import RabbitDriver


class RabbitLetters:
    """The dead letters of one queue.

    A queue can only be read by taking messages. They are held unacknowledged meanwhile, and go
    back to their places when the channel is closed: also if this process dies. Others do not see
    them for as long. A letter's id is made of the time of its failure and its content.
    """

    def __init__(self, driver: RabbitDriver, address: str) -> None:
        self.driver, self.address = driver, address
        self._link = Link(driver, None)
        #: Letters that are held at the moment: id → channel and tag.
        self._held: dict[str, tuple[Wire, int]] = {}

    async def _depth(self) -> int:
        if not self.address or len(self.address.encode()) > 255:
            raise AddressError(f"{self.address!r} is not the name of a queue")
        try:
            return (await self.driver.topology.depth(self.address))[0]
        except ChannelLost as lost:
            if lost.code == NOT_FOUND:
                raise NoLetters(f"there is no queue {self.address!r}") from lost
            raise NoLetters(f"{self.address!r}: {lost.text}") from lost

    async def _taken(self, wire: Wire) -> AsyncIterator[tuple[str, Delivery]]:
        """Take every message out, one by one."""
        channel, loop = wire.channel, asyncio.get_running_loop()
        found: asyncio.Future[Delivery | None] = loop.create_future()

        def empty(_: Any) -> None:
            if not found.done():
                found.set_result(None)

        def took(channel: Any, method: Any, properties: BasicProperties, body: bytes) -> None:
            if not found.done():
                found.set_result(Delivery(channel, method, properties, body, self.address))

        channel.add_callback(empty, [Basic.GetEmpty], one_shot=False)
        while True:
            found = loop.create_future()
            channel.basic_get(self.address, took)
            async with asyncio.timeout(API_TIMEOUT):
                raw = await found
            if raw is None:
                return
            yield letter_id(raw), raw

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        await self._depth()
        wire = await self.driver.consuming.wire()
        left, taken = limit, 0
        held: list[str] = []
        try:
            async for id, raw in self._taken(wire):
                taken += 1
                if after is not None and id <= after:
                    # In the order of their failures, as far as several processes keep one.
                    continue
                after = None
                self._held[id] = wire, raw.method.delivery_tag
                held.append(id)
                yield Letter(id, RabbitMessage(raw, self._link), failed_at(raw))
                left = None if left is None else left - 1
                if left == 0:
                    return
        finally:
            removed = sum(self._held.pop(id, None) is None for id in held)
            await self._put_back(wire, taken - removed)

    async def _put_back(self, wire: Wire, count: int) -> None:
        """Give back what is held; on return others see it again."""
        if wire.open_ and count:
            expected = await self._ready(wire) + count
            wire.channel.basic_nack(0, multiple=True, requeue=True)
            for _ in range(100):  # a quorum queue takes a moment, which is no error
                if await self._ready(wire) >= expected:
                    break
                await asyncio.sleep(0.01)
        await wire.close()

    async def _ready(self, wire: Wire) -> int:
        """How many messages nobody holds."""
        answer = await wire.call("queue_declare", self.address, passive=True)
        return int(answer.message_count)

    async def count(self) -> int:
        return await self._depth()

    async def remove(self, id: str) -> bool:
        held = self._held.pop(id, None)
        if held is not None and held[0].open_:
            held[0].channel.basic_ack(held[1])
            return True
        await self._depth()
        wire, others = await self.driver.consuming.wire(), 0
        try:
            async for found, raw in self._taken(wire):
                if found == id:
                    wire.channel.basic_ack(raw.method.delivery_tag)
                    return True
                others += 1
        finally:
            await self._put_back(wire, others)
        return False

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        kept = {k: v for k, v in headers.items() if not k.startswith((*CONTROL, EXCHANGE))}
        raw: Delivery = letter.message.raw
        exchange = str(table(raw).get(EXCHANGE, ""))
        command = RabbitPublish(
            routing_key=letter.origin,
            exchange=exchange,
            mandatory=True,
            priority=raw.properties.priority,
        )
        await self.driver.publish(command, letter.message.body, kept)


def failed_at(raw: Delivery) -> datetime:
    """When a letter failed, as far as it tells."""
    headers = table(raw)
    try:
        return datetime.fromisoformat(headers["ms-failed-at"])
    except (KeyError, TypeError, ValueError):
        pass
    for death in headers.get("x-death") or ():  # sent here by the server itself
        if isinstance(death.get("time"), datetime):
            time: datetime = death["time"]
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time
    stamp = raw.properties.timestamp
    return datetime.fromtimestamp(stamp or 0, UTC)


def letter_id(raw: Delivery) -> str:
    """A name that stays the same however often the letter is taken and put back."""
    properties = raw.properties
    headers = {str(k): str(v) for k, v in table(raw).items() if k != "x-delivery-count"}
    digest = hashlib.sha256(raw.body)
    digest.update(msgspec.msgpack.encode([properties.message_id, sorted(headers.items())]))
    return f"{int(failed_at(raw).timestamp() * 1e6):014x}-{digest.hexdigest()[:12]}"
