"""Dead letters of every kind of source: read, replayed to whom they failed, removed."""

from __future__ import annotations

from typing import Any

from millstream.driver import Batch, Capability
from millstream.letters import Letter, replay
from millstream.message import Message
from millstream.retry import Retry
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs


async def read(bench: Bench, address: str) -> list[Letter]:
    return [letter async for letter in bench.broker.driver.letters(address).read()]


@needs(Capability.ACK | Capability.NACK, "fan-out")
async def test_a_replay_is_for_the_handler_that_failed(bench: Bench) -> None:
    address, trash = bench.address("work"), bench.address("trash")
    got: list[tuple[str, int]] = []
    counts: list[int] = []

    @bench.subscriber(address, retry=Retry(attempts=2, delay=0.1), dead_letter=trash)
    async def failing(body: int, message: Message[Any]) -> None:
        got.append(("failing", body))
        counts.append(message.attempt)
        if len(counts) < 3:
            raise ValueError("no stock")

    @bench.subscriber(address)
    async def other(body: int) -> None:
        got.append(("other", body))

    @bench.subscriber(address, batch=Batch(2, 0.1))
    async def batch(body: list[int]) -> None:
        got.extend(("batch", n) for n in body)

    @bench.capture(address)
    async def plain(body: int) -> None:
        got.append(("plain", body))

    await bench.start()
    await bench.broker.publish(1, address, **bench.stored)
    await bench.until(lambda: bench.broker.subscriptions[0].failing.dead_lettered == 1)
    await bench.until(lambda: len(got) == 5)
    got.clear()
    letters = bench.broker.driver.letters(trash)
    [letter] = await read(bench, trash)
    assert await letters.count() == 1
    assert letter.handler == f"failing@{address}"
    assert (letter.origin, letter.attempts, letter.error) == (address, 2, "no stock")

    assert await replay(letters, letter)
    await bench.broker.publish(2, address, **bench.stored)
    names = ("batch", "failing", "other", "plain")
    await bench.until(lambda: all((name, 2) in got for name in names))
    assert [name for name, n in got if n == 1] == ["failing"]
    assert counts == [1, 2, 1, 1]  # attempts begin anew
    assert await letters.count() == 0 and not await letters.remove(letter.id)
    await bench.quiet(2.5)
    assert len(got) == 5


@needs(Capability.ACK | Capability.NACK, "fan-out", "letter order")
async def test_letters_are_read_in_parts(bench: Bench) -> None:
    address, trash = bench.address("work"), bench.address("trash")

    @bench.subscriber(address, retry=Retry(attempts=1), dead_letter=trash)
    async def failing(body: int) -> None:
        raise ValueError("no stock")

    await bench.start()
    failures = bench.broker.subscriptions[0].failing
    for number in range(1, 5):  # one after the other, so that their order is known
        await bench.broker.publish(number, address, **bench.stored)
        await bench.until(lambda number=number: failures.dead_lettered == number)
    every = await read(bench, trash)
    assert [letter.message.body for letter in every] == [b"1", b"2", b"3", b"4"]

    letters = bench.broker.driver.letters(trash)

    async def part(limit: int | None, after: int) -> list[str]:
        found = letters.read(limit, every[after].id)
        return [letter.id async for letter in found]

    names = [letter.id for letter in every]
    assert [letter.id async for letter in letters.read(2)] == names[:2]
    assert await part(None, 1) == names[2:]
    assert await part(2, 0) == names[1:3]
    assert await part(1, 3) == []
    # What is removed is not there any more, and still a place to begin behind.
    assert await letters.remove(names[1]) and not await letters.remove(names[1])
    assert await part(None, 1) == names[2:]
    assert [letter.id for letter in await read(bench, trash)] == [names[0], *names[2:]]
    assert await letters.count() == 3
