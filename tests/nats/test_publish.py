"""Publishing into streams: confirmation, deduplication, schedules, refusals."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from millstream.errors import PublishError, SetupError
from millstream.nats import JStream, Schedule
from millstream.nats.driver import NatsDriver
from millstream.nats.options import NatsPublication
from tests.helpers import eventually, unique
from tests.servers import NatsServer


@pytest.fixture
async def stream(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[f"{name}.>"])
    return name


async def test_the_receipt(bench, stream):
    first = await bench.publish(f"{stream}.a", b"1", stream=stream)
    second = await bench.publish(f"{stream}.a", b"2", stream=JStream(stream))
    assert (first.stream, first.seq, second.seq) == (stream, 1, 2)
    assert await bench.publish(f"{stream}.a", b"3") is None  # core: nobody confirms


async def test_one_id_is_stored_once(bench, stream):
    for _ in range(3):
        last = await bench.publish(f"{stream}.a", b"1", message_id="order-1")
    assert last.duplicate and last.seq == 1
    assert (await bench.driver.streams.info(stream))["state"]["messages"] == 1


async def test_many_in_flight_do_not_wait_for_each_other(bench, stream):
    sent = bench.driver.client.stats["out_msgs"]
    tasks = [
        asyncio.ensure_future(bench.publish(f"{stream}.a", b"%d" % i, stream=stream))
        for i in range(1000)
    ]
    await asyncio.sleep(0)
    # All are on their way after one turn of the loop, before any confirmation was read.
    assert bench.driver.client.stats["out_msgs"] - sent == 1000
    assert not any(task.done() for task in tasks)
    acks = await asyncio.gather(*tasks)
    assert [ack.seq for ack in acks] == list(range(1, 1001))


async def test_a_reply_address_travels_in_a_header(bench, stream):
    taken = await bench.subscribe(f"{stream}.a", stream=stream, durable="d")
    await bench.publish(f"{stream}.a", stream=stream, reply_to="answers", headers={"x": "1"})
    (raw,) = await taken.count(1)
    assert raw.headers["reply_to"] == "answers" and raw.headers["x"] == "1"


async def test_no_stream_takes_it(bench):
    name = unique()
    with pytest.raises(PublishError, match=f"no stream stores '{name}'"):
        await bench.publish(name, stream=name)


async def test_another_stream_takes_it(bench, stream):
    with pytest.raises(PublishError, match="stream= names another stream"):
        await bench.publish(f"{stream}.a", stream="elsewhere")


async def test_a_full_stream_refuses(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[name], max_msgs=1, discard="new")
    await bench.publish(name, stream=name)
    with pytest.raises(PublishError, match="maximum messages exceeded"):
        await bench.publish(name, stream=name)


async def test_later(bench):
    name = unique()
    stream = JStream(name, subjects=[f"{name}.>"], allow_msg_schedules=True)
    taken = await bench.subscribe(f"{name}.due", stream=stream, durable="d")
    at = datetime.now(UTC) + timedelta(seconds=1)
    await bench.publish(
        f"{name}.timer.1", b"ring", stream=name, schedule=Schedule(at, f"{name}.due")
    )
    assert not taken.raws
    (raw,) = await taken.count(1)
    assert raw.data == b"ring" and datetime.now(UTC) >= at - timedelta(milliseconds=50)


async def test_later_without_the_streams_permission(bench, stream):
    at = Schedule(datetime(2100, 1, 1), f"{stream}.due")
    with pytest.raises(PublishError, match="not stored"):
        await bench.publish(f"{stream}.a", stream=stream, schedule=at)


def test_a_schedule_without_a_zone_is_in_utc():
    at = Schedule(datetime(2030, 1, 2, 3, 4, 5), "x")
    assert at.headers()["Nats-Schedule"] == "@at 2030-01-02T03:04:05.000Z"


async def test_a_publication_declares_its_stream(bench):
    name = unique()
    spec = NatsPublication(f"{name}.a", stream=name)
    spec.check()
    await bench.driver.declare([spec, NatsPublication("plain")])
    assert (await bench.publish(f"{name}.a", stream=name)).seq == 1


async def test_a_server_without_jetstream():
    with NatsServer(jetstream=False) as server:
        driver = NatsDriver(server.url)
        await driver.connect()
        with pytest.raises(SetupError, match="has no JetStream"):
            await driver.declare([NatsPublication("a", stream="S")])
        await driver.close()


async def test_a_domain():
    config = 'jetstream { domain: "hub", store_dir: "./js" }'
    with NatsServer(config=config, jetstream=False) as server:
        driver = NatsDriver(server.url, js_options={"domain": "hub"})
        await driver.connect()
        await driver.declare([NatsPublication("a", stream="S")])
        assert (await driver.js.stream_info("S")).config.name == "S"
        await driver.close()


async def test_the_confirmation_of_a_dead_letter(bench):
    """Publishing to a dead-letter address is confirmed without asking for it."""
    name = unique()
    taken = await bench.subscribe(name, stream=name, durable="d")
    address = await bench.driver.dead_letter(taken.intake.spec, None)
    assert (await bench.publish(address, b"x")).stream == f"{name}_dlq"
    await eventually(lambda: _count(bench, f"{name}_dlq", 1))


async def _count(bench, stream, number):
    return (await bench.driver.streams.info(stream))["state"]["messages"] == number
