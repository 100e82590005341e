"""RabbitMQ: a quorum queue, a classic one, and a stream."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from millstream.errors import RequestTimeout
from millstream.rabbit import QueueType, RabbitBroker, RabbitQueue
from millstream.rabbit.options import RabbitSubscription
from tests.faults.sources.base import Setup, Source
from tests.servers.rabbit import MAX_MESSAGE, RabbitServer


class Quorum(Source):
    """A quorum queue, reached by its name."""

    name = "rabbit-quorum"
    capabilities = RabbitSubscription(RabbitQueue("q")).capabilities
    deadline = False
    max_message = MAX_MESSAGE
    resends = True
    moves = "_publish_anew"
    # The server delivers again whatever was not acknowledged when its connection ended. A worker
    # goes on with what it has fetched until it sees that end, and can acknowledge none of it.
    linger = 0.5
    nobody = RequestTimeout  # the queue keeps a request
    full = "refused the message"
    kind = QueueType.QUORUM

    def server(self, setup: Setup) -> RabbitServer:
        return RabbitServer()

    def url(self, port: int, user: str = "") -> str:
        return f"amqp://guest:guest@127.0.0.1:{port}/"

    def broker(self, setup: Setup) -> RabbitBroker:
        return RabbitBroker(
            setup.url,
            graceful_timeout=setup.grace,
            publish_timeout=setup.publish_timeout,
            reconnect_interval=setup.reconnect,
            heartbeat=max(round(setup.ping), 1),
        )

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"address": self.queue(setup)}

    def asking(self, broker: Any) -> int:
        return sum(map(len, broker.driver.outbox._questions.values()))

    def queue(self, setup: Setup) -> RabbitQueue:
        # Only bodies count here, and those of the scenarios are small.
        limits = {"x-max-length-bytes": setup.room // 10, "x-overflow": "reject-publish"}
        arguments = limits if setup.room else None
        return RabbitQueue(self.address(setup), self.kind, arguments=arguments)

    async def held(self, broker: Any, setup: Setup) -> int:
        """What waits; the server tells nobody but its operators what consumers have."""
        name = self.address(setup)
        retries = [f"{name}.retry.{n}ms" for n in (64, 128, 256, 512)]
        retries += [f"{name}.retry.{n}s" for n in (1, 2, 4, 8)]

        def count(channel: Any) -> int:
            return int(channel.queue_declare(name, passive=True).method.message_count)

        def later(connection: Any) -> int:
            total = 0
            for retry in retries:
                with suppress(ChannelClosedByBroker):
                    found = connection.channel().queue_declare(retry, passive=True)
                    total += found.method.message_count
            return total

        return await self._ask(broker, lambda c: count(c.channel()) + later(c))

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        return await self._all(broker, f"{self.address(setup)}.dlq")

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        return [body for body, _ in await self._all(broker, self.address(setup, "out"))]

    async def _all(self, broker: Any, queue: str) -> list[tuple[bytes, dict[str, str]]]:
        def read(connection: Any) -> list[tuple[bytes, dict[str, str]]]:
            channel, found = connection.channel(), []
            with suppress(ChannelClosedByBroker):
                while True:
                    method, properties, body = channel.basic_get(queue)
                    if method is None:
                        channel.basic_nack(0, multiple=True, requeue=True)
                        break
                    headers = {k: str(v) for k, v in (properties.headers or {}).items()}
                    if properties.message_id:
                        headers["message_id"] = properties.message_id
                    found.append((body, headers))
            return found

        return list(await self._ask(broker, read))

    async def _ask(self, broker: Any, work: Callable[[Any], Any]) -> Any:
        parameters = broker.driver.addresses[0].parameters()

        def run() -> Any:
            connection = pika.BlockingConnection(parameters)
            try:
                return work(connection)
            finally:
                connection.close()

        return await asyncio.to_thread(run)

    def wipe(self, server: Any) -> None:
        shutil.rmtree(server.folder / "mnesia")

    async def delete_source(self, broker: Any, setup: Setup) -> None:
        await self._ask(broker, lambda c: c.channel().queue_delete(self.address(setup)))

    async def refuse_letters(self, broker: Any, setup: Setup) -> None:
        name = f"{self.address(setup)}.dlq"
        arguments = {"x-max-length": 0, "x-overflow": "reject-publish"}
        await self._ask(
            broker, lambda c: c.channel().queue_declare(name, durable=True, arguments=arguments)
        )

    async def take_letters(self, broker: Any, setup: Setup) -> None:
        name = f"{self.address(setup)}.dlq"
        await self._ask(broker, lambda c: c.channel().queue_delete(name))


class Classic(Quorum):
    """A classic queue, made by somebody else."""

    name = "rabbit-classic"
    linger = 1.0  # what was delivered before is published anew, and may be there twice then
    kind = QueueType.CLASSIC


class Stream(Quorum):
    """A stream: it keeps everything, and a new process reads what comes from then on."""

    name = "rabbit-stream"
    kind = QueueType.STREAM
    capabilities = RabbitSubscription(RabbitQueue("q", QueueType.STREAM)).capabilities
    confirms = False
    linger = 0.0  # nothing is delivered again
    full = ""

    async def held(self, broker: Any, setup: Setup) -> int:
        return -1  # all of it, handled or not
