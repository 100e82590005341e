"""Connections, channels, consumers and queues that go away, on a server of the tests' own."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pika.spec import Basic, BasicProperties

from millstream import AckPolicy, Retry
from millstream.errors import NotConnected, PublishTimeout
from millstream.rabbit import (
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitMessage,
    RabbitQueue,
)
from millstream.rabbit.connection import abort
from millstream.rabbit.message import Delivery
from tests.helpers import eventually, unique
from tests.rabbit.helpers import Foreign
from tests.servers import missing
from tests.servers.rabbit import RabbitServer, rabbit_script

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[RabbitServer]:
    """One for all of these tests, which run one after another; each leaves it running."""
    if rabbit_script() is None:
        missing("no rabbitmq-server: apt-get install rabbitmq-server")
    with RabbitServer() as server:
        yield server


class Service:
    """A broker with one handler, and what it got."""

    def __init__(self, server: RabbitServer, queue: Any = None, **options: Any) -> None:
        self.broker = RabbitBroker(
            server.url,
            reconnect_interval=0.3,
            publish_timeout=options.pop("timeout", 30.0),
            graceful_timeout=options.pop("grace", 15.0),
        )
        self.name = unique()
        self.got: list[int] = []
        self.counts: list[int] = []
        self.queue = queue or RabbitQueue(self.name)

        @self.broker.subscriber(self.queue, **options)
        async def handler(body: int, message: RabbitMessage) -> None:
            self.counts.append(message.delivery_count)
            await self.work(body)
            self.got.append(body)

    async def work(self, body: int) -> None:
        """What the handler does."""

    async def __aenter__(self) -> Service:
        await self.broker.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.stop()

    async def send(self, *bodies: int) -> None:
        for body in bodies:
            await self.broker.publish(body, self.queue.name)

    async def has(self, *bodies: int, timeout: float = 30.0) -> None:
        await eventually(lambda: set(bodies) <= set(self.got), timeout)


@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_everything_goes_on_when_the_server_comes_back(
    server: RabbitServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Service(server) as service:
        await service.send(1, 2)
        await service.has(1, 2)
        await asyncio.to_thread(server.stop if how == "restarted" else server.kill)
        waiting = asyncio.create_task(service.send(3))  # waits for the connection
        with pytest.raises((NotConnected, PublishTimeout)):
            await service.broker.publish(0, service.queue.name, timeout=0.2)
        assert not await service.broker.ping(0.5)
        await asyncio.to_thread(server.start)
        await waiting
        await service.send(4)
        await service.has(3, 4)
        assert await service.broker.ping(5)
        assert service.broker.health()["connected"]
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len([line for line in lines if "connection lost" in line]) == 1
    assert len(lines) <= 3, lines


async def test_nothing_confirmed_is_lost_by_a_kill(server: RabbitServer) -> None:
    async with Service(server) as service:
        confirmed: list[int] = []

        async def load() -> None:
            for n in range(400):
                await service.send(n)
                confirmed.append(n)
                await asyncio.sleep(0.002)

        loading = asyncio.create_task(load())
        await eventually(lambda: len(confirmed) > 50, 20)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await loading
        await service.has(*range(400))


async def test_a_server_that_comes_back_empty_gets_its_topology_again(
    server: RabbitServer,
) -> None:
    exchange = RabbitExchange(unique(), ExchangeType.TOPIC)
    queue = RabbitQueue(unique(), routing_key="a.*")
    service = Service(server, queue, exchange=exchange)
    other = RabbitExchange(unique())
    publisher = service.broker.publisher(RabbitQueue(unique()))
    service.broker.publisher("key", other)
    async with service:
        await asyncio.to_thread(server.stop)
        shutil.rmtree(server.folder / "mnesia")
        await asyncio.to_thread(server.start)
        await eventually(lambda: service.broker.health()["connected"], 30)

        async def arrives() -> bool:
            await service.broker.publish(1, "a.b", exchange)
            return bool(service.got)

        await eventually(arrives, 10, every=0.2)
        await publisher.publish(2)
        await Foreign(server.url).do(lambda c: c.exchange_declare(other.name, passive=True))


async def test_a_deleted_queue_is_made_again(server: RabbitServer) -> None:
    async with Service(server) as service:
        await service.send(1)
        await service.has(1)
        await Foreign(server.url).do(lambda c: c.queue_delete(service.queue.name))

        async def arrives() -> bool:
            await service.broker.publish(2, service.queue.name)
            return True

        assert await _succeeds(arrives)
        await service.has(2)


async def _succeeds(work: Any, timeout: float = 10.0) -> bool:
    end = time.monotonic() + timeout
    while True:
        try:
            return bool(await work())
        except Exception:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


async def test_an_error_of_one_channel_leaves_the_others_alone(server: RabbitServer) -> None:
    async with Service(server) as service:
        other: list[int] = []
        subscriber = service.broker.subscriber(second := unique())

        @subscriber
        async def handler(body: int) -> None:
            other.append(body)

        await subscriber.start()
        [mine] = [f for f in service.broker.driver.flows if f.queue == service.queue.name]
        [theirs] = [f for f in service.broker.driver.flows if f.queue == second]
        before, broken = theirs._wire, mine._wire
        assert broken is not None
        broken.channel.basic_ack(99_999)  # no such tag: the server closes the channel
        await eventually(lambda: mine._wire not in (None, broken))
        await service.send(1)
        await service.has(1)
        assert theirs._wire is before
        await service.broker.publish(5, second)
        await eventually(lambda: other == [5])


async def test_a_consumer_that_silently_died_is_noticed(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millstream.rabbit.flow.LOOK", 0.3)
    async with Service(server) as service:
        [flow] = service.broker.driver.flows
        assert flow._wire is not None
        # Without an answer and without the driver knowing it, as after a server's bug.
        flow._wire.channel._send_method(_cancel(flow._consumer))
        await asyncio.sleep(0.1)
        await service.send(1)
        await service.has(1, timeout=10)


def _cancel(tag: str) -> Any:
    return Basic.Cancel(tag, nowait=True)


async def test_a_closed_connection_is_made_again(server: RabbitServer) -> None:
    async with Service(server) as service:
        await service.send(1)
        await service.has(1)
        await asyncio.to_thread(server.control, "close_all_connections", "test")
        await service.send(2)
        await service.has(2)


async def test_what_waited_here_when_its_channel_was_lost_is_not_begun(
    server: RabbitServer,
) -> None:
    """It is delivered again, to whom the server likes."""
    service = Service(server, concurrency=3, ordered_by=lambda message: "one")
    gate = asyncio.Event()

    async def work(body: int) -> None:
        if len(service.counts) == 1:
            await gate.wait()
            raise ValueError("no other attempt in place, either")

    service.work = work  # type: ignore[method-assign]
    async with service:
        await service.send(0, 1, 2)
        [subscription], [flow] = service.broker.subscriptions, service.broker.driver.flows
        lanes, before = subscription._lanes, flow._wire
        await eventually(lambda: lanes is not None and lanes.waiting == 2, 10)
        abort(service.broker.driver.consuming.connection)
        await eventually(lambda: flow._wire not in (None, before), 10)
        gate.set()
        await service.has(0, 1, 2)
        await asyncio.sleep(1.5)  # longer than the attempt in place would wait
    assert service.got == [0, 1, 2]
    assert service.counts == [1, 2, 2, 2]


async def test_callbacks_get_the_connection(server: RabbitServer) -> None:
    calls: list[tuple[Any, ...]] = []

    async def back(connection: Any) -> None:
        calls.append((connection,))

    broker = RabbitBroker(
        server.url,
        reconnect_interval=0.3,
        on_close=[lambda connection, reason: calls.append((connection, reason))],
        on_reconnected=[back],
    )
    async with broker:
        lost = broker.connection
        abort(lost)
        await eventually(lambda: len(calls) == 2, 10)
        assert calls[0][0] is lost and isinstance(calls[0][1], Exception)
        assert calls[1] == (broker.connection,)


async def test_two_connections_that_break_and_come_back_together_are_one_event(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def said(what: str) -> int:
        return sum(what in record.getMessage() for record in caplog.records)

    async with Service(server) as service:
        driver, declared = service.broker.driver, asyncio.Event()
        monkeypatch.setattr(driver.topology, "restore", declared.wait)
        for line in (driver.consuming, driver.publishing):
            assert line.connection is not None
            abort(line.connection)
        await asyncio.gather(driver.consuming.up.wait(), driver.publishing.up.wait())
        abort(driver.publishing.connection)  # so that it is the later one
        await eventually(lambda: said("connected again"), 10)
        declared.set()
        await service.send(1)
        await service.has(1)
        await asyncio.sleep(0.2)  # a second line would come about now
        assert said("connection lost") == said("connected again") == 1


async def test_while_the_server_is_short_of_memory_publishing_waits_and_consuming_goes_on(
    server: RabbitServer,
) -> None:
    async with Service(server, timeout=0.5) as service:
        await service.send(*range(20))
        await service.has(*range(20))
        await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.0000001")
        try:

            async def refused() -> bool:
                try:
                    await service.broker.publish(100, service.queue.name, timeout=0.5)
                except PublishTimeout as error:
                    return "memory" in str(error)
                return False

            await eventually(refused, 10, every=0.05)
            begin = time.monotonic()
            with pytest.raises(PublishTimeout, match="memory"):
                await service.broker.publish(101, service.queue.name)
            assert time.monotonic() - begin < 2
            waiting = asyncio.create_task(
                service.broker.publish(102, service.queue.name, timeout=20)
            )
            [subscription] = service.broker.subscriptions
            await subscription.pause()
            await subscription.resume()
            assert service.broker.health()["subscriptions"][0]["state"] == "running"
        finally:
            await asyncio.to_thread(server.control, "set_vm_memory_high_watermark", "0.4")
        await waiting
        await service.has(102)


@pytest.mark.parametrize("kind", [QueueType.QUORUM, QueueType.CLASSIC])
async def test_a_message_that_kills_its_worker_comes_to_an_end(
    server: RabbitServer, kind: QueueType
) -> None:
    queue = RabbitQueue(unique(), kind)
    hangs = asyncio.Event()

    async def attempt() -> int:
        """A process that dies with the message in its hands, as the server sees it."""
        service = Service(server, queue, retry=Retry(attempts=3, delay=0.05), grace=0.2)

        async def work(body: int) -> None:
            await hangs.wait()

        service.work = work  # type: ignore[method-assign]
        await service.broker.start()
        dead = service.broker.subscriptions[0].failing
        await eventually(lambda: service.counts or dead.dead_lettered, 10)
        count = service.counts[0] if service.counts else 0
        for line in (service.broker.driver.consuming, service.broker.driver.publishing):
            line._closing = True
            assert line.connection is not None
            line.connection._terminate_stream(OSError("killed"))
        for flow in service.broker.driver.flows:
            flow.paused = True
        await asyncio.sleep(0.2)
        await service.broker.stop()
        return count

    async with RabbitBroker(server.url) as broker:
        await broker.declare_queue(queue)
        await broker.publish(1, queue)
    counts = [await attempt() for _ in range(4)]
    assert counts == [1, 2, 3, 0]
    assert await Foreign(server.url).depth(f"{queue.name}.dlq") == 1


async def test_only_the_note_of_another_process_tells_of_a_crash(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message() -> Any:
        return Delivery(None, Basic.Deliver(), BasicProperties(message_id=unique()), b"", "q")

    async with Service(server) as one, Service(server) as other:
        [mine], [its] = one.broker.driver.flows, other.broker.driver.flows
        first = message()
        assert not await mine.begun(first)
        assert not await mine.begun(first)  # it came again since a connection broke
        assert await its.begun(first)

        topology = one.broker.driver.topology
        declare = topology._refusable

        async def unanswered(*args: Any, **options: Any) -> None:
            await declare(*args, **options)
            raise NotConnected("the connection broke", state="disconnected")

        second = message()
        with monkeypatch.context() as patch:
            patch.setattr(topology, "_refusable", unanswered)
            assert not await mine.begun(second)
        assert not await mine.begun(second)
        assert await its.begun(second)


async def test_a_stream_goes_on_where_it_was(server: RabbitServer) -> None:
    stream = RabbitQueue(unique(), QueueType.STREAM)
    async with Service(server, stream) as service:
        await service.send(1, 2)
        await service.has(1, 2)
        await asyncio.to_thread(server.control, "close_all_connections", "test")
        await service.send(3)
        await service.has(3)
        assert service.got == [1, 2, 3]


async def test_a_stream_read_anew_repeats_nothing_that_waits_here(server: RabbitServer) -> None:
    class Slow(Service):
        async def work(self, body: int) -> None:
            await asyncio.sleep(0.02)

    async with Slow(server, RabbitQueue(unique(), QueueType.STREAM)) as service:
        await service.send(*range(20))
        [flow] = service.broker.driver.flows
        for n in (3, 8):
            await service.has(n)
            flow._heal("as if the consumer had died")
        await service.has(*range(20))
        assert service.got == list(range(20))


async def test_what_cannot_be_delayed_at_the_server_waits_here(server: RabbitServer) -> None:
    queue = RabbitQueue(unique())
    service = Service(server, queue, ack_policy=AckPolicy.NACK_ON_ERROR, retry=Retry(delay=0.3))
    failed: list[float] = []

    async def work(body: int) -> None:
        if len(failed) < 2:
            failed.append(time.monotonic())
            raise ValueError("again")

    service.work = work  # type: ignore[method-assign]
    # Somebody else's queue has the name, with other settings.
    arguments = {"x-message-ttl": 1}
    name = f"{queue.name}.retry.512ms"
    await Foreign(server.url).do(lambda c: c.queue_declare(name, durable=True, arguments=arguments))
    async with service:
        await service.send(1)
        await service.has(1)
        assert failed[1] - failed[0] >= 0.3
