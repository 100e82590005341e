"""A foreign client: pika without anything of ours, and small conveniences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pika


class Foreign:
    """A blocking client of pika's, as other programs use it; its calls run in a thread."""

    def __init__(self, url: str) -> None:
        self.url = url

    @contextmanager
    def channel(self) -> Any:
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    async def do(self, work: Callable[[Any], Any]) -> Any:
        def run() -> Any:
            with self.channel() as channel:
                return work(channel)

        return await asyncio.to_thread(run)

    async def get(self, queue: str) -> tuple[Any, Any, bytes] | None:
        """Take one message out of a queue."""
        method, properties, body = await self.do(lambda c: c.basic_get(queue, auto_ack=True))
        return None if method is None else (method, properties, body)

    async def depth(self, queue: str) -> int:
        found = await self.do(lambda c: c.queue_declare(queue, passive=True))
        return int(found.method.message_count)

    async def exists(self, queue: str) -> bool:
        try:
            await self.depth(queue)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True
