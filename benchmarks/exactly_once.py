"""Kafka, exactly once: consume, process and produce, with transactions and without.

Whoever reads the results says when they are there, as far as a transaction lets them be read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

from benchmarks.common import Rows, table
from benchmarks.contenders import Contender, Running, alone, as_dict, encode, handled, looping
from benchmarks.kafka import FILL, MANY, Kafka

BATCH, LANES = 500, 256
#: Seconds without any result after which some are lost.
PATIENCE = 60.0


class ExactlyOnce(Kafka):
    """Each contender copies its topic to another one."""

    broker = "exactly_once"
    scenarios: ClassVar = {
        "copied": f"lists of up to {BATCH}, as many results in one go",
        "answered": f"one at a time, {LANES} at once, a result each",
    }
    names: ClassVar = {
        "raw": "raw confluent-kafka",
        "raw-once": "the same in transactions",
        "millstream": "Millstream",
        "millstream-once": "Millstream, exactly once",
    }

    def present(self, scenario: str) -> list[str]:
        return [n for n in self.names if scenario == "copied" or not n.startswith("raw")]

    def prepare(self, scenario: str, addresses: list[str]) -> None:
        from confluent_kafka import Consumer, TopicPartition

        super().prepare(scenario, addresses)
        settings = {"bootstrap.servers": self.url, "group.id": "bench.results"}
        self.results: dict[str, Any] = {}
        for address in addresses:
            self.results[address] = Consumer({**settings, "isolation.level": "read_committed"})
            self.results[address].assign([TopicPartition(f"{address}.out", 0, 0)])

    def send(self, scenario: str, address: str, n: int) -> float:
        begin = time.perf_counter()
        super().send(scenario, address, n)
        last = time.monotonic()
        while n > 0 and time.monotonic() < last + PATIENCE:
            if found := self.results[address].consume(BATCH, 0.1):
                last = time.monotonic()
                n -= len(found)
        assert n == 0, f"{address}: {n} results are missing"
        return time.perf_counter() - begin

    def run(self, scenario: str, most: int = MANY) -> Rows:
        rows = super().run(scenario, most)
        for reader in self.results.values():
            reader.close()
        return rows

    def report(self) -> list[str]:
        lines = {}
        for scenario, described in self.scenarios.items():
            rates = {name: rate for name, (_, rate) in self.run(scenario).items()}
            cells = [f"{rates[n]:,.0f}" if n in rates else "–" for n in self.names]
            shares = [(f"{name}-once", name) for name in ("raw", "millstream")]
            cells += [f"{rates[a] / rates[b]:.2f}" if a in rates else "–" for a, b in shares]
            lines[described] = cells
        columns = [*self.names.values(), "raw: with ÷ without", "ours: with ÷ without"]
        return table("results per second", columns, lines)


@asynccontextmanager
async def raw(url: str, scenario: str, address: str, once: bool = False) -> Contender:
    """A thread that fetches, decodes, produces and commits, a batch at a time."""
    from confluent_kafka import Consumer, Producer, TopicPartition

    consumer: Any = Consumer(
        {
            "bootstrap.servers": url,
            "group.id": f"{address}.group",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    named = {"transactional.id": address} if once else {}
    producer: Any = Producer(
        {"bootstrap.servers": url, "enable.idempotence": True, "linger.ms": 0, **named}
    )
    loop, pool, assigned = asyncio.get_running_loop(), ThreadPoolExecutor(1), asyncio.Event()
    if once:
        producer.init_transactions(30)

    def copy() -> int:
        messages = consumer.consume(BATCH, FILL)
        if not messages:
            return 0
        if once:
            producer.begin_transaction()
        for message in messages:
            as_dict(message.value())
            producer.produce(f"{address}.out", encode({"ok": True}))
        offsets = [TopicPartition(address, 0, messages[-1].offset() + 1)]
        if once:
            member = consumer.consumer_group_metadata()
            producer.send_offsets_to_transaction(offsets, member, 30)
            producer.commit_transaction(30)
        else:
            producer.flush(30)
            consumer.commit(offsets=offsets, asynchronous=False)
        return len(messages)

    async def run() -> None:
        while True:
            for _ in range(await loop.run_in_executor(pool, copy)):
                handled()

    def on_assign(consumer: Any, partitions: list[Any]) -> None:
        loop.call_soon_threadsafe(assigned.set)

    consumer.subscribe([address], on_assign=on_assign)
    async with looping(run()):
        await assigned.wait()
        yield None
    await loop.run_in_executor(pool, consumer.close)


def ours(url: str, scenario: str, address: str, once: bool = False) -> Running:
    """Millstream; the two brokers differ in one option."""
    from millstream import Batch
    from millstream.kafka import KafkaBroker, Topic

    broker = KafkaBroker(url, transactional_id=address if once else None)
    subscriber: Callable[..., Any] = partial(
        broker.subscriber, Topic(address, declare=False), group_id=f"{address}.group"
    )
    if scenario == "copied":

        @subscriber(batch=Batch(BATCH, FILL))
        async def copy(orders: list[dict[str, Any]]) -> None:
            await broker.publish_batch(*({"ok": True} for _ in orders), topic=f"{address}.out")
            for _ in orders:
                handled()

    else:

        @subscriber(concurrency=LANES)
        @broker.publisher(f"{address}.out")
        async def answer(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    return alone(broker, None)


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "raw-once": partial(raw, once=True),
    "millstream": ours,
    "millstream-once": partial(ours, once=True),
}
