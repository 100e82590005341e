"""Nothing is kept of messages that are done."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from collections import Counter
from typing import Any

from millstream.driver import Batch, Capability
from millstream.retry import Retry
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs

#: Bytes of a message, and how many of them may be kept; messages of a round.
SIZE, KEPT, ROUND = 4000, 500, 200


async def hold_nothing(bench: Bench, address: str, done: Counter[str]) -> None:
    """Send rounds of messages; the process does not grow with them after the first."""

    async def some() -> None:
        bodies = (f"{number} ".ljust(SIZE, ".") for number in range(ROUND))
        sent = (bench.broker.publish(body, address, **bench.stored) for body in bodies)
        await bench.within(asyncio.gather(*sent))
        done["sent"] += ROUND
        await bench.until(lambda: done["handled"] == done["sent"], 30)
        await bench.quiet(0.05)

    await bench.start()
    await some()
    sizes: list[int] = []
    tracemalloc.start()
    try:
        for _ in range(3):
            await some()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert min(sizes[1] - sizes[0], sizes[2] - sizes[1]) / ROUND < KEPT, sizes


@needs(Capability.NOTHING, "forgetting")
async def test_of_single_messages(bench: Bench) -> None:
    done: Counter[str] = Counter()

    @bench.subscriber(bench.address("in"))
    async def handler(body: str) -> None:
        done["handled"] += 1

    await hold_nothing(bench, bench.address("in"), done)


@needs(Capability.NOTHING, "forgetting")
async def test_of_batches(bench: Bench) -> None:
    done: Counter[str] = Counter()

    @bench.subscriber(bench.address("in"), batch=Batch(20, 0.05))
    async def handler(bodies: list[str]) -> None:
        done["handled"] += len(bodies)

    await hold_nothing(bench, bench.address("in"), done)


@needs(Capability.ACK | Capability.NACK, "forgetting")
async def test_of_messages_with_keys_that_are_tried_again(bench: Bench, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL, "millstream")  # the test runner keeps what is logged
    done: Counter[str] = Counter()

    @bench.subscriber(
        bench.address("in"),
        concurrency=8,
        ordered_by=lambda message: bytes(message.body[:10]),
        retry=Retry(attempts=3, delay=0.01),
    )
    async def handler(body: str) -> None:
        done[body[:10]] += 1
        if done[body[:10]] % 2:
            raise ValueError("once more")
        done["handled"] += 1

    await hold_nothing(bench, bench.address("in"), done)
