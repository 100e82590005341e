"""Dead letters in a stream: read one by one by sequence, so that no consumer is left behind."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg
from nats.js.errors import APIError, NotFoundError

from ..errors import AddressError, NoLetters, NoResponders, PublishTimeout, SetupError
from ..letters import Letter
from ..message import Link
from .flow import Tap
from .message import NatsMessage
from .options import NatsPublish

if TYPE_CHECKING:
    from .driver import NatsDriver

#: Error codes of the server for a message that is not there (10037), or not any more (10043).
_GONE = (10037, 10043, 10057)


class NatsLetters:
    """The dead letters of one subject; a letter's id is its sequence in the stream."""

    def __init__(self, driver: NatsDriver, address: str) -> None:
        self.driver, self.address = driver, address
        self._link = Link(driver, None)
        self._stream = ""

    async def _owner(self) -> str:
        if not self._stream:
            if not re.fullmatch(r"[^\s.*>]+(\.[^\s.*>]+)*", self.address):
                raise AddressError(f"{self.address!r} is not one subject")
            owner = await self.driver.streams.owner(self.address)
            if owner is None:
                raise NoLetters(f"no stream keeps {self.address!r}")
            self._stream = owner
        return self._stream

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        path = f"STREAM.MSG.GET.{await self._owner()}"
        sequence, left = int(after or 0), limit
        while left is None or left > 0:
            request = {"seq": sequence + 1, "next_by_subj": self.address}
            try:
                found = (await self.driver.outbox.api(path, request))["message"]
            except NotFoundError:
                return
            sequence, left = found["seq"], None if left is None else left - 1
            yield self._letter(found)

    def _letter(self, found: dict[str, Any]) -> Letter:
        data = base64.b64decode(found.get("data", ""))
        head = base64.b64decode(found.get("hdrs", "")).decode("utf-8", "replace")
        pairs = (line.partition(":") for line in head.split("\r\n")[1:] if line)
        headers = {name: value.strip() for name, _, value in pairs}
        raw = Msg(self.driver.client, found["subject"], "", data, headers or None)
        stored = datetime.fromisoformat(found["time"])
        return Letter(str(found["seq"]), NatsMessage(raw, self._link), stored)

    async def count(self) -> int:
        path, request = f"STREAM.INFO.{await self._owner()}", {"subjects_filter": self.address}
        state = (await self.driver.outbox.api(path, request))["state"]
        return int((state.get("subjects") or {}).get(self.address, 0))

    async def remove(self, id: str) -> bool:
        path = f"STREAM.MSG.DELETE.{await self._owner()}"
        try:
            await self.driver.outbox.api(path, {"seq": int(id), "no_erase": True})
        except APIError as error:
            if error.err_code in _GONE:
                return False
            raise SetupError(
                f"stream {self._stream!r} does not delete message {id}: {error.description}",
                fix="grant the right to do so, or leave out deny_delete",
            ) from error
        return True

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        kept = {k: v for k, v in headers.items() if not k.startswith(self.driver.control_headers)}
        command = NatsPublish(subject=letter.origin)
        if await self.driver.streams.owner(letter.origin) is not None:
            # The stream itself forgets a second copy; a stream made anew counts from 1 again.
            stream = await self._owner()
            command.message_id = f"{stream}/{letter.id}/{letter.stored.timestamp()}"
            await self.driver.publish(command, letter.message.body, kept)
        else:
            await self._send_to_listeners(command, letter.message.body, kept)

    async def _send_to_listeners(
        self, command: NatsPublish, body: bytes, headers: dict[str, str]
    ) -> None:
        """Publish to core NATS, where nothing but a listener keeps a message.

        The server says that there is none before it answers the flush that comes behind.
        """
        driver, answers = self.driver, list[Msg]()
        command.reply_to = driver.inbox("")
        inbox = await driver.client.subscribe(command.reply_to, future=Tap(answers.append))
        try:
            await driver.publish(command, body, headers)
            if not await driver.flush(driver.publish_timeout):
                raise PublishTimeout(f"no confirmation of a message to {command.subject!r}")
        finally:
            await inbox.unsubscribe()
        if any((answer.headers or {}).get("Status") == "503" for answer in answers):
            raise NoResponders(f"nobody listens to {command.subject!r}")
