"""JetStream: the pull engine, consumers, settlement, push and ordered reading."""

from __future__ import annotations

import asyncio
import time

import pytest
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from millstream.ack import Settlement
from millstream.errors import SetupError
from millstream.message import Link
from millstream.nats import JStream, NatsBroker, PullSub
from millstream.nats.consumer import durable_name
from millstream.nats.message import NatsStreamMessage
from millstream.nats.options import NatsSubscription
from tests.helpers import eventually, unique


async def fill(bench, subject, number, start=0):
    await asyncio.gather(
        *(bench.publish(subject, b"%d" % i, stream=subject) for i in range(start, start + number))
    )


async def info(bench, stream, consumer):
    return await bench.driver.js.consumer_info(stream, consumer)


async def settled(bench, stream, consumer):
    """Wait until the server has nothing left for a consumer."""

    async def done():
        state = await info(bench, stream, consumer)
        return state.num_pending == 0 and state.num_ack_pending == 0

    await eventually(done)


async def test_everything_arrives_once_and_in_order(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, durable="d")
    await fill(bench, name, 1000)
    await taken.count(1000)
    assert sorted(taken.bodies, key=int) == [b"%d" % i for i in range(1000)]
    sequences = [int(raw.reply.split(".")[-4]) for raw in taken.raws]
    assert sequences == list(range(1, 1001))
    await settled(bench, name, "d")


async def test_a_slow_handler_hoards_nothing(bench):
    name, gate = unique(), asyncio.Event()
    taken = await bench.subscribe(name, stream=name, durable="d", work=lambda raw: gate.wait())
    await fill(bench, name, 50)
    await taken.count(1)
    await bench.driver.ping(1)
    assert (await info(bench, name, "d")).num_ack_pending <= 3
    gate.set()
    await taken.count(50)


async def test_a_fast_handler_gets_more_at_once(bench):
    name = unique()
    await bench.subscribe(name, stream=name, durable="other")
    await fill(bench, name, 3000)
    taken = await bench.subscribe(name, stream=name, durable="d")
    await taken.count(3000, 20)
    assert taken.intake.window.target > 16


async def test_batch_size_is_what_may_wait_here(bench):
    name, gate = unique(), asyncio.Event()
    taken = await bench.subscribe(
        name, stream=name, durable="d", pull_sub=PullSub(10), work=lambda raw: gate.wait()
    )
    await fill(bench, name, 50)
    await taken.count(1)
    await eventually(lambda: len(taken.intake.waiting) >= 9)
    await bench.driver.ping(1)
    assert (await info(bench, name, "d")).num_ack_pending <= 11
    gate.set()
    await taken.count(50)


async def test_fetching_ahead_goes_on_after_an_unfinished_message(bench):
    name = unique()
    options = {"stream": name, "durable": "d", "config": ConsumerConfig(ack_wait=1)}
    dead = await bench.subscribe(name, settle=None, pull_sub=PullSub(batch_size=1), **options)
    await fill(bench, name, 1)
    await dead.count(1)
    await dead.intake.close()  # as a process that died: nothing is handed back
    taken = await bench.subscribe(name, **options)
    total = 1
    while not any(raw.metadata.sequence.stream == 1 for raw in taken.raws[-1000:]):
        await fill(bench, name, 500)  # what is fetched ahead is many when the one comes again
        total += 500
        assert total < 100_000
    await fill(bench, name, 500)
    numbers = range(1, total + 501)
    await eventually(lambda: {r.metadata.sequence.stream for r in taken.raws} == set(numbers))


async def test_max_ack_pending_is_respected(bench):
    name = unique()
    config = ConsumerConfig(max_ack_pending=1, ack_wait=30)
    taken = await bench.subscribe(name, stream=name, durable="d", config=config)
    await fill(bench, name, 20)
    await taken.count(20)


async def test_processes_share_a_durable(bench):
    name = unique()

    async def work(raw):
        await asyncio.sleep(0.005)

    first = await bench.subscribe(name, stream=name, durable="d", work=work)
    second = await bench.subscribe(name, stream=name, durable="d", work=work)
    await fill(bench, name, 100)
    await eventually(lambda: len(first.raws) + len(second.raws) >= 100)
    assert len(first.raws) > 10 and len(second.raws) > 10
    await settled(bench, name, "d")
    assert len(first.raws) + len(second.raws) == 100


async def test_nack_comes_again_and_with_a_delay_later(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, durable="d", settle=None)
    await fill(bench, name, 1)
    (raw,) = await taken.count(1)
    await taken.intake.settle(raw, Settlement.NACK, None)
    _, raw = await taken.count(2)
    started = time.monotonic()
    await taken.intake.settle(raw, Settlement.NACK, 0.3)
    raw = (await taken.count(3))[2]
    assert time.monotonic() - started >= 0.29
    message = NatsStreamMessage(raw, Link(bench.driver, taken.intake.spec))
    message.link.intake = taken.intake
    assert (message.delivery_count, message.sequence) == (3, 1)
    assert message.timestamp is not None and message.reply_to == ""
    assert await message.ack_sync()
    assert (await info(bench, name, "d")).num_ack_pending == 0


async def test_reject_is_final(bench):
    name = unique()
    config = ConsumerConfig(ack_wait=0.3)
    taken = await bench.subscribe(
        name, stream=name, durable="d", config=config, settle=Settlement.REJECT
    )
    await fill(bench, name, 1)
    await taken.count(1)
    await settled(bench, name, "d")


async def test_touch_pushes_the_deadline_back(bench):
    name = unique()
    config = ConsumerConfig(ack_wait=0.5)
    taken = await bench.subscribe(name, stream=name, durable="d", config=config, settle=None)
    await fill(bench, name, 1)
    (raw,) = await taken.count(1)
    for _ in range(8):
        await asyncio.sleep(0.15)
        await taken.intake.touch(raw)
    assert len(taken.raws) == 1
    await taken.count(2)  # without it, it comes again


async def test_what_waits_here_does_not_time_out(bench):
    name, gate = unique(), asyncio.Event()
    config = ConsumerConfig(ack_wait=0.4)

    async def work(raw):
        while not gate.is_set():
            await asyncio.sleep(0.1)
            await taken.intake.touch(raw)

    taken = await bench.subscribe(
        name, stream=name, durable="d", config=config, pull_sub=PullSub(10), work=work
    )
    await fill(bench, name, 5)
    await taken.count(1)
    await asyncio.sleep(1.0)
    gate.set()
    await taken.count(5)
    await settled(bench, name, "d")
    assert len(taken.raws) == 5


async def test_pause_hands_back_what_was_not_begun(bench):
    name, gate = unique(), asyncio.Event()
    taken = await bench.subscribe(
        name, stream=name, durable="d", pull_sub=PullSub(10), work=lambda raw: gate.wait()
    )
    await fill(bench, name, 20)
    await taken.count(1)
    await eventually(lambda: len(taken.intake.waiting) >= 9)
    assert await taken.intake.pause() >= 9
    gate.set()
    started = time.monotonic()
    other = await bench.subscribe(name, stream=name, durable="d")
    await other.count(19)
    assert time.monotonic() - started < 3  # long before the ack deadline of 30 s
    await settled(bench, name, "d")
    assert len(taken.raws) == 1
    await taken.intake.close()


async def test_reading_goes_on_where_it_stopped(bench):
    name = unique()
    first = await bench.subscribe(name, stream=name, durable="d")
    await fill(bench, name, 5)
    await first.count(5)
    await settled(bench, name, "d")
    await first.intake.close()
    second = await bench.subscribe(name, stream=name, durable="d")
    await fill(bench, name, 1, 5)
    assert [raw.data for raw in await second.count(1)] == [b"5"]


async def test_a_queue_names_a_durable_for_each_subject(bench):
    stream, name = unique(), unique()
    stream = JStream(stream, subjects=[f"{name}.>"])
    a1 = await bench.subscribe(f"{name}.a", "workers", stream=stream)
    a2 = await bench.subscribe(f"{name}.a", "workers", stream=stream)
    b = await bench.subscribe(f"{name}.b", "workers", stream=stream)
    for i in range(10):
        await bench.publish(f"{name}.a", b"%d" % i)
    await bench.publish(f"{name}.b", b"b")
    await eventually(lambda: len(a1.raws) + len(a2.raws) == 10 and len(b.raws) == 1)
    assert a1.intake.consumer.name == a2.intake.consumer.name == f"workers-{name}_a"


def test_derived_names_fit_the_server():
    spec = NatsSubscription("a.*.>", "q", stream="S")
    assert durable_name(spec, "limits") == "q-a_any_all"
    long = NatsSubscription("a" * 200, "q", stream="S")
    assert len(durable_name(long, "limits")) <= 64
    assert durable_name(NatsSubscription("a", stream="S"), "limits") is None
    assert durable_name(NatsSubscription("a", stream="S"), "workqueue") == "millstream-a"


async def test_without_a_name_each_reads_everything_and_is_told(bench, caplog):
    name = unique()
    first = await bench.subscribe(name, stream=name)
    await fill(bench, name, 5)
    await first.count(5)
    second = await bench.subscribe(name, stream=name)
    await second.count(5)
    assert "without a durable name" in caplog.text
    stream = first.intake.consumer
    assert (await info(bench, name, stream.name)).config.inactive_threshold == 300
    await bench.driver.close()
    await bench.driver.connect()
    assert await bench.driver.js.consumers_info(name) == []


async def test_a_work_queue_gets_a_name_by_itself(bench):
    name = unique()
    stream = JStream(name, subjects=[name], retention="workqueue")
    first = await bench.subscribe(name, stream=stream)
    second = await bench.subscribe(name, stream=stream)
    for i in range(10):
        await bench.publish(name, b"%d" % i)
    await eventually(lambda: len(first.raws) + len(second.raws) == 10)
    await eventually(lambda: _empty(bench, name))


async def _empty(bench, stream):
    return (await bench.driver.js.stream_info(stream)).state.messages == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [b"0", b"1", b"2", b"3"]),
        ({"deliver_policy": DeliverPolicy.NEW}, [b"3"]),
        ({"deliver_policy": DeliverPolicy.LAST}, [b"2", b"3"]),
        (
            {
                "config": ConsumerConfig(
                    deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=2
                )
            },
            [b"1", b"2", b"3"],
        ),
    ],
)
async def test_where_a_new_consumer_starts(bench, options, expected):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[name])
    for i in range(3):
        await bench.publish(name, b"%d" % i, stream=name)
    taken = await bench.subscribe(name, stream=name, durable="d", **options)
    await bench.publish(name, b"3", stream=name)
    await taken.count(len(expected))
    assert taken.bodies == expected


async def test_every_consumer_setting_reaches_the_server(bench):
    name = unique()
    config = ConsumerConfig(
        description="all of them",
        ack_wait=7,
        max_deliver=9,
        max_ack_pending=50,
        max_waiting=40,
        sample_freq="50%",
        filter_subjects=[f"{name}.a", f"{name}.b"],
        metadata={"team": "x"},
        mem_storage=True,
        inactive_threshold=600,
    )
    taken = await bench.subscribe(
        stream=JStream(name, subjects=[f"{name}.*"]),
        config=config,
        durable="d",
        headers_only=True,
    )
    for token in "abc":
        await bench.publish(f"{name}.{token}", token.encode(), stream=name)
    await taken.count(2)
    assert [raw.subject for raw in taken.raws] == [f"{name}.a", f"{name}.b"]
    assert taken.bodies == [b"", b""] and taken.raws[0].headers["Nats-Msg-Size"] == "1"
    have = (await info(bench, name, "d")).config
    for field in ("description", "ack_wait", "max_deliver", "max_ack_pending", "max_waiting"):
        assert getattr(have, field) == getattr(config, field)
    assert have.metadata["team"] == "x" and have.mem_storage and have.inactive_threshold == 600


async def test_a_consumer_that_is_there_is_updated_not_reset(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[f"{name}.>"])
    await bench.driver.js.add_consumer(
        name, durable_name="d", max_ack_pending=77, ack_wait=9, filter_subject=f"{name}.a"
    )
    config = ConsumerConfig(ack_wait=11)
    await bench.subscribe(f"{name}.b", stream=name, durable="d", config=config)
    have = (await info(bench, name, "d")).config
    assert (have.max_ack_pending, have.ack_wait, have.filter_subject) == (77, 11, f"{name}.b")


async def test_what_the_server_refuses_is_said(bench):
    name = unique()
    config = ConsumerConfig(max_deliver=1, backoff=[1, 2, 3])
    with pytest.raises(SetupError, match=f"consumer 'd' of stream '{name}'") as caught:
        await bench.subscribe(name, stream=name, durable="d", config=config)
    assert caught.value.fix


async def test_a_push_consumer_in_the_way_is_said(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[name])
    await bench.driver.js.add_consumer(name, durable_name="d", deliver_subject=unique())
    with pytest.raises(SetupError, match="push consumer") as caught:
        await bench.subscribe(name, stream=name, durable="d")
    assert "push=True" in caught.value.fix


async def test_no_acknowledgement_asked_for(bench):
    name = unique()
    config = ConsumerConfig(ack_policy=AckPolicy.NONE)
    taken = await bench.subscribe(name, stream=name, durable="d", config=config)
    await fill(bench, name, 20)
    await taken.count(20)
    assert (await info(bench, name, "d")).num_ack_pending == 0
    assert await taken.intake.pause() == 0


async def test_an_inbox_prefix(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, durable="d", inbox_prefix=b"_MINE.")
    assert taken.intake.inbox.startswith("_MINE.")
    await fill(bench, name, 1)
    await taken.count(1)


async def test_push(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, durable="d", push=True)
    await fill(bench, name, 2000)
    await taken.count(2000, 20)
    await settled(bench, name, "d")
    have = (await info(bench, name, "d")).config
    assert have.deliver_subject and have.flow_control and have.idle_heartbeat == 5
    with pytest.raises(SetupError, match="has a reader"):
        await bench.subscribe(name, stream=name, durable="d", push=True)


async def test_push_goes_on_after_a_restart_of_the_reader(bench):
    name = unique()
    first = await bench.subscribe(name, stream=name, durable="d", push=True)
    await fill(bench, name, 5)
    await first.count(5)
    await settled(bench, name, "d")
    await first.intake.close()
    await fill(bench, name, 5, 5)
    second = await bench.subscribe(name, stream=name, durable="d", push=True)
    await second.count(5)
    assert sorted(second.bodies) == [b"5", b"6", b"7", b"8", b"9"]


async def test_push_with_a_queue(bench):
    name = unique()
    first = await bench.subscribe(name, "q", stream=name, push=True)
    second = await bench.subscribe(name, "q", stream=name, push=True)
    await fill(bench, name, 100)
    await eventually(lambda: len(first.raws) + len(second.raws) == 100)
    assert first.raws and second.raws


async def test_push_with_heartbeats_and_limits(bench):
    name = unique()
    taken = await bench.subscribe(
        name, stream=name, push=True, idle_heartbeat=0.2, flow_control=False, max_msgs=3
    )
    heard = taken.intake.heard
    await eventually(lambda: taken.intake.heard > heard)
    await fill(bench, name, 5)
    await taken.count(3)
    await bench.driver.ping(1)
    assert len(taken.raws) == 3


async def test_ordered(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, ordered_consumer=True)
    await fill(bench, name, 300)
    await taken.count(300)
    have = (await info(bench, name, taken.intake.consumer.name)).config
    assert have.ack_policy == AckPolicy.NONE and have.mem_storage
    sequences = [int(raw.reply.split(".")[-4]) for raw in taken.raws]
    assert sequences == list(range(1, 301))


async def test_ordered_reads_a_gap_again(bench):
    name = unique()
    taken = await bench.subscribe(name, stream=name, ordered_consumer=True)
    await fill(bench, name, 10)
    await taken.count(10)
    taken.intake._expected += 1  # as if one message had been lost on its way
    await fill(bench, name, 10, 10)
    await taken.count(20)
    sequences = [int(raw.reply.split(".")[-4]) for raw in taken.raws]
    assert sequences == list(range(1, 21))


async def test_limits_that_the_server_sets_for_requests(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[name])
    config = {"durable_name": "d", "name": "d", "ack_policy": "explicit", "max_batch": 2}
    config |= {"max_expires": 1_000_000_000, "max_waiting": 1}
    request = {"stream_name": name, "config": config}
    await bench.driver.outbox.api(f"CONSUMER.CREATE.{name}.d", request)
    taken = await bench.subscribe(name, stream=name, durable="d", pull_sub=PullSub(10))
    assert (taken.intake.consumer.max_batch, taken.intake.consumer.expires) == (2, 1.0)
    await fill(bench, name, 10)
    await taken.count(10, 10)
    await asyncio.sleep(1.2)  # the request ends meanwhile
    await fill(bench, name, 1, 10)
    await taken.count(11, 10)


async def test_a_reason_for_a_rejection(bench):
    name, advisories = unique(), []
    taken = await bench.subscribe(name, stream=name, durable="d", settle=None)
    await fill(bench, name, 1)

    async def advisory(msg):
        advisories.append(msg.data)

    subject = f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{name}.d"
    await bench.driver.client.subscribe(subject, cb=advisory)
    (raw,) = await taken.count(1)
    await taken.intake.settle(raw, Settlement.NONE, None)
    await taken.intake.settle(raw, Settlement.REJECT, None, reason="too old")
    await eventually(lambda: advisories)
    assert b"too old" in advisories[0]


async def test_messages_never_settled_are_remembered_once(bench, monkeypatch):
    monkeypatch.setattr("millstream.nats.jetstream.CROWD", 3)
    name = unique()
    config = ConsumerConfig(ack_wait=0.2)
    taken = await bench.subscribe(name, stream=name, durable="d", config=config, settle=None)
    await fill(bench, name, 2)
    await taken.count(8)
    await eventually(lambda: len(taken.intake.open) <= 3)


async def test_a_name_without_a_durable(bench):
    name = unique()
    config = ConsumerConfig(name="mine", inactive_threshold=60)
    taken = await bench.subscribe(name, stream=name, config=config)
    await fill(bench, name, 1)
    await taken.count(1)
    have = (await info(bench, name, "mine")).config
    assert have.durable_name is None and have.inactive_threshold == 60


async def test_other_filters_of_a_durable(bench):
    name = unique()
    stream = JStream(name, subjects=[f"{name}.>"])
    first = await bench.subscribe(f"{name}.a", stream=stream, durable="d")
    await first.intake.close()
    config = ConsumerConfig(filter_subjects=[f"{name}.b", f"{name}.c"])
    second = await bench.subscribe(stream=stream, durable="d", config=config)
    assert (await info(bench, name, "d")).config.filter_subjects == [f"{name}.b", f"{name}.c"]
    await second.intake.close()
    await bench.subscribe(f"{name}.c", stream=stream, durable="d")
    have = (await info(bench, name, "d")).config
    assert have.filter_subject == f"{name}.c" and not have.filter_subjects


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_what_waited_past_its_deadline_is_not_begun(bench, concurrency):
    """A process that stood still leaves to the next delivery what it had not begun."""
    name, begun, fetched = unique(), list[tuple[int, int]](), asyncio.Event()
    broker = NatsBroker(bench.driver.describe())

    @broker.subscriber(
        name,
        stream=name,
        durable="d",
        config=ConsumerConfig(ack_wait=1.0),
        concurrency=concurrency,
        ordered_by=lambda message: "one",
    )
    async def handle(body: int, message: NatsStreamMessage) -> None:
        begun.append((body, message.delivery_count))
        if len(begun) == 1:
            await fetched.wait()
            time.sleep(1.5)  # longer than a deadline, and shorter than two

    await broker.start()
    for n in range(3):
        await broker.publish(n, name, stream=name)
    [subscription] = broker.subscriptions
    await eventually(lambda: subscription._lanes.waiting == 2)
    fetched.set()
    await eventually(lambda: len(begun) >= 3)
    await settled(bench, name, "d")
    await broker.stop()
    assert sorted(n for n, _ in begun if n) == [1, 2], begun
