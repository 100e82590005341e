"""The bridge example, as a process of its own between real servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats as nats_py
import pytest
from nats.js.errors import NotFoundError

from millstream.killpoints import VARIABLE
from millstream.rabbit import RabbitBroker
from tests.helpers import eventually
from tests.servers.nats import NatsServer
from tests.servers.rabbit import RabbitServer

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@contextmanager
def bridge(
    rabbit: str, nats: str, folder: Path, **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The example under ``millstream run``; ``settings`` are more environment variables."""
    command = [sys.executable, "-m", "millstream", "run", "examples.bridge.main:app"]
    environment = {"RABBIT_URL": rabbit, "NATS_URL": nats, "PYTHONPATH": str(ROOT), **settings}
    with (folder / "bridge.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def order(number: int) -> dict[str, Any]:
    return {"id": number, "customer": "ada", "amount": 1.5}


async def accepted(url: str) -> Counter[int]:
    """How often each order is in the stream."""
    client = await nats_py.connect(url)
    try:
        stream = client.jetstream()
        try:
            state = (await stream.stream_info("ORDERS")).state
        except NotFoundError:
            return Counter()
        found = [await stream.get_msg("ORDERS", n + 1) for n in range(state.last_seq)]
        return Counter(msgspec.json.decode(message.data or b"")["id"] for message in found)
    finally:
        await client.close()


def queues(server: RabbitServer) -> dict[str, int]:
    """The messages in each queue, those that somebody holds included."""
    lines = server.control("list_queues", "name", "messages", "--no-table-headers").splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


async def held(server: RabbitServer) -> int:
    """How many messages RabbitMQ keeps."""
    return sum((await asyncio.to_thread(queues, server)).values())


async def test_orders_wait_while_the_other_side_is_away(
    rabbit_server: RabbitServer, nats_server: NatsServer, tmp_path: Path
) -> None:
    log = tmp_path / "bridge.log"
    with bridge(rabbit_server.url, nats_server.url, tmp_path) as process:
        async with RabbitBroker(rabbit_server.url) as sender:

            async def send(*numbers: int) -> None:
                await sender.publish_batch(*map(order, numbers), queue="orders")

            async def declared() -> bool:
                return "orders" in await asyncio.to_thread(queues, rabbit_server)

            await eventually(declared, 30, every=0.2)
            await send(*range(100))
            await eventually(lambda: accepted(nats_server.url), 20, every=0.2)

            nats_server.kill()
            await send(*range(100, 200))
            # Attempts fail, the reading stops, and every order is still there.
            await eventually(lambda: "circuit open" in log.read_text(), 30)

            async def kept() -> bool:  # RabbitMQ counts quorum queues every five seconds
                return await held(rabbit_server) >= 100

            await eventually(kept, 15, every=0.5)
            assert "orders.dlq" not in await asyncio.to_thread(queues, rabbit_server)
            await send(*range(200, 230))

            nats_server.start()

            async def all_through() -> bool:
                return set(await accepted(nats_server.url)) == set(range(230))

            await eventually(all_through, 60, every=0.5)
            assert set((await accepted(nats_server.url)).values()) == {1}

            async def empty() -> bool:
                return await held(rabbit_server) == 0

            await eventually(empty, 30, every=0.5)
            # What is no order has the dead letters, and keeps nobody up.
            await sender.publish({"id": "many"}, queue="orders")
            await send(230)

            async def settled() -> bool:
                return await asyncio.to_thread(queues, rabbit_server) == {
                    **dict.fromkeys(await asyncio.to_thread(queues, rabbit_server), 0),
                    "orders.dlq": 1,
                }

            await eventually(settled, 30, every=0.5)
            assert (await accepted(nats_server.url))[230] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()


async def test_a_bridge_that_dies_under_load_lets_every_order_through_once(
    rabbit_server: RabbitServer, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with RabbitBroker(rabbit_server.url) as sender:
        # It dies when NATS has an order of which RabbitMQ does not know that it is through.
        killed = {VARIABLE: "after_publish:500"}
        with bridge(rabbit_server.url, nats_server.url, tmp_path, **killed) as process:

            async def declared() -> bool:
                return "orders" in await asyncio.to_thread(queues, rabbit_server)

            await eventually(declared, 30, every=0.2)
            await sender.publish_batch(*map(order, range(2000)), queue="orders")
            assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
        left = 2000 - len(await accepted(nats_server.url))
        assert left > 0
        with bridge(rabbit_server.url, nats_server.url, tmp_path):

            async def all_through() -> bool:
                return set(await accepted(nats_server.url)) == set(range(2000))

            await eventually(all_through, 60, every=0.5)

            async def empty() -> bool:
                return await held(rabbit_server) == 0

            await eventually(empty, 60, every=0.5)
    assert set((await accepted(nats_server.url)).values()) == {1}
