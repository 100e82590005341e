"""The NATS broker as its users meet it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from nats.js.errors import NotFoundError

import millstream.nats
from millstream import Context, Path, Retry, Router
from millstream.errors import (
    ConnectError,
    NotConnected,
    RemoteError,
    SetupError,
    SetupErrors,
    SkipMessage,
    StopConsume,
)
from millstream.nats import (
    ConsumerConfig,
    JStream,
    NatsBatchMessage,
    NatsBroker,
    NatsKvMessage,
    NatsMessage,
    NatsPublisher,
    NatsResponse,
    NatsRoute,
    NatsRouter,
    PubAck,
    PullSub,
    Schedule,
    annotations,
)
from millstream.retry import Exponential
from tests.helpers import eventually, unique
from tests.servers import free_port


class Order(msgspec.Struct):
    id: int


FAST = Retry(attempts=2, delay=Exponential(0.05, cap=0.1))


@pytest.fixture
def broker(nats):
    return NatsBroker(nats.url, request_timeout=2, graceful_timeout=3)


async def test_core_in_and_out(broker):
    name, seen = unique(), []

    @broker.subscriber(f"{name}.{{region}}", queue="q")
    @broker.publisher(f"{name}-out")
    async def handle(order: Order, region: str = Path()) -> dict[str, Any]:
        return {"order": order.id, "region": region}

    @broker.subscriber(f"{name}-out")
    async def out(body: dict[str, Any], message: NatsMessage) -> None:
        seen.append((body, message.correlation_id))

    await broker.start()
    assert await broker.publish(Order(1), f"{name}.eu", correlation_id="c") is None
    await eventually(lambda: seen == [({"order": 1, "region": "eu"}, "c")])
    await broker.stop()


async def test_requests(broker):
    name = unique()

    @broker.subscriber(name)
    async def handle(order: Order) -> Order:
        if order.id < 0:
            raise ValueError("negative")
        return Order(order.id + 1)

    async with broker:
        await broker.start()
        assert await broker.request(Order(1), name, response_model=Order) == Order(2)
        reply = await broker.request(Order(1), name)
        assert isinstance(reply, NatsMessage) and await reply.decode() == {"id": 2}
        with pytest.raises(RemoteError, match="negative"):
            await broker.request(Order(-1), name)


async def test_a_stream_with_retry_and_dead_letter(broker):
    name, attempts, dead = unique(), [], []

    @broker.subscriber(name, stream=name, durable="d", retry=FAST)
    async def handle(order: Order) -> None:
        attempts.append(order.id)
        if order.id == 2:
            raise ValueError("no")

    @broker.subscriber(f"{name}.dlq", stream=f"{name}_dlq", durable="d")
    async def buried(body: bytes, message: NatsMessage) -> None:
        dead.append((body, message.headers["ms-error-type"], message.headers["ms-attempts"]))

    await broker.start()
    acks = [await broker.publish(Order(i), name, stream=name) for i in (1, 2)]
    assert [type(ack) for ack in acks] == [PubAck, PubAck]
    await broker.publish(b"{", name, stream=name)
    await eventually(lambda: len(dead) == 2)
    assert {(body, kind) for body, kind, _ in dead} == {
        (b'{"id":2}', "ValueError"),
        (b"{", "DecodeError"),
    }
    assert attempts.count(2) == 2
    await broker.stop()


async def test_only_what_began_and_never_ended_is_taken_for_a_message_that_kills(nats):
    name = unique()
    config = ConsumerConfig(durable_name="d", metadata={"team": "orders"}, ack_wait=0.3)
    runs: list[int] = []

    def service() -> NatsBroker:
        broker = NatsBroker(nats.url)

        @broker.subscriber(name, stream=name, config=config, retry=Retry(attempts=2))
        async def handle(order: Order, message: NatsMessage) -> None:
            runs.append(message.delivery_count)
            if order.id == 2:
                raise SkipMessage  # never settled: for the server the same as a process that died

        return broker

    async with NatsBroker(nats.url) as broker:
        await broker.js.add_stream(name=name, subjects=[name])
        await broker.publish(Order(1), name, stream=name)
        other = await broker.js.pull_subscribe(name, "d", name, config=config)
        for _ in range(3):  # fetched and handed back, as by processes that stop
            [message] = await other.fetch(1)
            await message.nak()
        await other.unsubscribe()
        first = service()
        await first.start()
        await eventually(lambda: runs == [4])
        await broker.publish(Order(2), name, stream=name)
        await eventually(lambda: runs == [4, 1, 2])
        await first.stop()
        second = service()
        await second.start()

        async def letters() -> Any:
            with suppress(NotFoundError):
                return await broker.js.get_last_msg(f"{name}_dlq", f"{name}.dlq")

        letter = await eventually(letters)
        assert runs == [4, 1, 2]
        assert letter.headers["ms-error-type"] == "CrashedWorker"
        info = await broker.js.consumer_info(name, "d")
        assert info.config.metadata["team"] == "orders"
        await second.stop()


async def test_lists(broker):
    name, got = unique(), []

    @broker.subscriber(
        name, stream=name, durable="d", pull_sub=PullSub(10, timeout=0.3, batch=True)
    )
    async def handle(orders: list[Order], message: NatsBatchMessage) -> None:
        got.append(([order.id for order in orders], len(message.messages)))

    await broker.start()
    await asyncio.gather(*(broker.publish(Order(i), name, stream=name) for i in range(25)))
    await eventually(lambda: sum(size for _, size in got) == 25)
    assert max(size for _, size in got) <= 10 and len(got) <= 10
    assert (await broker.js.consumer_info(name, "d")).num_ack_pending == 0
    await broker.stop()


async def test_many_at_once(broker):
    name, running, most = unique(), 0, 0

    @broker.subscriber(name, stream=name, durable="d", concurrency=5)
    async def handle(order: Order) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    await broker.start()
    await asyncio.gather(*(broker.publish(Order(i), name, stream=name) for i in range(20)))
    await eventually(lambda: most == 5)
    await broker.stop()


async def test_a_publisher_with_a_stream(broker):
    name = unique()
    publisher = broker.publisher(f"{name}.a", stream=JStream(name), headers={"x": "1"})
    await broker.start()
    ack = await publisher.publish(Order(1), message_id="1")
    again = await publisher.publish(Order(1), message_id="1")
    assert (ack.stream, ack.seq, again.duplicate) == (name, 1, True)
    message = await broker.js.get_last_msg(name, f"{name}.a")
    assert message.headers["x"] == "1"
    await broker.stop()


async def test_a_response_with_nats_options(broker):
    name, got = unique(), []
    stream = JStream(name, subjects=[f"{name}.>"], allow_msg_schedules=True)

    @broker.subscriber(name + "-in")
    @broker.publisher(f"{name}.timer", stream=stream)
    async def later(order: Order) -> NatsResponse:
        at = datetime.now(UTC) + timedelta(seconds=0.5)
        schedule = Schedule(at, f"{name}.due")
        return NatsResponse(order, headers={"h": "1"}, message_id="once", schedule=schedule)

    @broker.subscriber(f"{name}.due", stream=stream, durable="d")
    async def due(order: Order, message: NatsMessage) -> None:
        got.append((order.id, message.headers["h"]))

    await broker.start()
    for _ in range(2):
        await broker.publish(Order(5), name + "-in")
    await eventually(lambda: got)
    await asyncio.sleep(0.2)
    assert got == [(5, "1")]
    await broker.stop()


async def test_an_answer_is_stored_by_no_stream_whatever_its_response_says(broker):
    name = unique()
    stream = JStream(name, subjects=[f"{name}.>"], allow_msg_schedules=True)

    @broker.subscriber(name + "-in")
    @broker.publisher(f"{name}.timer", stream=stream)
    async def later(order: Order) -> NatsResponse:
        schedule = Schedule(datetime.now(UTC) + timedelta(hours=1), f"{name}.due")
        return NatsResponse(
            order, headers={"h": "1"}, stream=name, message_id="once", schedule=schedule
        )

    await broker.start()
    answer = await broker.request(Order(5), name + "-in", timeout=2)
    assert (await answer.decode(), answer.headers["h"]) == ({"id": 5}, "1")
    assert not any(header.startswith("Nats-") for header in answer.headers)
    stored = await broker.js.get_last_msg(name, f"{name}.timer")
    assert stored.headers["Nats-Msg-Id"] == "once"
    await broker.stop()


async def test_watching_stores(broker):
    bucket, files, got = unique(), unique(), []

    @broker.subscriber("cfg.{key}", kv_watch=bucket)
    async def changed(value: str, message: NatsKvMessage, key: str = Path()) -> None:
        got.append((key, value, message.operation))

    @broker.subscriber(files, obj_watch=True)
    async def uploaded(name: str, storage: annotations.ObjectStorage) -> None:
        got.append((name, (await storage.get(name)).data))

    await broker.start()
    kv = await broker.key_value(bucket)
    await kv.put("cfg.a", b"on")
    await (await broker.object_storage(files)).put("f.txt", b"data")
    with pytest.raises(SetupError, match=r"has no option 'histroy'[^$]*did you mean 'history'"):
        await broker.key_value(bucket, histroy=5)
    await eventually(lambda: len(got) == 2)
    assert set(got) == {("a", "on", None), ("f.txt", b"data")}
    await broker.stop()


async def test_annotations(broker):
    name, got = unique(), []

    @broker.subscriber(name)
    async def handle(
        body: str,
        message: annotations.NatsMessage,
        own: annotations.NatsBroker,
        client: annotations.Client,
        js: annotations.JsClient,
        logger: annotations.Logger,
        context: annotations.ContextRepo,
        subject: str = Context("message.destination"),
    ) -> None:
        got.append((body, message.body, own, client, js, context, subject))
        logger.debug("seen")

    await broker.start()
    await broker.publish("x", name)
    await eventually(lambda: got)
    assert got == [("x", b"x", broker, broker.connection, broker.js, broker.context, name)]
    assert broker.new_inbox().startswith("_INBOX.")
    await broker.stop()


async def test_routers_and_routes(nats):
    name, got = unique(), []

    async def handle(order: Order) -> Order:
        got.append(order.id)
        return order

    async def back(order: Order) -> None:
        got.append(-order.id)

    router = NatsRouter(
        prefix=f"{name}.",
        handlers=[
            NatsRoute(handle, "in", publishers=[NatsPublisher("out")], queue="q"),
            NatsRoute(back, "out"),
        ],
    )

    @router.subscriber("stored", stream=name, durable="d")
    async def stored(order: Order) -> None:
        got.append(order.id * 10)

    broker = NatsBroker(nats.url, routers=[router])
    await broker.start()
    await broker.publish(Order(1), f"{name}.in")
    await broker.publish(Order(2), f"{name}.stored", stream=name)
    await eventually(lambda: set(got) == {1, -1, 20})
    with pytest.raises(SetupError):
        broker.include_router(Router())
    await broker.stop()


async def test_every_wrong_declaration_is_named_at_once(nats):
    broker = NatsBroker(nats.url)

    @broker.subscriber("a", durable="d")
    async def first() -> None: ...

    @broker.subscriber("a", stream="S", push=True, pull_sub=True)
    async def second() -> None: ...

    with pytest.raises(SetupErrors) as caught:
        broker.compile()
    text = str(caught.value)
    assert "first" in text and "second" in text and "stream=" in text and "test_broker.py" in text


async def test_stopping_hands_back_what_was_not_begun(nats, caplog):
    name, started, release = unique(), asyncio.Event(), asyncio.Event()
    caplog.set_level(logging.INFO)
    broker = NatsBroker(nats.url, graceful_timeout=5)

    @broker.subscriber(name, stream=name, durable="d", pull_sub=PullSub(10))
    async def handle(order: Order) -> None:
        started.set()
        await release.wait()

    await broker.start()
    await asyncio.gather(*(broker.publish(Order(i), name, stream=name) for i in range(5)))
    await started.wait()
    await eventually(lambda: broker.subscriptions[0]._intake.waiting)
    stopping = asyncio.create_task(broker.stop())
    await asyncio.sleep(0.1)
    release.set()
    await stopping
    assert "finished 1, returned 4" in caplog.text

    second = NatsBroker(nats.url)
    got = []

    @second.subscriber(name, stream=name, durable="d")
    async def rest(order: Order) -> None:
        got.append(order.id)

    await second.start()
    await eventually(lambda: len(got) == 4)
    await second.stop()


async def test_stop_consume_and_reading_by_hand(broker):
    name, got = unique(), []

    @broker.subscriber(name, stream=name, durable="d")
    async def once(order: Order) -> None:
        got.append(order.id)
        raise StopConsume

    reader = broker.subscriber(name, stream=name, durable="reader")
    await broker.start()
    for i in range(3):
        await broker.publish(Order(i), name, stream=name)
    await eventually(lambda: got)
    message = await reader.get_one(timeout=3)
    assert message is not None and message.body == b'{"id":0}'
    await message.ack()
    await asyncio.sleep(0.1)
    assert got == [0]
    await broker.stop()


async def test_settling_by_hand(broker):
    name, got = unique(), []

    @broker.subscriber(name, stream=name, durable="d")
    async def handle(order: Order, message: NatsMessage) -> None:
        got.append(message.delivery_count)
        await message.in_progress()
        if message.delivery_count == 1:
            await message.nack(delay=0.05)
        else:
            assert await message.ack_sync(timeout=2)

    await broker.start()
    await broker.publish(Order(1), name, stream=name)
    await eventually(lambda: got == [1, 2])

    async def settled():
        return (await broker.js.consumer_info(name, "d")).num_ack_pending == 0

    await eventually(settled)
    await broker.stop()


async def test_a_restart_of_the_server(nats_server, caplog):
    caplog.set_level(logging.INFO)
    broker = NatsBroker(nats_server.url.replace("//", "//user:s3cret@"), reconnect_time_wait=0.2)
    got: list[int] = []

    @broker.subscriber("s", stream="S", durable="d")
    async def handle(order: Order) -> None:
        got.append(order.id)

    await broker.start()
    await broker.publish(Order(1), "s", stream="S")
    nats_server.restart()
    await eventually(lambda: "connected again" in caplog.text)
    await broker.publish(Order(2), "s", stream="S", timeout=10)
    await eventually(lambda: {1, 2} <= set(got))
    await broker.stop()
    assert "s3cret" not in caplog.text and "user" not in caplog.text


async def test_an_unreachable_server(caplog):
    url = f"nats://user:s3cret@127.0.0.1:{free_port()}"
    broker = NatsBroker(url, startup_timeout=0.7)
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1"):
        await broker.start()
    assert "next try" in caplog.text and "s3cret" not in caplog.text
    with pytest.raises(NotConnected):
        await broker.publish("x", "y")
    with pytest.raises(NotConnected):
        broker.connection.is_connected  # noqa: B018


def test_a_wrong_option_and_a_wrong_address():
    with pytest.raises(SetupError, match="no option 'no_such_option'"):
        NatsBroker("nats://h", no_such_option=1)  # type: ignore[call-arg]
    with pytest.raises(SetupError, match="not a server's address"):
        NatsBroker("http://h")


def test_public_names():
    for name in millstream.nats.__all__:
        assert getattr(millstream.nats, name) is not None
    with pytest.raises(AttributeError):
        millstream.nats.nothing  # noqa: B018
