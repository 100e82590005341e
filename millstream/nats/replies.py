"""Requests: one wildcard inbox, and a future for each question."""

from __future__ import annotations

import itertools

from nats.aio.client import Client
from nats.aio.msg import Msg

from ..base import Questions
from ..errors import NoResponders
from .flow import Tap


class Replies:
    """Asks on one connection.

    Like nats-py's own ``request``, with a timer in place of a task for each question: the
    confirmations of a thousand publications in flight cost no task at all.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = client.new_inbox() + "."
        self.asked: Questions[str, Msg] = Questions()
        self._ids = itertools.count()

    async def open(self) -> None:
        """Subscribe to the inbox."""
        await self._client.subscribe(self._prefix + "*", future=Tap(self._arrived))

    def _arrived(self, msg: Msg) -> None:
        self.asked.answer(msg.subject, msg)

    async def ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        """Send a request and return the first reply.

        Raises:
            RequestTimeout: no reply in time.
            NoResponders: the server says that nobody listens.
        """
        inbox = f"{self._prefix}{next(self._ids):x}"
        with self.asked.ask(inbox, subject, timeout) as answer:
            await self._client.publish(subject, data, inbox, headers)
            reply = await answer
        if reply.headers is not None and reply.headers.get("Status") == "503" and not reply.data:
            raise NoResponders(f"nobody listens to {subject!r}")
        return reply
