"""Dead letters in a queue: read without loss, replayed, dropped; the command line too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pika
import pytest

from millstream import Retry
from millstream.errors import NoLetters
from millstream.letters import replay
from millstream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitMessage, RabbitQueue
from tests.cli.harness import Process
from tests.helpers import eventually, unique
from tests.rabbit.helpers import Foreign

APP = """
from millstream import Millstream, Retry
from millstream.rabbit import RabbitBroker

broker = RabbitBroker({url!r})
app = Millstream(broker)

@broker.subscriber({queue!r}, retry=Retry(attempts=1))
async def handle(body: int) -> None:
    if {fails}:
        raise ValueError("no stock")
"""


async def fill(url: str, queue: str, count: int) -> None:
    """Let some messages fail."""
    broker = RabbitBroker(url)

    @broker.subscriber(queue, retry=Retry(attempts=1))
    async def handle(body: int) -> None:
        raise ValueError("no stock")

    await broker.start()
    for n in range(count):
        await broker.publish(n, queue)
    failing = broker.subscriptions[0].failing
    await eventually(lambda: failing.dead_lettered >= count)
    await broker.stop()


async def test_looking_takes_nothing_away(rabbit: Any) -> None:
    queue, foreign = unique(), Foreign(rabbit.url)
    await fill(rabbit.url, queue, 5)
    async with RabbitBroker(rabbit.url) as broker:
        letters = broker.driver.letters(f"{queue}.dlq")
        names = [letter.id async for letter in letters.read()]
        for _ in range(25):  # a queue with a delivery limit would have dropped them
            found = [letter async for letter in letters.read()]
            assert [letter.id for letter in found] == names
        assert [letter.message.body for letter in found] == [b"0", b"1", b"2", b"3", b"4"]
        assert await letters.count() == await foreign.depth(f"{queue}.dlq") == 5
        behind = [x.message.body async for x in letters.read(limit=2, after=names[1])]
        assert behind == [b"2", b"3"]
        # Somebody stops to look in the middle.
        reading = letters.read()
        await anext(reading)
        await reading.aclose()
        assert await letters.count() == 5
        with pytest.raises(NoLetters):
            await broker.driver.letters(unique()).count()


async def test_letters_are_dropped_one_by_one(rabbit: Any) -> None:
    queue = unique()
    await fill(rabbit.url, queue, 4)
    async with RabbitBroker(rabbit.url) as broker:
        letters = broker.driver.letters(f"{queue}.dlq")
        names = [letter.id async for letter in letters.read()]
        assert await letters.remove(names[2])
        assert not await letters.remove(names[2])
        async for letter in letters.read():  # while they are read
            if letter.message.body != b"0":
                assert await letters.remove(letter.id)
        assert [x.message.body async for x in letters.read()] == [b"0"]


async def test_a_letter_goes_back_to_its_exchange(rabbit: Any) -> None:
    name, got, failed = unique(), [], []
    broker = RabbitBroker(rabbit.url)
    exchange = RabbitExchange(name, ExchangeType.TOPIC)

    @broker.subscriber(
        RabbitQueue(f"{name}.q", routing_key="orders.{region}"),
        exchange,
        retry=Retry(attempts=2, delay=0.05),
    )
    async def handle(body: dict[str, int], region: str, message: RabbitMessage) -> None:
        if len(failed) < 2:
            failed.append(region)
            raise ValueError("no stock")
        got.append((body, region, message.exchange, message.content_type, message.headers["t"]))

    @broker.subscriber(RabbitQueue(f"{name}.other", routing_key="#"), exchange)
    async def other(body: dict[str, int]) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish({"n": 1}, "orders.eu", exchange, headers={"t": "x"}, priority=5)
        await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
        await eventually(lambda: got == [{"n": 1}])
        letters = broker.driver.letters(f"{name}.q.dlq")
        [letter] = [x async for x in letters.read()]
        assert letter.message.raw.properties.message_id
        assert await replay(letters, letter)
        await eventually(lambda: len(got) == 2)
        await asyncio.sleep(0.2)
        assert got[1:] == [({"n": 1}, "eu", name, None, "x")]
        assert await letters.count() == 0
    finally:
        await broker.stop()


async def test_a_foreign_dead_letter_can_be_read(rabbit: Any) -> None:
    queue = unique()
    properties = pika.BasicProperties(headers={"x-other": 1}, timestamp=1_700_000_000)

    def put(channel: Any) -> None:
        channel.queue_declare(queue, durable=True)
        for body in (b"a", b"b"):
            channel.basic_publish("", queue, body, properties)

    await Foreign(rabbit.url).do(put)
    async with RabbitBroker(rabbit.url) as broker:
        found = [x async for x in broker.driver.letters(queue).read()]
        assert [x.message.body for x in found] == [b"a", b"b"]
        assert len({x.id for x in found}) == 2
        assert (found[0].failed_at.year, found[0].origin, found[0].handler) == (2023, "", "")


async def test_a_deleted_queue_of_letters_is_made_again(rabbit: Any) -> None:
    queue, foreign = unique(), Foreign(rabbit.url)
    broker = RabbitBroker(rabbit.url)

    @broker.subscriber(queue, retry=Retry(attempts=1))
    async def handle(body: int) -> None:
        raise ValueError("no stock")

    await broker.start()
    try:
        failing = broker.subscriptions[0].failing
        await broker.publish(1, queue)
        await eventually(lambda: failing.dead_lettered == 1)
        await foreign.do(lambda c: c.queue_delete(f"{queue}.dlq"))
        await broker.publish(2, queue)
        await eventually(lambda: failing.dead_lettered == 2)
        assert await foreign.depth(f"{queue}.dlq") == 1
    finally:
        await broker.stop()


async def test_the_command_line(rabbit: Any, tmp_path: Path) -> None:
    queue = unique()
    await fill(rabbit.url, queue, 3)
    (tmp_path / "service.py").write_text(APP.format(url=rabbit.url, queue=queue, fails="body == 1"))

    async def run(*arguments: str, code: int = 0) -> str:
        process = Process("dlq", *arguments, folder=tmp_path)
        found = await asyncio.to_thread(process.wait, 30)
        assert found == code, process.output
        return process.output

    # The service handles what is replayed; `handle` of these letters is named as its own is.
    text = await run("ls", "service:app", "--json")
    assert json.loads(text[text.index("{") :])["total"] == 3
    assert "no stock" in await run("show", "service:app", "--limit", "1")
    output = await run("replay", "service:app", "--to-all")
    assert "replayed: 3 dead letters" in output, output
    assert await Foreign(rabbit.url).depth(queue) == 3
    await fill(rabbit.url, queue, 1)
    assert "dropped" in await run("drop", "service:app", "--yes")
    assert await Foreign(rabbit.url).depth(f"{queue}.dlq") == 0
