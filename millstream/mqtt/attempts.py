"""How often a message was tried by processes that died: MQTT counts no deliveries.

What the count needs is kept by the server, as a retained message beside the dead letters. It is
written when a session brings what an earlier process had left, and before a last attempt, so that
a message which simply works costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from ..errors import MillstreamError, NotConnected, PublishTimeout
from .letters import look
from .options import MqttPublish
from .wire import Incoming

if TYPE_CHECKING:
    from .driver import MqttDriver

log = logging.getLogger("millstream.mqtt")

#: Times to try to write the note while the server is away; seconds in between; seconds to read it.
TRIES, PAUSE, PATIENCE = 3, 0.5, 5.0


class Attempt(msgspec.Struct, array_like=True):
    """What is noted of a message.

    Fields:
        mark: tells it from another message that got its packet identifier later.
        count: how many times it was delivered.
        begun: whether its last attempt began.
    """

    mark: str
    count: int
    begun: bool = False


class Attempts:
    """The note of one session; by packet identifier, which a session keeps for a message.

    Args:
        driver: whose connections are used.
        address: beneath which it lies, with those of other sessions.
        client_id: of the session.
    """

    def __init__(self, driver: MqttDriver, address: str, client_id: str) -> None:
        self.driver, self.address = driver, address
        self._level = re.sub("[/+#{]", "-", client_id)
        self._noted: dict[int, Attempt] | None = None
        self._entries: dict[int, Attempt] = {}
        self._saved, self._lock = b"", asyncio.Lock()
        self._saving: set[asyncio.Task[bool]] = set()

    async def count(self, messages: Iterable[Incoming]) -> None:
        """Count deliveries of messages that the server says it sent before."""
        if self._noted is None:
            self._noted = await self._read()
        for message in messages:
            mark, before = _mark(message), self._noted.get(message.mid)
            if before is None or before.mark != mark:
                before = Attempt(mark, 1)
            message.count = before.count + 1
            self._entries[message.mid] = Attempt(mark, message.count, before.begun)
        await self._save()

    async def begun(self, message: Incoming) -> bool:
        """Note that a last attempt begins; whether that had been noted."""
        entry = self._entries.setdefault(message.mid, Attempt(_mark(message), 1))
        before, entry.begun, entry.count = entry.begun, True, message.count
        return await self._save() and before

    def settled(self, message: Incoming) -> None:
        """Forget a message, soon."""
        if self._entries.pop(message.mid, None) is not None:
            task = asyncio.get_running_loop().create_task(self._save())
            self._saving.add(task)
            task.add_done_callback(self._saving.discard)

    async def close(self) -> None:
        """Wait a moment for what is to be forgotten."""
        if self._saving:
            await asyncio.wait(self._saving, timeout=1.0)

    async def _read(self) -> dict[int, Attempt]:
        try:
            for message in await look(self.driver, self.address, self._level, PATIENCE):
                self._saved = message.payload
                return msgspec.json.decode(message.payload, type=dict[int, Attempt])
        except (MillstreamError, msgspec.MsgspecError) as error:
            log.warning("what is noted of earlier attempts cannot be read: %s", error)
        return {}

    async def _save(self) -> bool:
        """Let the server keep the note; whether it does."""
        async with self._lock:
            for _ in range(TRIES):
                body = msgspec.json.encode(self._entries) if self._entries else b""
                if body == self._saved:
                    return True
                try:
                    command = MqttPublish(topic=f"{self.address}/{self._level}", retain=True)
                    await self.driver.publish(command, body, None)
                except (NotConnected, PublishTimeout) as error:
                    log.debug("%s", error)
                    await asyncio.sleep(PAUSE)
                except MillstreamError as error:
                    self.driver.report(
                        "attempts cannot be noted, so that a message which kills its process "
                        f"comes again and again: {error}"
                    )
                    return False
                else:
                    self._saved = body
                    return True
            return False


def _mark(message: Incoming) -> str:
    return hashlib.blake2b(
        message.topic.encode() + b"\0" + message.payload, digest_size=8
    ).hexdigest()
