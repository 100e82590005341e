"""Kafka: a group of one topic, message by message, in batches, and many at a time per key."""

from __future__ import annotations

import asyncio
import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

from benchmarks.common import FRAMEWORKS, ORDER, READING, Rows, Section, progress, table
from benchmarks.contenders import (
    WAIT,
    Contender,
    Running,
    alone,
    as_dict,
    as_model,
    as_struct,
    batches,
    declare,
    encode,
    log,
    on_millstream,
    take,
    take_all,
    tenant,
)

PACKAGES = ["confluent-kafka", "aiokafka"]
MANY, PUBLISHED = 60_000, 3_000
#: Messages in a batch; seconds that a batch waits to fill.
BATCH, FILL = 500, 0.2
#: Of the scenario per key: messages, keys, partitions, handlers at a time.
KEYED, KEYS, PARTITIONS, LANES = 10_000, 2_000, 4, 256


class Kafka(Section):
    """On a KRaft server; messages are sent by confluent-kafka in this process."""

    broker = "kafka"
    scenarios: ClassVar = {
        **READING,
        "batch": "lists of up to 500 `dict`s",
        "publisher": "a `dict`, publishes a `dict`, confirmed",
    }
    names: ClassVar = {
        "raw": "raw confluent-kafka",
        **FRAMEWORKS,
        "faststream": "FastStream, confluent",
        "faststream-aiokafka": "FastStream, aiokafka",
    }

    def present(self, scenario: str) -> list[str]:
        return ["millstream"] if scenario == "keys" else super().present(scenario)

    def prepare(self, scenario: str, addresses: list[str]) -> None:
        """Make topics, so that nobody has to wait for one."""
        from confluent_kafka import admin

        administration: Any = admin
        client = administration.AdminClient({"bootstrap.servers": self.url})
        topics = [*addresses, *(f"{address}.out" for address in addresses)]
        partitions = PARTITIONS if scenario == "keys" else 1
        new = [administration.NewTopic(topic, partitions, 1) for topic in topics]
        for future in client.create_topics(new).values():
            future.result(10)

    def send(self, scenario: str, address: str, n: int) -> float | None:
        for i in range(n):
            self.sender.produce(address, ORDER, key=f"{i % KEYS}" if scenario == "keys" else None)
        self.sender.flush()
        return None

    def run(self, scenario: str, most: int = MANY) -> Rows:
        return super().run(scenario, PUBLISHED if scenario == "publisher" else most)


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    from confluent_kafka import Producer

    from tests.servers.kafka import KafkaServer

    with KafkaServer() as server:
        settings: dict[str, Any] = {"linger.ms": 5, "queue.buffering.max.messages": 500_000}
        producer = Producer({"bootstrap.servers": server.url, **settings})
        lines = Kafka(producer, server.url, peer, rounds, scale).report()
        progress("kafka: per key")
        # Fewer messages would not show it.
        keyed = Kafka(producer, server.url, peer, rounds, 1.0).run("keys", KEYED)
        progress("kafka: exactly once")
        from benchmarks.exactly_once import ExactlyOnce

        # The same: of a few messages, what the last one waits for its transaction is a large part.
        once = ExactlyOnce(producer, server.url, peer, rounds, 1.0).report()
    ideal, rate = LANES / WAIT, keyed["millstream"][1]
    return [
        *lines,
        "",
        f"{KEYED:,} messages of {KEYS:,} keys over {PARTITIONS} partitions, each handled for",
        f"{WAIT * 1000:.0f} ms, {LANES} at a time, in order per key; it begins with the first",
        "message that is sent:",
        "",
        *table(
            "",
            ["seconds", "times the ideal"],
            {
                "the ideal": [f"{KEYED / ideal:.2f}", "1.00"],
                "Millstream": [f"{KEYED / rate:.2f}", f"{ideal / rate:.2f}"],
            },
        ),
        "",
        "Consuming, processing and producing, without transactions and with the offsets in the",
        "transaction of the results; until the results can be read:",
        "",
        *once,
    ]


# raw confluent-kafka: the same decoder, the same offsets, and nothing around it


@asynccontextmanager
async def raw(url: str, scenario: str, address: str) -> Contender:
    from confluent_kafka import Consumer, Producer, TopicPartition

    settings = {
        "bootstrap.servers": url,
        "group.id": f"{address}.group",
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "partition.assignment.strategy": "cooperative-sticky",
    }
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    assigned, stopping = asyncio.Event(), False
    consumer: Any = Consumer(settings)
    producer: Any = Producer({"bootstrap.servers": url, "enable.idempotence": True, "linger.ms": 0})
    done: dict[int, int] = {}

    def fetch(commit: bool) -> list[Any]:
        if commit and done:
            offsets = [TopicPartition(address, number, at) for number, at in done.items()]
            consumer.commit(offsets=offsets, asynchronous=False)
            done.clear()
        first = consumer.poll(0.1)
        if scenario == "batch":
            return [] if first is None else [first, *consumer.consume(BATCH - 1, FILL)]
        return [] if first is None else [first, *consumer.consume(1999, 0)]

    def report() -> None:
        while not stopping:
            producer.poll(0.2)

    async def publish(data: bytes) -> None:
        future = loop.create_future()

        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            loop.call_soon_threadsafe(future.set_result, message.offset())

        producer.produce(f"{address}.out", data, on_delivery=delivered)
        await future

    one: Any = {"dict": as_dict, "msgspec": as_struct, "pydantic": as_model}.get(scenario)

    async def run() -> None:
        last = time.monotonic()
        while not stopping:
            commit = time.monotonic() > last + 1.0
            last = time.monotonic() if commit else last
            messages = await loop.run_in_executor(pool, fetch, commit)
            if scenario == "batch" and messages:
                await batches([as_dict(message.value()) for message in messages])
                done[messages[-1].partition()] = messages[-1].offset() + 1
                continue
            for message in messages:
                if one is not None:
                    await take(one(message.value()))
                elif scenario == "injected":
                    await take_all(as_model(message.value()), message, log, tenant())
                else:
                    await take(as_dict(message.value()))
                    await publish(encode({"ok": True}))
                done[message.partition()] = message.offset() + 1

    def on_assign(consumer: Any, partitions: list[Any]) -> None:
        loop.call_soon_threadsafe(assigned.set)

    consumer.subscribe([address], on_assign=on_assign)
    tasks = [asyncio.create_task(run())]
    if scenario == "publisher":
        tasks.append(asyncio.create_task(asyncio.to_thread(report)))
    await assigned.wait()
    try:
        yield None
    finally:
        stopping = True
        await asyncio.wait(tasks)
        await loop.run_in_executor(pool, consumer.close)


# Millstream and FastStream


def ours(surface: Any, scenario: str, address: str) -> Any:
    from millstream import Batch
    from millstream.kafka import Topic

    extra: dict[str, Any] = {"batch": {"batch": Batch(BATCH, FILL)}, "keys": {"concurrency": LANES}}
    options = {"group_id": f"{address}.group", **extra.get(scenario, {})}
    subscriber = partial(surface.subscriber, Topic(address, declare=False), **options)
    return subscriber, partial(surface.publisher, f"{address}.out")


def faststream(url: str, scenario: str, address: str, client: str = "confluent") -> Running:
    """FastStream on one of its clients; it commits by a timer, before handlers run."""
    broker = importlib.import_module(f"faststream.{client}").KafkaBroker(url, logger=log)
    message = importlib.import_module(f"faststream.{client}.annotations").KafkaMessage
    extra = {"batch": True, "max_records": BATCH} if scenario == "batch" else {}
    options = {"group_id": f"{address}.group", "auto_offset_reset": "earliest", **extra}
    subscriber = partial(broker.subscriber, address, **options)
    publisher = partial(broker.publisher, f"{address}.out")
    declare("faststream", message, scenario, subscriber, publisher)
    return alone(broker, None)


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    **on_millstream("Kafka", ours),
    "faststream": faststream,
    "faststream-aiokafka": partial(faststream, client="kafka"),
}
