"""Core NATS: subjects, queues, requests, back-pressure, pausing."""

from __future__ import annotations

import asyncio

import pytest

from millstream.errors import (
    MessageTooLarge,
    NoResponders,
    NotConnected,
    PublishError,
    RequestTimeout,
)
from millstream.nats.driver import NatsDriver
from millstream.nats.message import NatsMessage
from millstream.nats.options import NatsSubscription
from tests.helpers import eventually, unique


async def test_wildcards_and_placeholders(bench):
    name = unique()
    one = await bench.subscribe(f"{name}.{{region}}.created")
    rest = await bench.subscribe(f"{name}.>")
    await bench.publish(f"{name}.eu.created", b"1")
    await bench.publish(f"{name}.eu.deleted.now", b"2")
    assert [m.data for m in await rest.count(2)] == [b"1", b"2"]
    assert one.bodies == [b"1"]


async def test_order_is_kept_and_the_sink_is_awaited(bench):
    name, running = unique(), 0

    async def work(raw):
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1

    taken = await bench.subscribe(name, work=work)
    for i in range(300):
        await bench.publish(name, b"%d" % i)
    await taken.count(300)
    assert taken.bodies == [b"%d" % i for i in range(300)]


async def test_a_queue_shares_the_messages(bench):
    name = unique()
    first = await bench.subscribe(name, "workers")
    second = await bench.subscribe(name, queue="workers")
    for _ in range(100):
        await bench.publish(name)
    await eventually(lambda: len(first.raws) + len(second.raws) == 100)
    assert first.raws and second.raws


async def test_headers_and_reply_subject(bench):
    name = unique()
    taken = await bench.subscribe(name)
    await bench.publish(name, b"x", headers={"a": "1", "b": "é"}, reply_to="answers")
    (raw,) = await taken.count(1)
    assert raw.headers == {"a": "1", "b": "é"}
    assert raw.reply == "answers"


async def test_request_gets_the_first_reply(bench):
    name = unique()

    async def work(raw):
        await bench.publish(raw.reply, b"pong:" + raw.data)

    await bench.subscribe(name, work=work)
    replies = await asyncio.gather(*(bench.request(name, b"%d" % i) for i in range(50)))
    assert [r.data for r in replies] == [b"pong:%d" % i for i in range(50)]


async def test_request_without_anybody_there(bench):
    name = unique()
    with pytest.raises(NoResponders, match=name):
        await bench.request(name)


async def test_request_without_an_answer(bench):
    name = unique()
    await bench.subscribe(name)
    with pytest.raises(RequestTimeout, match=r"within 0\.1 s"):
        await bench.request(name, timeout=0.1)


async def test_pause_gives_the_sink_what_the_client_already_holds(bench):
    name, gate = unique(), asyncio.Event()
    taken = await bench.subscribe(name, work=lambda raw: gate.wait())
    for i in range(10):
        await bench.publish(name, b"%d" % i)
    await taken.count(1)
    await eventually(lambda: len(taken.intake.waiting) == 9)
    pausing = asyncio.create_task(taken.intake.pause())
    await asyncio.sleep(0)
    gate.set()
    assert await pausing == 0
    assert len(taken.raws) == 10
    await bench.publish(name, b"late")
    assert await bench.driver.ping(1)
    assert len(taken.raws) == 10
    await taken.intake.close()


async def test_pause_from_inside_the_sink_does_not_deadlock(bench):
    name = unique()
    taken = await bench.subscribe(name)
    taken.work = lambda raw: taken.intake.pause()
    await bench.publish(name)
    await taken.count(1)
    await asyncio.wait_for(taken.intake.close(), 2)


async def test_close_cancels_the_sink_that_still_runs(bench):
    name, cancelled = unique(), asyncio.Event()

    async def work(raw):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    taken = await bench.subscribe(name, work=work)
    await bench.publish(name)
    await taken.count(1)
    await taken.intake.close()
    assert cancelled.is_set()


async def test_a_failing_sink_does_not_end_the_subscription(bench, caplog):
    name = unique()

    async def work(raw):
        if raw.data == b"bad":
            raise ValueError("broken sink")

    taken = await bench.subscribe(name, work=work)
    await bench.publish(name, b"bad")
    await bench.publish(name, b"good")
    await taken.count(2)
    assert "broken sink" in caplog.text


async def test_max_msgs_ends_the_subscription(bench):
    name = unique()
    taken = await bench.subscribe(name, max_msgs=3)
    for _ in range(5):
        await bench.publish(name)
    await taken.count(3)
    with pytest.raises(NoResponders):
        await bench.request(name)
    assert len(taken.raws) == 3


@pytest.mark.parametrize("limit", [{"pending_msgs_limit": 5}, {"pending_bytes_limit": 50}])
async def test_limits_of_what_may_wait(bench, limit):
    name, gate = unique(), asyncio.Event()
    taken = await bench.subscribe(name, work=lambda raw: gate.wait(), **limit)
    for i in range(20):
        await bench.publish(name, b"%010d" % i)
    await bench.driver.ping(1)
    await eventually(lambda: bench.heard("error"))
    assert sum("too slow" in reason for _, reason in bench.events) == 1
    gate.set()
    await eventually(
        lambda: any("dropped" in r for _, r in bench.events[1:]) and not taken.intake.waiting
    )
    assert 5 <= len(taken.raws) <= 7
    await bench.publish(name, b"later")
    await eventually(lambda: taken.bodies[-1] == b"later")


async def test_too_large_a_message_is_refused_before_the_server_sees_it(bench):
    name = unique()
    most = bench.driver.client.max_payload
    taken = await bench.subscribe(name)
    with pytest.raises(MessageTooLarge, match="max_payload"):
        await bench.publish(name, b"x" * (most + 1))
    with pytest.raises(MessageTooLarge):
        await bench.publish(name, b"x" * most, headers={"h": "v" * 100})
    await bench.publish(name, b"x" * most)
    await taken.count(1)
    assert not bench.heard("disconnected")


@pytest.mark.parametrize("subject", ["", "with space", "a\r\nPUB b 0"])
async def test_a_subject_that_is_none(bench, subject):
    with pytest.raises(PublishError, match="no subject"):
        await bench.publish(subject)


async def test_a_header_that_is_none(bench):
    with pytest.raises(PublishError, match="header"):
        await bench.publish(unique(), headers={"with space": "x"})


async def test_without_a_connection(nats):
    from millstream.nats.options import NatsPublish

    driver = NatsDriver(nats.url)
    with pytest.raises(NotConnected, match="connect"):
        await driver.publish(NatsPublish(subject="x"), b"", None)
    with pytest.raises(NotConnected):
        await driver.request(NatsPublish(subject="x"), b"", None, 1)
    assert not await driver.ping(1)
    await driver.close()


async def test_close_flushes_what_was_accepted(bench, nats):
    name = unique()
    taken = await bench.subscribe(name)
    other = NatsDriver(nats.url)
    await other.connect()
    from millstream.nats.options import NatsPublish

    for i in range(500):
        await other.publish(NatsPublish(subject=name), b"%d" % i, None)
    await other.close()
    await taken.count(500)


async def test_the_envelope(bench):
    from millstream.message import Link

    name = unique()
    spec = NatsSubscription(f"{name}.{{region}}")
    taken = await bench.subscribe(f"{name}.{{region}}")
    await bench.publish(f"{name}.eu", b"body", headers={"reply_to": "there", "message_id": "7"})
    (raw,) = await taken.count(1)
    message = NatsMessage(raw, Link(bench.driver, spec))
    assert (message.body, message.destination, message.path) == (
        b"body",
        f"{name}.eu",
        {"region": "eu"},
    )
    assert (message.reply_to, message.message_id) == ("there", "7")
    assert message.delivery_count == 1 and message.timestamp is None
    assert await message.ack()
