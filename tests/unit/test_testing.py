"""Test brokers: the real plans in memory, waiting publishers, recorders, moved time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
import pytest

from millstream import Context, Depends, Logger, Message, Millstream, Response, Retry
from millstream.ack import AckPolicy
from millstream.clock import VirtualClock
from millstream.driver import Batch
from millstream.errors import (
    CapabilityError,
    DecodeError,
    NackMessage,
    PublishError,
    RemoteError,
    RequestTimeout,
    SetupError,
    StateError,
)
from millstream.memory import MemoryBroker, MemoryRouter
from millstream.nats import ConsumerConfig, DeliverPolicy, JStream, KvWatch, NatsBroker, NatsMessage
from millstream.nats.testing import TestNatsBroker
from millstream.testing import TestApp, TestBroker
from tests.helpers import unique
from tests.servers import NatsServer


class Order(msgspec.Struct):
    id: int
    amount: float = 0.0


NOWHERE = "nats://127.0.0.1:1"


@pytest.fixture
def broker() -> NatsBroker:
    return NatsBroker(NOWHERE)


# Publishing waits for what it causes


async def test_publish_returns_when_everything_it_caused_is_done(broker: NatsBroker) -> None:
    done: list[str] = []

    @broker.subscriber("first")
    @broker.publisher("second")
    async def first(body: str) -> str:
        await asyncio.sleep(0.01)
        done.append("first")
        return body

    @broker.subscriber("second", concurrency=3)
    def second(body: str) -> None:
        time.sleep(0.01)
        done.append("second")

    async with TestNatsBroker(broker) as br:
        assert br is broker
        await br.publish("x", "first")
        assert done == ["first", "second"]


async def test_the_first_error_of_a_handler_reaches_the_publisher(broker: NatsBroker) -> None:
    @broker.subscriber("start")
    @broker.publisher("next")
    async def start(body: str) -> str:
        return body

    @broker.subscriber("next")
    async def fails(body: str) -> None:
        raise LookupError("deep inside")

    async with TestNatsBroker(broker) as br:
        with pytest.raises(LookupError, match="deep inside"):
            await br.publish("x", "start")


async def test_a_body_of_the_wrong_type_reaches_the_publisher(broker: NatsBroker) -> None:
    @broker.subscriber("orders")
    async def handler(order: Order) -> None: ...

    async with TestNatsBroker(broker) as br:
        with pytest.raises(DecodeError, match=r"\$\.id"):
            await br.publish({"id": "one"}, "orders")
        assert not handler.mock.called


async def test_publishers_at_once_get_their_own_errors(broker: NatsBroker) -> None:
    @broker.subscriber("work", concurrency=4)
    async def work(body: int) -> None:
        await asyncio.sleep(0.005)
        if body % 2:
            raise ValueError(body)

    async with TestNatsBroker(broker) as br:
        results = await asyncio.gather(
            *(br.publish(i, "work") for i in range(6)), return_exceptions=True
        )
        assert [str(r) if r else None for r in results] == [None, "1", None, "3", None, "5"]


async def test_a_handler_may_publish_to_itself(broker: NatsBroker) -> None:
    got: list[int] = []

    @broker.subscriber("countdown")
    async def countdown(body: int) -> None:
        got.append(body)
        if body:
            await broker.publish(body - 1, "countdown")

    async with TestNatsBroker(broker) as br:
        await br.publish(3, "countdown")
        assert got == [3, 2, 1, 0]


async def test_without_waiting_errors_stay_where_they_are(broker: NatsBroker) -> None:
    @broker.subscriber("work")
    async def work(body: int) -> None:
        raise ValueError(body)

    async with TestNatsBroker(broker, wait=False) as br:
        await br.publish(1, "work")
        await work.wait_call(timeout=5.0)


async def test_a_request_is_answered_by_the_handler(broker: NatsBroker) -> None:
    @broker.subscriber("double")
    async def double(body: int) -> int:
        return body * 2

    @broker.subscriber("nested")
    async def nested(body: int) -> int:
        return int(await broker.request(body, "double", response_model=int)) + 1

    @broker.subscriber("fails")
    async def fails(body: int) -> int:
        raise LookupError("no such order")

    async with TestNatsBroker(broker) as br:
        assert await br.request(4, "double", response_model=int) == 8
        assert await br.request(4, "nested", response_model=int) == 9
        with pytest.raises(RemoteError, match="no such order"):
            await br.request(4, "fails")


async def test_a_request_that_nobody_answers_fails_without_waiting(broker: NatsBroker) -> None:
    @broker.subscriber("silent", no_reply=True)
    async def silent(body: int) -> int:
        return body

    begin = time.monotonic()
    async with TestNatsBroker(broker) as br:
        with pytest.raises(RequestTimeout, match="silent"):
            await br.request(4, "silent", timeout=30.0)
    assert time.monotonic() - begin < 5.0


# Time


async def test_a_retry_waits_for_the_clock(broker: NatsBroker) -> None:
    attempts: list[int] = []

    @broker.subscriber("orders", stream="ORDERS", durable="d", retry=Retry(delay=10.0))
    async def handler(body: int, message: NatsMessage) -> None:
        attempts.append(message.delivery_count)
        if len(attempts) < 3:
            raise ValueError("not yet")

    test = TestNatsBroker(broker)
    async with test as br:
        with pytest.raises(ValueError, match="not yet"):
            await br.publish(1, "orders")
        await test.clock.advance(9.0)
        assert attempts == [1]
        await test.clock.advance(1.0)
        assert attempts == [1, 2]
        await test.clock.advance(10.0)
        assert attempts == [1, 2, 3]
        await test.clock.advance(600.0)
        assert attempts == [1, 2, 3]
        assert len(handler.mock.mock_calls) == 3


async def test_a_handler_in_a_thread_is_done_when_the_clock_was_moved(broker: NatsBroker) -> None:
    done: list[int] = []

    @broker.subscriber("orders", stream="ORDERS", durable="d")
    def handler(body: int, message: NatsMessage) -> None:
        time.sleep(0.02)
        done.append(message.delivery_count)
        if message.delivery_count == 1:
            raise NackMessage(delay=5.0)

    test = TestNatsBroker(broker)
    async with test as br:
        await br.publish(1, "orders")
        await test.clock.advance(5.0)
        assert done == [1, 2]


async def test_a_retry_in_the_lane_waits_for_the_clock(broker: NatsBroker) -> None:
    attempts: list[int] = []

    @broker.subscriber("orders", retry=Retry(delay=10.0, where="lane"))
    async def handler(body: int) -> None:
        attempts.append(body)
        if len(attempts) < 2:
            raise ValueError("not yet")

    test = TestNatsBroker(broker)
    async with test as br:
        await br.publish(1, "orders")
        await br.publish(2, "orders")
        assert attempts == [1]
        await test.clock.advance(10.0)
        assert attempts == [1, 1, 2]


async def test_a_batch_that_is_not_full_waits_for_the_clock(broker: NatsBroker) -> None:
    got: list[list[int]] = []

    @broker.subscriber("numbers", batch=Batch(size=3, wait=60.0))
    async def handler(numbers: list[int]) -> None:
        got.append(numbers)

    clock = VirtualClock()
    async with TestNatsBroker(broker, clock=clock) as br:
        for i in range(4):
            await br.publish(i, "numbers")
        assert got == [[0, 1, 2]]
        await clock.advance(60.0)
        assert got == [[0, 1, 2], [3]]
        handler.assert_called_with([3])


async def test_an_unsettled_message_comes_again_after_its_deadline(broker: NatsBroker) -> None:
    config = ConsumerConfig(ack_wait=60.0, max_deliver=2)

    @broker.subscriber(
        "orders", stream="ORDERS", durable="d", config=config, ack_policy=AckPolicy.MANUAL
    )
    async def handler(body: int, message: NatsMessage) -> None: ...

    test = TestNatsBroker(broker)
    async with test as br:
        await br.publish(1, "orders")
        await test.clock.advance(59.0)
        assert handler.mock.call_count == 1
        await test.clock.advance(2.0)
        assert handler.mock.call_count == 2
        await test.clock.advance(600.0)
        assert handler.mock.call_count == 2


async def test_a_handler_that_never_ends_does_not_hold_the_test_up(broker: NatsBroker) -> None:
    begun = asyncio.Event()

    @broker.subscriber("stuck")
    async def stuck(body: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    begin = time.monotonic()
    async with TestNatsBroker(broker) as br:
        publishing = asyncio.create_task(br.publish(1, "stuck"))
        await begun.wait()
        publishing.cancel()
    assert time.monotonic() - begin < 10.0


# Recorders


async def test_mocks_are_called_with_the_decoded_body(broker: NatsBroker) -> None:
    @broker.subscriber("orders.{region}")
    @broker.publisher("invoices")
    async def handler(order: Order, region: str) -> dict[str, Any]:
        return {"order": order.id}

    publisher = broker.publisher("elsewhere")

    async with TestNatsBroker(broker) as br:
        await br.publish(Order(1, 2.5), "orders.eu", headers={"tenant": "acme", "x": "y"})
        handler.mock.assert_called_once_with({"id": 1, "amount": 2.5})
        handler.assert_called_once_with({"id": 1, "amount": 2.5})
        handler.assert_called_once_with(
            Order(1, 2.5), headers={"tenant": "acme"}, path={"region": "eu"}
        )
        handler.publishers[0].mock.assert_called_once_with({"order": 1})
        with pytest.raises(AssertionError, match="was called 0 times"):
            publisher.assert_called_once_with("x")
        await publisher.publish("x", correlation_id="c-1")
        publisher.assert_called_once_with("x", correlation_id="c-1", destination="elsewhere")


async def test_each_call_is_recorded_in_order(broker: NatsBroker) -> None:
    @broker.subscriber("numbers")
    async def handler(body: int) -> None: ...

    async with TestNatsBroker(broker) as br:
        for i in range(3):
            await br.publish(i, "numbers", headers={"n": str(i)})
        handler.assert_any_call(1, headers={"n": "1"})
        handler.assert_called_with(2)
        with pytest.raises(AssertionError, match="was called 3 times"):
            handler.assert_called_once_with(2)
        with pytest.raises(AssertionError, match="the body is 2, not 1"):
            handler.assert_called_with(1)
        with pytest.raises(AssertionError, match=r"headers is .*'2'.*, not .*'0'"):
            handler.assert_called_with(2, headers={"n": "0"})
        with pytest.raises(AssertionError, match="no call of handler had 7"):
            handler.assert_any_call(7)
        with pytest.raises(TypeError, match="'colour' is not recorded"):
            handler.assert_called_with(2, colour="red")
        assert [c.args for c in handler.mock.call_args_list] == [(0,), (1,), (2,)]
        handler.mock.reset_mock()
        await br.publish(9, "numbers")
        handler.assert_called_once_with(9)


async def test_a_response_is_recorded_with_its_headers(broker: NatsBroker) -> None:
    out = broker.publisher("out")

    @out
    @broker.subscriber("in")
    async def handler(body: str) -> Any:
        return Response(body.upper(), headers={"a": "b"})

    async with TestNatsBroker(broker) as br:
        await br.publish("x", "in", correlation_id="c")
        out.assert_called_once_with("X", headers={"a": "b"}, correlation_id="c")


async def test_recorders_exist_only_in_a_test(broker: NatsBroker) -> None:
    @broker.subscriber("numbers")
    async def handler(body: int) -> None: ...

    with pytest.raises(StateError, match="test broker"):
        _ = handler.mock
    async with TestNatsBroker(broker) as br:
        await br.publish(1, "numbers")
        assert handler.mock.called
    with pytest.raises(StateError):
        handler.assert_called_once_with(1)
    async with TestNatsBroker(broker) as br:
        assert not handler.mock.called


async def test_waiting_for_a_call(broker: NatsBroker) -> None:
    @broker.subscriber("numbers")
    async def handler(body: int) -> None: ...

    async with TestNatsBroker(broker) as br:
        waiting = asyncio.create_task(handler.wait_call(timeout=5.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await br.publish(1, "numbers")
        await waiting
        await handler.wait_call()
        handler.mock.reset_mock()
        with pytest.raises(TimeoutError):
            await handler.wait_call(timeout=0.01)


async def test_a_late_subscriber_is_recorded_too(broker: NatsBroker) -> None:
    async with TestNatsBroker(broker) as br:
        late = br.subscriber("late")

        @late
        async def handler(body: int) -> None: ...

        await late.start()
        await br.publish(1, "late")
        handler.assert_called_once_with(1)


# Brokers


async def test_members_of_a_queue_share(broker: NatsBroker) -> None:
    @broker.subscriber("work", "workers")
    async def one(body: int) -> None: ...

    @broker.subscriber("work", "workers")
    async def two(body: int) -> None: ...

    async with TestNatsBroker(broker) as br:
        for i in range(4):
            await br.publish(i, "work")
        assert (one.mock.call_count, two.mock.call_count) == (2, 2)


async def test_several_brokers_are_connected_with_each_other() -> None:
    first, second = NatsBroker(NOWHERE), NatsBroker(NOWHERE)

    @first.subscriber("a")
    @second.publisher("b")
    async def bridge(body: int) -> int:
        return body + 1

    @second.subscriber("b")
    async def end(body: int) -> None: ...

    async with TestNatsBroker(first, second) as (one, two):
        assert (one, two) == (first, second)
        await one.publish(1, "a")
        end.assert_called_once_with(2)


async def test_everything_is_put_back(broker: NatsBroker) -> None:
    driver, clock = broker.driver, broker.clock
    async with TestNatsBroker(broker) as br:
        assert br.driver is not driver
    assert (broker.driver, broker.clock) == (driver, clock)
    assert (broker.probe, broker.test_middlewares) == (None, [])


async def test_a_wrong_declaration_fails_and_puts_everything_back(broker: NatsBroker) -> None:
    driver = broker.driver

    @broker.subscriber("orders")
    async def handler(a: bytes, b: bytes) -> None: ...

    with pytest.raises(SetupError, match="body parameter"):
        async with TestNatsBroker(broker):
            pass
    assert broker.driver is driver


async def test_connect_only_leaves_the_start_to_the_test(broker: NatsBroker) -> None:
    @broker.subscriber("numbers")
    async def handler(body: int) -> None: ...

    async with TestNatsBroker(broker, connect_only=True) as br:
        await br.publish(1, "numbers")
        assert not handler.mock.called
        await br.start()
        await br.publish(2, "numbers")
        handler.assert_called_once_with(2)


async def test_mistakes_are_told() -> None:
    with pytest.raises(SetupError, match="without a broker"):
        TestNatsBroker()
    with pytest.raises(SetupError, match="exclude each other"):
        TestNatsBroker(NatsBroker(NOWHERE), with_real=True, clock=VirtualClock())
    with pytest.raises(SetupError, match="brokers of nats"):
        async with TestBroker(NatsBroker(NOWHERE)):
            pass
    with pytest.raises(StateError, match="real time"):
        _ = TestNatsBroker(NatsBroker(NOWHERE), with_real=True).clock
    running = MemoryBroker()
    async with running:
        with pytest.raises(StateError, match="runs already"):
            async with TestBroker(running):
                pass


async def test_the_memory_broker_is_tested_the_same_way() -> None:
    broker = MemoryBroker()
    router = MemoryRouter(prefix="shop.")

    @router.subscriber("orders", durable="orders", retry=Retry(delay=1.0))
    async def handler(body: int, message: Message[Any]) -> None:
        if message.delivery_count == 1:
            raise ValueError("first")

    broker.include_router(router)
    test = TestBroker(broker)
    async with test as br:
        with pytest.raises(ValueError, match="first"):
            await br.publish(1, "shop.orders")
        await test.clock.advance(1.0)
        assert handler.mock.call_count == 2


async def test_dependencies_are_overridden(broker: NatsBroker) -> None:
    got: list[str] = []

    def real() -> str:
        return "real"

    @broker.subscriber("numbers")
    async def handler(body: int, value: Annotated[str, Depends(real)], logger: Logger) -> None:
        got.append(value)

    async with TestNatsBroker(broker) as br:
        await br.publish(1, "numbers")
        br.dependency_overrides[real] = lambda: "fake"
        await br.publish(1, "numbers")
        br.dependency_overrides.clear()
        await br.publish(1, "numbers")
        assert got == ["real", "fake", "real"]
        assert handler.mock.call_count == 3


# NATS in memory


async def test_streams_answer_as_the_server_does(broker: NatsBroker) -> None:
    @broker.subscriber("orders.*", stream=JStream("ORDERS", subjects=["orders.>"]), durable="d")
    async def handler(body: int) -> None: ...

    async with TestNatsBroker(broker) as br:
        ack = await br.publish(1, "orders.eu", stream="ORDERS", message_id="m-1")
        assert (ack.stream, ack.seq, ack.duplicate) == ("ORDERS", 1, False)
        again = await br.publish(1, "orders.eu", stream="ORDERS", message_id="m-1")
        assert (again.seq, again.duplicate) == (1, True)
        assert handler.mock.call_count == 1
        with pytest.raises(PublishError, match="no stream stores 'other'"):
            await br.publish(1, "other", stream="ORDERS")
        with pytest.raises(PublishError, match="another stream"):
            await br.publish(1, "orders.eu", stream="OTHERS")


async def test_streams_may_not_share_subjects(broker: NatsBroker) -> None:
    @broker.subscriber("orders.*", stream="ONE", durable="d")
    async def one(body: int) -> None: ...

    @broker.subscriber("orders.eu", stream="TWO", durable="d")
    async def two(body: int) -> None: ...

    with pytest.raises(SetupError, match="belongs to stream 'ONE'"):
        async with TestNatsBroker(broker):
            pass


async def test_a_late_consumer_reads_the_stream_from_where_it_asks(broker: NatsBroker) -> None:
    stream = JStream("ORDERS", subjects=["orders.>"])
    publisher = broker.publisher("orders.new", stream=stream)
    async with TestNatsBroker(broker) as br:
        for subject in ("orders.a", "orders.b", "orders.a"):
            await br.publish(1, subject)
        await publisher.publish(2)
        counts = {}
        for policy in (
            DeliverPolicy.ALL,
            DeliverPolicy.LAST,
            DeliverPolicy.LAST_PER_SUBJECT,
            DeliverPolicy.NEW,
        ):
            late = br.subscriber(stream="ORDERS", deliver_policy=policy)

            @late
            async def handler(body: int) -> None: ...

            await late.start()
            await br.publish(3, "orders.c")
            counts[policy] = handler.mock.call_count
            await late.stop()
        assert list(counts.values()) == [5, 2, 5, 1]


async def test_an_ordered_consumer_is_not_acknowledged(broker: NatsBroker) -> None:
    @broker.subscriber("orders", stream="ORDERS", ordered_consumer=True)
    async def handler(body: int, message: NatsMessage) -> None:
        assert message.sequence  # type: ignore[attr-defined]

    test = TestNatsBroker(broker)
    async with test as br:
        await br.publish(1, "orders")
        await test.clock.advance(600.0)
        handler.assert_called_once_with(1)


async def test_raw_messages_look_like_those_of_the_client(broker: NatsBroker) -> None:
    raws: list[Any] = []

    @broker.subscriber("orders", stream="ORDERS", durable="reader")
    async def stored(body: int, message: NatsMessage) -> None:
        raws.append(message.raw_message)
        assert message.timestamp is not None

    @broker.subscriber("orders")
    async def core(body: int, message: NatsMessage) -> None:
        raws.append(message.raw_message)

    async with TestNatsBroker(broker) as br:
        await br.publish(1, "orders", headers={"a": "b"})
        stored_raw = next(r for r in raws if r.reply)
        assert stored_raw.metadata.stream == "ORDERS"
        assert stored_raw.metadata.consumer == "reader"
        assert stored_raw.metadata.num_delivered == 1
        for raw in raws:
            assert (raw.subject, raw.data, raw.headers["a"]) == ("orders", b"1", "b")


async def test_dead_letters_are_stored_and_can_be_read(broker: NatsBroker) -> None:
    @broker.subscriber("orders", stream="ORDERS", durable="d")
    async def handler(order: Order) -> None: ...

    @broker.subscriber("ORDERS.dlq")
    async def dead(body: bytes, message: NatsMessage) -> None: ...

    async with TestNatsBroker(broker) as br:
        with pytest.raises(DecodeError):
            await br.publish(b'{"id": []}', "orders")
        dead.assert_called_once_with({"id": []}, headers={"ms-error-type": "DecodeError"})
        [record] = br.driver.bus.records("ORDERS.dlq")  # type: ignore[attr-defined]
        assert record.body == b'{"id": []}'


async def test_a_key_value_bucket_is_watched(broker: NatsBroker) -> None:
    changes: list[tuple[str, bytes, str | None]] = []

    @broker.subscriber("*", kv_watch=KvWatch("settings"))
    async def handler(body: bytes, message: Any = Context("message")) -> None:
        changes.append((message.destination, message.body, message.operation))

    async with TestNatsBroker(broker) as br:
        bucket = await br.key_value("settings")
        first = await bucket.put("colour", b"red")
        assert changes == [("colour", b"red", None)]
        assert (await bucket.get("colour")).value == b"red"
        await bucket.update("colour", b"blue", last=first)
        await bucket.create("size", b"1")
        assert sorted(await bucket.keys()) == ["colour", "size"]
        await bucket.delete("colour")
        assert changes[-1] == ("colour", b"", "DEL")
        assert await bucket.keys() == ["size"]
        from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError

        with pytest.raises(KeyNotFoundError):
            await bucket.get("colour")
        with pytest.raises(KeyWrongLastSequenceError):
            await bucket.update("size", b"2", last=99)
        with pytest.raises(KeyWrongLastSequenceError):
            await bucket.create("size", b"2")
        with pytest.raises(CapabilityError, match="with_real=True"):
            await bucket.history("size")  # type: ignore[attr-defined]


async def test_what_needs_a_server_says_so(broker: NatsBroker) -> None:
    async with TestNatsBroker(broker) as br:
        with pytest.raises(CapabilityError, match="with_real=True"):
            await br.object_storage("files")
        with pytest.raises(CapabilityError, match="with_real=True"):
            _ = br.connection
        with pytest.raises(CapabilityError, match="with_real=True"):
            _ = br.js
    watching = NatsBroker(NOWHERE)

    @watching.subscriber("files", obj_watch=True)
    async def handler(name: str) -> None: ...

    with pytest.raises(CapabilityError, match="obj_watch"):
        async with TestNatsBroker(watching):
            pass


async def test_the_same_test_runs_on_a_real_server(nats: NatsServer) -> None:
    broker = NatsBroker(nats.url)
    subject = unique()
    out = broker.publisher(f"{subject}.out")

    @broker.subscriber(subject)
    @out
    async def handler(body: int) -> int:
        return body + 1

    async with TestNatsBroker(broker, with_real=True) as br:
        await br.publish(1, subject, headers={"a": "b"})
        await handler.wait_call(timeout=5.0)
        handler.assert_called_once_with(1, headers={"a": "b"})
        await out.wait_call(timeout=5.0)
        out.assert_called_once_with(2)


# Applications


async def test_an_application_runs_its_lifespan_and_hooks(broker: NatsBroker) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Millstream, env: str = "none") -> AsyncIterator[None]:
        order.append(f"enter {env}")
        broker.context.set_global("setting", env)
        yield
        order.append("exit")

    app = Millstream(broker, lifespan=lifespan)

    @app.after_startup
    async def started() -> None:
        order.append("started")
        await broker.publish(1, "numbers")

    @app.on_shutdown
    async def stopping() -> None:
        order.append("stopping")

    @broker.subscriber("numbers")
    async def handler(body: int, setting: Annotated[str, Context()]) -> None:
        order.append(f"handled {setting}")

    async with TestNatsBroker(broker), TestApp(app, run_extra_options={"env": "test"}) as running:
        assert running is app
        handler.assert_called_once_with(1)
    assert order == ["enter test", "started", "handled test", "stopping", "exit"]
