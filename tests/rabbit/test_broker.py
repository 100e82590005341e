"""Queues, exchanges, publishing, requests and streams on a real server."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from typing import Annotated, Any

import pika
import pytest

from millstream import AckPolicy, Context, Path, Retry
from millstream.errors import (
    CapabilityError,
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishError,
    PublishTimeout,
    RejectMessage,
    SetupError,
)
from millstream.rabbit import (
    Channel,
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitMessage,
    RabbitQueue,
    RabbitResponse,
    RabbitRoute,
    RabbitRouter,
    RabbitStreamMessage,
    TestRabbitBroker,
    Unroutable,
)
from millstream.rabbit import RabbitPublisher as RoutePublisher
from millstream.rabbit.annotations import Channel as ChannelOf
from millstream.rabbit.annotations import Connection
from tests.helpers import eventually, unique
from tests.rabbit.helpers import Foreign


@pytest.fixture
def url(rabbit: Any) -> str:
    return str(rabbit.url)


# Interoperation


async def test_a_foreign_program_reads_what_we_publish(url: str) -> None:
    queue, foreign = unique(), Foreign(url)
    async with RabbitBroker(url, app_id="shop") as broker:
        await broker.declare_queue(queue)
        await broker.publish(
            {"id": 7},
            queue,
            headers={"tenant": "acme"},
            correlation_id="c-1",
            message_type="order",
            priority=3,
            expiration=60,
            timestamp=1_700_000_000,
        )
        await broker.publish("text", queue, persist=False)
        _, properties, body = await foreign.get(queue)
        assert body == b'{"id":7}'
        assert properties.headers["tenant"] == "acme"
        assert (properties.correlation_id, properties.type) == ("c-1", "order")
        assert (properties.priority, properties.expiration) == (3, "60000")
        assert (properties.delivery_mode, properties.app_id) == (2, "shop")
        assert properties.timestamp == 1_700_000_000
        assert properties.message_id
        _, properties, body = await foreign.get(queue)
        assert (body, properties.content_type) == (b"text", "text/plain")
        assert properties.delivery_mode == 1


async def test_we_read_what_a_foreign_program_publishes(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def handler(body: dict[str, int], message: RabbitMessage) -> None:
        got.append((body, message))

    await broker.start()
    try:
        properties = pika.BasicProperties(
            headers={"n": 5, "b": b"bytes", "list": [1], "t": "text", "yes": True},
            message_id="m-1",
            correlation_id="c-1",
            content_type="application/json",
            priority=2,
            timestamp=1_700_000_000,
        )
        await Foreign(url).do(lambda c: c.basic_publish("", queue, b'{"a":1}', properties))
        await eventually(lambda: got)
        [(body, message)] = got
        assert body == {"a": 1}
        known = {"n": "5", "b": "bytes", "t": "text", "yes": "True"}
        assert {k: message.headers[k] for k in known} == known
        assert "list" not in message.headers
        assert (message.message_id, message.correlation_id) == ("m-1", "c-1")
        assert (message.priority, message.delivery_count) == (2, 1)
        assert (message.destination, message.exchange, message.queue) == (queue, "", queue)
        assert message.timestamp is not None and message.timestamp.year == 2023
    finally:
        await broker.stop()


async def test_bodies_of_every_size_arrive_whole(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def handler(body: bytes) -> None:
        got.append(body)

    # Around nothing, what is read at once, and what the server takes in one frame (128 KiB).
    sizes = [0, 1, 4095, 4096, *range(65_300, 65_600, 37), *range(131_050, 131_090), 999_999]
    bodies = [random.randbytes(size) for size in sizes]
    await broker.start()
    try:
        await asyncio.gather(*(broker.publish(body, queue) for body in bodies))
        await eventually(lambda: len(got) == len(bodies), 20)
        assert got == bodies
        foreign = Foreign(url)
        await broker.declare_queue(f"{queue}.foreign")
        await broker.publish(bodies[-1], f"{queue}.foreign")
        assert (await foreign.get(f"{queue}.foreign") or [b""])[-1] == bodies[-1]
    finally:
        await broker.stop()


async def test_a_foreign_requester_gets_our_answer_and_we_a_foreign_one(url: str) -> None:
    queue, foreign = unique(), Foreign(url)
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def double(body: int) -> int:
        return body * 2

    def ask(channel: Any) -> Any:
        answers: list[Any] = []
        reply_to = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_consume(reply_to, lambda *a: answers.append(a), auto_ack=True)
        properties = pika.BasicProperties(reply_to=reply_to, correlation_id="q-1")
        channel.basic_publish("", queue, b"21", properties)
        end = time.monotonic() + 5
        while not answers and time.monotonic() < end:
            channel.connection.process_data_events(0.1)
        _, _, properties, body = answers[0]
        return body, properties.correlation_id

    def answer(channel: Any) -> None:
        for method, properties, body in channel.consume(f"{queue}.foreign", inactivity_timeout=5):
            known = pika.BasicProperties(correlation_id=properties.correlation_id)
            channel.basic_publish("", properties.reply_to, b'{"said":"' + body + b'"}', known)
            channel.basic_ack(method.delivery_tag)
            return

    await broker.start()
    try:
        assert await foreign.do(ask) == (b"42", "q-1")
        await broker.declare_queue(f"{queue}.foreign")
        answering = asyncio.create_task(foreign.do(answer))
        reply = await broker.request("x", f"{queue}.foreign", response_model=dict[str, str])
        assert reply == {"said": "x"}
        await answering
    finally:
        await broker.stop()


async def test_an_answer_to_nobody_is_no_failure(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def double(body: int) -> int:
        got.append(body)
        return body * 2

    await broker.start()
    try:
        await broker.publish(1, queue, reply_to="a-queue-that-is-gone")
        await broker.publish(2, queue, reply_to="amq.rabbitmq.reply-to.gone.x")
        await eventually(lambda: len(got) == 2)
        await asyncio.sleep(0.3)
        health = broker.health()["subscriptions"][0]
        assert (health["handled"], health["failed"]) == (2, 0)
    finally:
        await broker.stop()


# Exchanges and bindings


async def test_a_topic_exchange_with_placeholders_and_wildcards(url: str) -> None:
    name, got = unique(), []
    broker = RabbitBroker(url)
    exchange = RabbitExchange(name, ExchangeType.TOPIC)

    @broker.subscriber(RabbitQueue(f"{name}.a", routing_key="orders.{region}.new"), exchange)
    async def one(body: str, region: Annotated[str, Path()]) -> None:
        got.append(("one", body, region))

    @broker.subscriber(RabbitQueue(f"{name}.b", routing_key="#.new"), exchange)
    async def two(body: str, message: RabbitMessage) -> None:
        got.append(("two", body, message.destination))

    await broker.start()
    try:
        await broker.publish("a", "orders.eu.new", exchange)
        await broker.publish("b", routing_key="new", exchange=name)
        await broker.publish("c", "orders.eu.old", name)  # nobody wants it, which is no error
        with pytest.raises(Unroutable, match="old"):
            await broker.publish("d", "orders.eu.old", name, mandatory=True)
        await eventually(lambda: len(got) == 3)
        assert sorted(got) == [
            ("one", "a", "eu"),
            ("two", "a", "orders.eu.new"),
            ("two", "b", "new"),
        ]
    finally:
        await broker.stop()


async def test_a_retry_keeps_the_routing_key_and_the_exchange(url: str) -> None:
    name, got = unique(), []
    broker = RabbitBroker(url)
    exchange = RabbitExchange(name, ExchangeType.TOPIC)
    queue = RabbitQueue(f"{name}.q", routing_key="orders.{region}")

    @broker.subscriber(queue, exchange, retry=Retry(attempts=3, delay=0.05))
    async def handler(body: str, region: str, message: RabbitMessage) -> None:
        got.append((region, message.exchange, message.attempt, message.correlation_id))
        raise ValueError("again")

    await broker.start()
    try:
        await broker.publish("a", "orders.eu", exchange, correlation_id="c")
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
        assert got == [("eu", name, n, "c") for n in (1, 2, 3)]
        [letter] = [x async for x in broker.driver.letters(f"{name}.q.dlq").read()]
        assert letter.origin == "orders.eu"
    finally:
        await broker.stop()


async def test_headers_fanout_and_exchanges_bound_to_each_other(url: str) -> None:
    name, got = unique(), []
    broker = RabbitBroker(url)
    source = RabbitExchange(f"{name}.source", ExchangeType.FANOUT)
    bound = RabbitExchange(f"{name}.bound", ExchangeType.HEADERS, bind_to=source)

    @broker.subscriber(
        RabbitQueue(f"{name}.q", bind_arguments={"kind": "x", "x-match": "all"}), bound
    )
    async def handler(body: int) -> None:
        got.append(body)

    @broker.subscriber(f"{name}.all", source)
    async def everything(body: int) -> None:
        got.append(-body)

    await broker.start()
    try:
        await broker.publish(1, exchange=source, headers={"kind": "x"})
        await broker.publish(2, exchange=source, headers={"kind": "y"})
        await eventually(lambda: len(got) == 3)
        assert sorted(got) == [-2, -1, 1]
    finally:
        await broker.stop()


@pytest.mark.parametrize("real", [True, False])
async def test_headers_are_matched_in_every_way(url: str, real: bool) -> None:
    broker, name = RabbitBroker(url), unique()
    exchange = RabbitExchange(name, ExchangeType.HEADERS)
    got: set[str] = set()

    def subscribe(kind: str, arguments: dict[str, Any]) -> None:
        @broker.subscriber(RabbitQueue(f"{name}.{kind}", bind_arguments=arguments), exchange)
        async def handler(body: str) -> None:
            got.add(kind)

    subscribe("all", {"x-match": "all", "a": "1", "b": "2"})
    subscribe("any", {"x-match": "any", "a": "1", "b": "2"})
    subscribe("any-x", {"x-match": "any-with-x", "x-a": "1", "b": "2"})
    subscribe("all-x", {"x-match": "all-with-x", "x-a": "1", "b": "2"})
    subscribe("there", {"a": None})
    subscribe("number", {"a": 1})
    async with TestRabbitBroker(broker, with_real=real):
        for headers, queues in [
            ({"a": "1"}, {"any", "there"}),
            ({"a": "1", "b": "2"}, {"all", "any", "any-x", "there"}),
            ({"x-a": "1"}, {"any-x"}),
            ({"x-a": "1", "b": "2"}, {"all-x", "any", "any-x"}),
            ({"a": 1}, {"number", "there"}),
        ]:
            got.clear()
            await broker.publish("x", exchange=exchange, headers=headers)  # type: ignore[arg-type]
            await eventually(lambda queues=queues: got == queues)


async def test_a_publisher_declares_its_exchange_and_its_queue(url: str) -> None:
    name = unique()
    broker = RabbitBroker(url)
    to_queue = broker.publisher(RabbitQueue(f"{name}.q"), persist=True)
    to_exchange = broker.publisher(f"{name}.key", RabbitExchange(f"{name}.x"))
    await broker.start()
    try:
        await to_queue.publish(1)
        assert await Foreign(url).depth(f"{name}.q") == 1
        await to_exchange.publish(2)
        with pytest.raises(PublishError, match="there is no exchange"):
            await broker.publish(3, "key", f"{name}.nowhere")
        await to_queue.publish(4)  # the error cost others nothing
    finally:
        await broker.stop()


async def test_a_deleted_exchange_is_declared_again(url: str) -> None:
    name = unique()
    broker = RabbitBroker(url)
    publisher = broker.publisher("key", RabbitExchange(name))
    await broker.start()
    try:
        await publisher.publish(1)
        await Foreign(url).do(lambda c: c.exchange_delete(name))
        await publisher.publish(2)
        await Foreign(url).do(lambda c: c.exchange_declare(name, passive=True))
    finally:
        await broker.stop()


async def test_default_exchange_and_default_channel(url: str) -> None:
    name, got = unique(), []
    broker = RabbitBroker(
        url,
        default_exchange=RabbitExchange(name, ExchangeType.TOPIC),
        default_channel=Channel(prefetch_count=7),
    )

    @broker.subscriber(f"{name}.orders.{{region}}")
    @broker.publisher(f"{name}.done")
    async def handler(body: int, region: str) -> int:
        got.append((body, region))
        return body

    @broker.subscriber(f"{name}.done")
    async def done(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish(1, f"{name}.orders.eu")
        await eventually(lambda: len(got) == 2)
        assert got == [(1, "eu"), 1]
        assert {flow.window for flow in broker.driver.flows} == {7}
    finally:
        await broker.stop()


# Queues


@pytest.mark.parametrize("kind", [QueueType.CLASSIC, QueueType.QUORUM])
async def test_a_queue_that_is_there_is_taken_as_it_is(url: str, kind: QueueType) -> None:
    queue, got = unique(), []
    arguments = {"x-queue-type": kind.value, "x-max-length": 100}
    await Foreign(url).do(lambda c: c.queue_declare(queue, durable=True, arguments=arguments))
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish(1, queue)
        await eventually(lambda: got)
    finally:
        await broker.stop()


async def test_other_settings_are_an_error_that_says_what_to_do(url: str) -> None:
    queue = unique()
    await Foreign(url).do(lambda c: c.queue_declare(queue, durable=True))
    broker = RabbitBroker(url)

    @broker.subscriber(RabbitQueue(queue, QueueType.QUORUM))
    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match="inequivalent arg") as caught:
        await broker.start()
    assert "declare=False" in (caught.value.fix or "")


async def test_a_queue_that_must_exist(url: str) -> None:
    broker = RabbitBroker(url)

    @broker.subscriber(RabbitQueue(unique(), declare=False))
    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match="there is no queue"):
        await broker.start()


async def test_exclusive_and_auto_delete_queues_end_with_their_reader(url: str) -> None:
    first, second, foreign, got = unique(), unique(), Foreign(url), []
    broker = RabbitBroker(url)

    @broker.subscriber(RabbitQueue(first, exclusive=True))
    @broker.subscriber(RabbitQueue(second, auto_delete=True, durable=False))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, first)
    await broker.publish(2, second)
    await eventually(lambda: len(got) == 2)
    await broker.stop()
    await asyncio.sleep(0.1)
    assert not await foreign.exists(first) and not await foreign.exists(second)


async def test_priorities_come_first(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)
    subscriber = broker.subscriber(
        RabbitQueue(queue, arguments={"x-max-priority": 5}), persistent=False
    )

    @subscriber
    async def handler(body: int) -> None:
        got.append(body)

    async with broker:
        await broker.start()
        await broker.driver.declare([subscriber.spec])
        for n in range(3):
            await broker.publish(n, queue, priority=n)
        await subscriber.start()
        await eventually(lambda: len(got) == 3)
        assert got == [2, 1, 0]


async def test_a_message_expires(url: str) -> None:
    queue = unique()
    async with RabbitBroker(url) as broker:
        await broker.declare_queue(queue)
        await broker.publish(1, queue, expiration=0.05)
        await broker.publish(2, queue)
        await asyncio.sleep(0.2)
        found = await Foreign(url).get(queue)
        assert found is not None and found[2] == b"2"


async def test_delayed_retries_leave_a_bounded_number_of_queues(rabbit: Any, url: str) -> None:
    queue, foreign = unique(), Foreign(url)
    times: list[float] = []
    broker = RabbitBroker(url)
    delays = [0.05, 0.06, 0.3, 0.45, 0.5]

    @broker.subscriber(queue, retry=Retry(attempts=6, delay=lambda attempt: delays[attempt - 1]))
    async def handler(body: int, message: RabbitMessage) -> None:
        times.append(time.monotonic())
        if message.attempt < 6:
            raise ValueError("again")

    await broker.start()
    try:
        await broker.publish(1, queue)
        await eventually(lambda: len(times) == 6)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert all(gap >= delay for gap, delay in zip(gaps, delays, strict=True)), gaps
        assert all(gap < delay + 0.5 for gap, delay in zip(gaps, delays, strict=True)), gaps
        steps = [f"{queue}.retry.{n}ms" for n in (32, 64, 128, 256, 512)]
        assert [await foreign.exists(name) for name in steps] == [False, True, False, False, True]
    finally:
        await broker.stop()


async def test_a_rejected_message_goes_to_the_queues_own_dead_letter_exchange(url: str) -> None:
    queue, foreign = unique(), Foreign(url)
    broker = RabbitBroker(url)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue}.dead"}

    @broker.subscriber(
        RabbitQueue(queue, arguments=arguments), ack_policy=AckPolicy.REJECT_ON_ERROR
    )
    async def handler(body: int) -> None:
        raise ValueError("no")

    await broker.start()
    try:
        await broker.declare_queue(f"{queue}.dead")
        await broker.publish(1, queue)
        await eventually(lambda: foreign.depth(f"{queue}.dead"), every=0.1)
        [letter] = [x async for x in broker.driver.letters(f"{queue}.dead").read()]
        assert letter.message.body == b"1" and letter.failed_at.year > 2000
    finally:
        await broker.stop()


# Publishing


async def test_a_message_to_no_queue_is_an_error(url: str) -> None:
    async with RabbitBroker(url) as broker:
        with pytest.raises(Unroutable, match="there is no queue 'nowhere'") as caught:
            await broker.publish(1, "nowhere")
        assert isinstance(caught.value, PublishError) and isinstance(caught.value, NoResponders)
        await broker.publish(1, "nowhere", mandatory=False)


async def test_many_confirmations_are_under_way_at_once(url: str) -> None:
    queue = unique()
    async with RabbitBroker(url) as broker:
        await broker.declare_queue(queue)
        results = await broker.publish_batch(*range(3000), queue=queue)
        assert len(results) == 3000
        assert await Foreign(url).depth(queue) == 3000


async def test_one_bad_message_among_many_fails_alone(url: str) -> None:
    queue = unique()
    async with RabbitBroker(url) as broker:
        await broker.declare_queue(queue)
        bodies = [b"x" * 2_000_000 if n == 50 else b"small" for n in range(100)]
        found = await asyncio.gather(
            *(broker.publish(body, queue) for body in bodies), return_exceptions=True
        )
        failed = [n for n, result in enumerate(found) if result is not None]
        assert failed == [50] and isinstance(found[50], MessageTooLarge)
        assert await Foreign(url).depth(queue) >= 99
        with pytest.raises(MessageTooLarge, match="1,000,000"):  # without asking the server
            await broker.publish(bodies[50], queue)


async def test_a_full_queue_refuses(url: str) -> None:
    queue = RabbitQueue(unique(), arguments={"x-max-length": 2, "x-overflow": "reject-publish"})
    async with RabbitBroker(url) as broker:
        await broker.declare_queue(queue)
        with pytest.raises(PublishError, match="full"):
            for n in range(50):
                await broker.publish(n, queue)


async def test_a_wrong_expiration_or_user_is_an_error_of_that_message(url: str) -> None:
    queue = unique()
    async with RabbitBroker(url) as broker:
        await broker.declare_queue(queue)
        with pytest.raises(PublishError, match="user_id"):
            await broker.publish(1, queue, user_id="somebody-else")
        await broker.publish(2, queue, user_id="guest")


@pytest.mark.parametrize("real", [True, False])
async def test_what_cannot_be_written_is_an_error_of_that_message(url: str, real: bool) -> None:
    async with TestRabbitBroker(RabbitBroker(url), with_real=real) as broker:
        queue = await broker.declare_queue(unique())
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"headers": {"score": 1.5}}, "of the type float; write it as text"),
            ({"headers": {1: "x"}}, "cannot be written"),
            ({"routing_key": "x" * 300}, "more than 255 bytes"),
            ({"correlation_id": "x" * 300}, "more than 255 bytes"),
            ({"priority": 300}, "cannot be written"),
            ({"expiration": "soon"}, "expiration='soon'"),
            ({"timestamp": "now"}, "timestamp='now'"),
            ({"immediate": True}, "expiration=0"),
        ]
        for options, text in wrong:
            with pytest.raises(PublishError, match=text):
                await broker.publish(1, queue, **options)
            with pytest.raises(PublishError, match=text):
                await broker.request(1, queue, timeout=1, **options)
        await broker.publish("still here", queue)
        assert not real or await Foreign(url).depth(queue.name) == 1


async def test_messages_are_written_to_disk_and_requests_are_not(url: str) -> None:
    broker, queue = RabbitBroker(url), unique()

    @broker.subscriber(queue)
    async def handler(body: int, message: RabbitMessage) -> int:
        seen.append(message.raw.properties.delivery_mode)
        return body

    seen: list[int] = []
    publisher = broker.publisher(queue)
    async with broker:
        await broker.start()
        await broker.publish(1, queue)
        await publisher.publish(1)
        await broker.request(1, queue)
        await publisher.request(1)
        await broker.request(1, queue, persist=True)
        await broker.publish(1, queue, persist=False)
        await eventually(lambda: seen == [2, 2, 1, 1, 2, 1])


async def test_what_the_server_refuses_ends_the_start_at_once(url: str) -> None:
    delayed = RabbitExchange(unique(), ExchangeType.X_DELAYED_MESSAGE)
    for options, text, fix in [
        ({"exchange": delayed}, "unknown exchange type", "plugin"),
        ({"consume_args": {"x-priority": "high"}}, "refuses the consumer of .*x-priority", None),
    ]:
        broker = RabbitBroker(url, startup_timeout=60)

        @broker.subscriber(unique(), **options)
        async def handler(body: int) -> None: ...

        async with asyncio.timeout(10):
            with pytest.raises(SetupError, match=text) as caught:
                await broker.start()
        assert fix is None or fix in (caught.value.fix or "")
        await broker.stop()


@pytest.mark.parametrize("real", [True, False])
async def test_messages_settled_with_the_options_of_other_clients(url: str, real: bool) -> None:
    broker, queue = RabbitBroker(url), unique()
    seen: list[tuple[str, int]] = []
    errors: list[Exception] = []

    @broker.subscriber(queue, ack_policy=AckPolicy.MANUAL)
    async def handler(body: str, message: RabbitMessage) -> None:
        seen.append((body, message.delivery_count))
        if message.delivery_count > 1:
            await message.ack()
        elif body == "again":
            await message.reject(requeue=True)
        elif body == "gone":
            await message.nack(requeue=False)
        elif body == "raised":
            raise RejectMessage(requeue=True)
        else:
            with pytest.raises(CapabilityError, match="settle each") as caught:
                await message.ack(multiple=True)
            errors.append(caught.value)
            await message.ack(multiple=False)

    async with TestRabbitBroker(broker, with_real=real):
        for body in ("again", "gone", "raised", "all"):
            await broker.publish(body, queue)
        await eventually(lambda: len(seen) == 6)
        await eventually(lambda: len(errors) == 1)
    assert sorted(seen) == [
        *(("again", 1), ("again", 2), ("all", 1), ("gone", 1), ("raised", 1), ("raised", 2)),
    ]
    if real:
        assert await Foreign(url).depth(queue) == 0


async def test_a_response_with_options_and_a_publisher_of_a_route(url: str) -> None:
    name, foreign = unique(), Foreign(url)

    async def handler(body: int) -> RabbitResponse:
        return RabbitResponse(body + 1, priority=4, message_type="sum", headers={"a": "b"})

    router = RabbitRouter(
        prefix=f"{name}.",
        handlers=[RabbitRoute(handler, "in", publishers=(RoutePublisher("out"),))],
    )
    broker = RabbitBroker(url, routers=[router])
    await broker.start()
    try:
        await broker.publish(1, f"{name}.in")
        await eventually(lambda: foreign.depth(f"{name}.out"), every=0.1)
        _, properties, body = await foreign.get(f"{name}.out")
        assert (body, properties.priority, properties.type) == (b"2", 4, "sum")
        assert properties.headers["a"] == "b"
    finally:
        await broker.stop()


@pytest.mark.parametrize("real", [True, False])
async def test_an_answer_takes_the_options_of_its_response_but_its_address(
    url: str, real: bool
) -> None:
    name, published = unique(), list[Any]()
    broker = RabbitBroker(url)
    elsewhere = RabbitExchange(f"{name}-x", ExchangeType.FANOUT)

    @broker.subscriber(name)
    @broker.publisher(f"{name}-out")
    async def handler(body: int) -> RabbitResponse:
        return RabbitResponse(
            body + 1,
            headers={"a": "b"},
            exchange=elsewhere,
            queue="nowhere",
            routing_key="no.where",
            mandatory=True,
            priority=4,
            expiration=30,
            persist=False,
            message_type="sum",
        )

    @broker.subscriber(f"{name}-taken", elsewhere)
    async def taken(body: int, message: RabbitMessage) -> None:
        published.append((body, message.destination, _options(message)))

    async with TestRabbitBroker(broker, with_real=real):
        answer = await broker.request(1, name, timeout=5)
        assert await answer.decode() == 2
        assert _options(answer) == ("b", 4, "30000", 1, "sum")
        await eventually(lambda: published)
    assert published == [(2, "no.where", ("b", 4, "30000", 1, "sum"))]


def _options(message: Any) -> Any:
    found = message.raw.properties
    return (
        message.headers["a"],
        *(found.priority, found.expiration, found.delivery_mode, found.type),
    )


async def test_the_clients_own_objects_are_at_hand(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def handler(
        body: int, channel: ChannelOf, connection: Connection, spec: Any = Context("message.link")
    ) -> None:
        got.append((channel.is_open, connection.is_open))

    with pytest.raises(NotConnected):
        _ = broker.connection
    await broker.start()
    try:
        await broker.publish(1, queue)
        await eventually(lambda: got)
        assert got == [(True, True)]
    finally:
        await broker.stop()


async def test_the_lag_is_told(url: str) -> None:
    queue, gate = unique(), asyncio.Event()
    broker = RabbitBroker(url)

    @broker.subscriber(queue, channel=Channel(prefetch_count=1))
    async def handler(body: int) -> None:
        await gate.wait()

    await broker.start()
    try:
        for n in range(10):
            await broker.publish(n, queue)
        [subscription] = broker.subscriptions

        async def nine() -> bool:
            await subscription.ask_lag()
            return subscription.lag == 9

        await eventually(nine, every=0.1)
        gate.set()
    finally:
        await broker.stop()


async def test_what_is_sent_ahead_follows_the_handlers_speed(url: str) -> None:
    queue, done = unique(), 0
    broker = RabbitBroker(url)
    subscriber = broker.subscriber(queue, persistent=False)
    slow = False

    @subscriber
    async def handler(body: int) -> None:
        nonlocal done
        if slow:
            await asyncio.sleep(0.05)
        done += 1

    await broker.start()
    try:
        await broker.driver.declare([subscriber.spec])
        await broker.publish_batch(*range(5000), queue=queue)
        await subscriber.start()
        await eventually(lambda: done == 5000, 20)
        [flow] = broker.driver.flows
        assert flow.window == 256
        assert await Foreign(url).depth(queue) == 0
    finally:
        await broker.stop()


async def test_nothing_is_sent_back_while_what_is_sent_ahead_changes(url: str) -> None:
    queue, got, again = unique(), 0, []
    broker = RabbitBroker(url)

    @broker.subscriber(queue, concurrency=16)
    async def handler(body: int, message: RabbitMessage) -> None:
        nonlocal got
        got += 1
        if message.raw.method.redelivered:
            again.append(body)
        if body < 11:  # what the first consumer left is no part of what the others may have
            await asyncio.sleep(1.5)
        elif body % 500 < 50:
            await asyncio.sleep(0.01)

    await broker.connect()
    try:
        await broker.declare_queue(queue)
        await broker.publish_batch(*range(6000), queue=queue)
        await broker.start()
        await eventually(lambda: got >= 6000, 30)
        assert again == []
    finally:
        await broker.stop()


async def test_order_is_kept_while_what_is_sent_ahead_changes(url: str) -> None:
    queue, got = unique(), []
    broker = RabbitBroker(url)

    @broker.subscriber(queue)
    async def handler(body: int) -> None:
        got.append(body)
        if body % 700 == 0:
            await asyncio.sleep(0.3)  # the speed changes now and then

    await broker.start()
    try:
        for start in range(0, 3000, 500):
            await broker.publish_batch(*range(start, start + 500), queue=queue)
        await eventually(lambda: len(got) >= 3000, 20)
        assert got == list(range(3000))
    finally:
        await broker.stop()


# Streams


async def test_a_stream_is_read_from_an_offset_and_keeps_everything(url: str) -> None:
    stream, got = RabbitQueue(unique(), QueueType.STREAM), []
    broker = RabbitBroker(url)

    def reader(offset: Any, name: str) -> Any:
        subscriber = broker.subscriber(
            stream, consume_args={"x-stream-offset": offset}, persistent=False
        )

        @subscriber
        async def handler(body: int, message: RabbitStreamMessage) -> None:
            got.append((name, body, message.offset))

        return subscriber

    first, third, again = reader("first", "first"), reader(2, "third"), reader("first", "again")
    await broker.start()
    try:
        await broker.declare_queue(stream)
        for n in range(5):
            await broker.publish(n, stream)
        await first.start()
        await third.start()
        await eventually(lambda: len(got) == 8)
        assert sorted(got) == [
            *(("first", n, n) for n in range(5)),
            *(("third", n, n) for n in range(2, 5)),
        ]
        await again.start()
        await eventually(lambda: len(got) == 13)
    finally:
        await broker.stop()


def test_declarations_that_cannot_be() -> None:
    broker, stream = RabbitBroker(), RabbitQueue("log", QueueType.STREAM)
    made: list[tuple[Callable[[], Any], str]] = [
        (lambda: RabbitQueue("q", QueueType.QUORUM, exclusive=True), "durable and shared"),
        (lambda: RabbitQueue("x" * 300), "255 bytes"),
        (lambda: RabbitQueue("q", durable="no"), "durable='no' is not bool"),  # type: ignore[arg-type]
        (lambda: RabbitQueue("q", "nope"), "queue_type='nope' is not QueueType"),  # type: ignore[arg-type]
        (lambda: RabbitQueue("q", arguments={"x-queue-type": "nope"}), "x-queue-type='nope'"),
        (lambda: RabbitQueue("q", arguments={"x": 1.5}), "cannot be written"),
        (
            lambda: RabbitQueue("q", QueueType.QUORUM, arguments={"x-queue-type": "classic"}),
            "'classic' by x-queue-type",
        ),
        (lambda: RabbitExchange("e" * 300), "255 bytes"),
        (lambda: RabbitExchange("e", "nope"), "type='nope' is not ExchangeType"),  # type: ignore[arg-type]
        (lambda: RabbitExchange("e", bind_to="f"), "bind_to='f' is not RabbitExchange"),  # type: ignore[arg-type]
        (lambda: Channel(prefetch_count=0), "prefetch_count=0"),
        (lambda: Channel(prefetch_count=70_000), "prefetch_count=70000"),
        (lambda: broker.subscriber(3), "queue=3 is int, not str"),  # type: ignore[arg-type]
        (lambda: broker.subscriber("q", 3), "exchange=3 is int"),  # type: ignore[arg-type]
        (lambda: broker.publisher("q", expiration="soon"), "expiration='soon'"),  # type: ignore[arg-type]
        (lambda: RabbitBroker(heartbeat=-1), "heartbeat must"),
        (lambda: RabbitBroker(timeout=-1), "socket_timeout must"),
        (lambda: RabbitBroker(on_close=print), "not Sequence"),  # type: ignore[arg-type]
        (lambda: RabbitBroker(default_channel=5), "not Channel"),  # type: ignore[arg-type]
        (lambda: RabbitBroker(security="guest"), "not BaseSecurity"),  # type: ignore[arg-type]
    ]
    for make, text in made:
        with pytest.raises(SetupError, match=text):
            make()
    assert RabbitExchange("e", "topic").type is ExchangeType.TOPIC  # type: ignore[arg-type]
    assert RabbitBroker(port="5673").driver.addresses[0].port == 5673  # type: ignore[arg-type]
    for options, text in [
        ({"queue": ""}, "without a queue"),
        ({"queue": "x" * 300}, "255 bytes"),
        ({"queue": "amq.mine"}, "belong to the server"),
        ({"queue": "q", "consume_args": {"x-stream-offset": 1}}, "is no stream"),
        ({"queue": stream, "consume_args": {"x-stream-offset": "soon"}}, "x-stream-offset='soon'"),
    ]:
        subscriber = broker.subscriber(**options)

        @subscriber
        async def handler(body: int) -> None: ...

        with pytest.raises(SetupError, match=text):
            broker.compile()
        broker.subscribers.clear()
    for options, text in [
        ({}, "without a queue or an exchange"),
        ({"queue": "q", "priority": 300}, "priority=300"),
        ({"queue": "q", "immediate": True}, "expiration=0"),
        ({"exchange": "e", "routing_key": "x" * 300}, "255 bytes"),
    ]:
        broker.publisher(**options)
        with pytest.raises(SetupError, match=text):
            broker.compile()
        broker.publishers.clear()
    with pytest.raises(SetupError, match="not a server's address"):
        RabbitBroker("http://localhost")
    with pytest.raises(SetupError, match="no option"):
        RabbitBroker(urll="x")  # type: ignore[call-arg]


async def test_a_publication_waits_no_longer_than_asked(rabbit: Any) -> None:
    broker = RabbitBroker(str(rabbit.url), publish_timeout=0.3)
    async with broker:
        await broker.declare_queue(name := unique())
        broker.driver.outbox._block("low on memory")  # as the server says it
        begin = time.monotonic()
        with pytest.raises(PublishTimeout, match="low on memory"):
            await broker.publish(1, name)
        assert 0.25 < time.monotonic() - begin < 1.5
        waiting = asyncio.create_task(broker.publish(2, name, timeout=3))
        await asyncio.sleep(0.05)
        broker.driver.outbox._block("")
        await waiting
