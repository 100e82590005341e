"""Requests: one wildcard inbox, and a future for each question."""

from __future__ import annotations

import asyncio
import itertools

from nats.aio.client import Client
from nats.aio.msg import Msg

from ..errors import NoResponders, RequestTimeout
from .flow import Tap


class Replies:
    """Asks on one connection.

    Like nats-py's own ``request``, with a timer in place of a task for each question: the
    confirmations of a thousand publications in flight cost no task at all.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = client.new_inbox() + "."
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._ids = itertools.count()

    async def open(self) -> None:
        """Subscribe to the inbox."""
        await self._client.subscribe(self._prefix + "*", future=Tap(self._arrived))

    def _arrived(self, msg: Msg) -> None:
        future = self._waiting.pop(msg.subject[len(self._prefix) :], None)
        if future is not None and not future.done():
            future.set_result(msg)

    async def ask(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Msg:
        """Send a request and return the first reply.

        Raises:
            RequestTimeout: no reply in time.
            NoResponders: the server says that nobody listens.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg] = loop.create_future()
        token = f"{next(self._ids):x}"
        self._waiting[token] = future
        timer = loop.call_later(timeout, _expire, future, subject, timeout)
        try:
            await self._client.publish(subject, data, self._prefix + token, headers)
            reply = await future
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
        if reply.headers is not None and reply.headers.get("Status") == "503" and not reply.data:
            raise NoResponders(f"nobody listens to {subject!r}")
        return reply


def _expire(future: asyncio.Future[Msg], subject: str, timeout: float) -> None:
    if not future.done():
        future.set_exception(RequestTimeout(f"no reply from {subject!r} within {timeout:g} s"))
