"""Dead letters: MQTT has no queues, but a server keeps the newest message of each topic.

So each letter is a retained message under a topic of its own, ``{address}/{id}``: it is there
until it is removed, it outlives every session, and whoever subscribes to ``{address}/+`` gets all.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..driver import SubscriptionSpec
from ..errors import NoLetters, NoResponders, NotConnected, PublishTimeout
from ..letters import Letter
from ..message import Link, new_id
from ..retry import DeadLetter
from .connection import Connection
from .identity import passing_id
from .line import Line
from .message import MqttMessage
from .options import MqttPublish
from .wire import PUBACK, Incoming, reason_of, topic_bytes, write_packet, write_subscribe

if TYPE_CHECKING:
    from .driver import MqttDriver

#: A letter's id: when it was made, so that they sort by age, and what makes it unique.
ID = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f-]+")
_TIME = "%Y%m%dT%H%M%S.%fZ"
#: Seconds until the mark behind the letters is sent again.
AGAIN = 0.5


def letter_id() -> str:
    """An id for a new letter."""
    return f"{datetime.now(UTC).strftime(_TIME)}-{new_id()}"


def dead_letters_of(spec: SubscriptionSpec) -> str:
    """The address of a subscription's dead letters."""
    letter = spec.buried
    if isinstance(letter, DeadLetter) and letter.destination:
        return letter.destination
    words = {"+": "any", "#": "all"}
    levels = (words.get(level, level.strip("{}")) for level in spec.destination.split("/"))
    return "/".join((*levels, "dlq"))


class _Look(Line):
    """A connection of its own that gets what the server keeps under a topic filter."""

    def __init__(self, driver: MqttDriver, filter: str, mark: str) -> None:
        super().__init__(driver.settings, passing_id(), lambda *_: None, lambda text: None)
        self.filter, self.mark = filter, mark
        self.found: list[Incoming] = []
        self.all_there = asyncio.Event()

    async def established(self, present: bool) -> None:
        version = self.settings.version
        filters = [(self.filter, 1), (self.mark, 1)]
        codes, reason = await self.ask(lambda mid: write_subscribe(version, mid, filters))
        if max(codes) >= 128:
            raise NoLetters(
                f"the server does not show {self.filter!r}: {reason_of(max(codes), reason)}"
            )

    def received(self, message: Incoming) -> None:
        if message.mid and self.connection is not None:
            self.connection.write(write_packet(PUBACK, message.mid.to_bytes(2)))
        if message.topic == self.mark:
            self.all_there.set()
        elif message.retain:
            self.found.append(message)

    def lost(self, connection: Connection, reason: str) -> None:
        self.connection, self.reason = None, reason
        self.all_there.set()


async def look(
    driver: MqttDriver, address: str, levels: str, patience: float = 15.0
) -> list[Incoming]:
    """The retained messages under ``{address}/{levels}``.

    The server sends what it keeps in answer to a subscription and says nothing at the end,
    so a message of our own is sent behind: when it arrives, all others have.

    Raises:
        NoLetters: the server keeps none, or shows none.
        PublishTimeout: it does not show them within ``patience`` seconds.
        NotConnected: the connection broke meanwhile.
        ConnectError: the server is not reached.
    """
    if driver.outbox is not None and driver.outbox.limits.get("retain_available") == 0:
        raise NoLetters(f"{driver.describe()} keeps no retained messages")
    mark = f"{address}/mark-{new_id()}/end"
    looking = _Look(driver, f"{address}/{levels}", mark)
    await looking.open()
    try:
        async with asyncio.timeout(patience):
            while not looking.all_there.is_set():
                await driver.publish(MqttPublish(topic=mark), b"", None)
                try:
                    async with asyncio.timeout(AGAIN):
                        await looking.all_there.wait()
                except TimeoutError:
                    continue  # a server may drop what it cannot queue
    except TimeoutError:
        raise PublishTimeout(
            f"{driver.describe()} does not show what lies under {address!r}: may we read it?"
        ) from None
    finally:
        connection = looking.connection
        await looking.close()
    if connection is None:
        raise NotConnected(f"{driver.describe()}: {looking.reason}", state="disconnected")
    return looking.found


class MqttLetters:
    """The dead letters of one address."""

    def __init__(self, driver: MqttDriver, address: str) -> None:
        self.driver, self.address = driver, address.rstrip("/")
        topic_bytes(self.address)
        self._link = Link(driver, None)

    async def _kept(self, id: str) -> list[tuple[str, Incoming]]:
        """The retained messages under the address, by id; those of one id, or all for ``+``."""
        start = len(self.address) + 1
        kept = [(m.topic[start:], m) for m in await look(self.driver, self.address, id)]
        return sorted((id, m) for id, m in kept if ID.fullmatch(id))

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        kept = [one for one in await self._kept("+") if one[0] > (after or "")]
        for id, raw in kept[:limit]:
            stored = datetime.strptime(id.partition("-")[0], _TIME).replace(tzinfo=UTC)
            yield Letter(id, MqttMessage(raw, self._link), stored)

    async def count(self) -> int:
        return len(await self._kept("+"))

    async def remove(self, id: str) -> bool:
        if not ID.fullmatch(id) or not await self._kept(id):
            return False
        gone = MqttPublish(topic=f"{self.address}/{id}", retain=True)
        await self.driver.publish(gone, b"", None)
        return True

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        command: Any = MqttPublish(topic=letter.origin)
        receipt = await self.driver.publish(command, letter.message.body, headers)
        if receipt is not None and not receipt.heard:
            raise NoResponders(f"nobody has subscribed to {letter.origin!r}")
