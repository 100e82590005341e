"""Kafka: a group of one topic, message by message, in batches, and many at a time per key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec

from benchmarks.common import (
    FEWER,
    ORDER,
    Contender,
    Order,
    OrderModel,
    Rows,
    Section,
    handled,
    log,
    progress,
    tenant,
)

PACKAGES = ["confluent-kafka", "aiokafka"]
#: Scenario → what its handler does.
CORE = {
    "dict": "a `dict`",
    "msgspec": "a msgspec Struct",
    "pydantic": "a pydantic model",
    "injected": "pydantic + `Logger` + message + sync `Depends`",
    "batch": "lists of up to 500 `dict`s",
    "publisher": "a `dict`, publishes a `dict`, confirmed",
}
NAMES = {
    "raw": "raw confluent-kafka",
    "millstream": "Millstream",
    "fastapi": "Millstream in FastAPI",
    "faststream": "FastStream, confluent",
    "faststream-aiokafka": "FastStream, aiokafka",
}
MANY, PUBLISHED = 60_000, 3_000
FEWER |= {"faststream-aiokafka": FEWER["faststream"]}
#: Messages in a batch; seconds that a batch waits to fill.
BATCH, FILL = 500, 0.2
#: Of the scenario per key: messages, keys, partitions, handlers at a time, seconds of each.
KEYED, KEYS, PARTITIONS, LANES, WORK = 10_000, 2_000, 4, 256, 0.01


class Kafka(Section):
    """On a KRaft server; messages are sent by confluent-kafka in this process."""

    def __init__(self, url: str, peer: str | None, rounds: int, scale: float) -> None:
        from confluent_kafka import Producer

        super().__init__("kafka", url, peer, rounds, scale)
        self.producer: Any = Producer(
            {"bootstrap.servers": url, "linger.ms": 5, "queue.buffering.max.messages": 500_000}
        )

    def make(self, topics: list[str], partitions: int) -> None:
        """Make topics, so that nobody has to wait for one."""
        from confluent_kafka import admin

        administration: Any = admin
        client = administration.AdminClient({"bootstrap.servers": self.url})
        new = [administration.NewTopic(topic, partitions, 1) for topic in topics]
        for future in client.create_topics(new).values():
            future.result(10)

    def run(self, scenario: str) -> Rows:
        """All contenders of one scenario."""
        names = self.contenders("raw", "millstream", "fastapi", "faststream", "faststream-aiokafka")
        topics = [f"bench.{scenario}.{name}" for name in names]
        self.make([*topics, *(f"{topic}.out" for topic in topics)], 1)

        def feed(address: str, n: int) -> None:
            for _ in range(n):
                self.producer.produce(address, ORDER)
            self.producer.flush()

        return self.turns(scenario, names, PUBLISHED if scenario == "publisher" else MANY, feed)

    def keyed(self) -> dict[str, float]:
        """Messages a second, of handlers that wait."""
        names = self.contenders("millstream")
        self.make([f"bench.keys.{name}" for name in names], PARTITIONS)

        def feed(address: str, n: int) -> None:
            for i in range(n):
                self.producer.produce(address, ORDER, key=f"{i % KEYS}")
            self.producer.flush()

        scale, self.scale = self.scale, 1.0  # fewer would not show it
        try:
            rows = self.turns("keys", names, KEYED, feed)
        finally:
            self.scale = scale
        return {name: rate for name, (_, rate) in rows.items()}


def table(results: dict[str, Rows], column: int) -> list[str]:
    """CPU µs (column 0) or messages a second (1)."""
    names = list(results["dict"])
    over = " over raw | FastStream ÷ ours |" if not column else " ours ÷ raw |"
    lines = ["| handler | " + " | ".join(NAMES[n] for n in names) + " |" + over]
    lines.append("|---|" + "--:|" * (len(names) + 2 - column))
    for scenario, rows in results.items():
        raw, ours = rows["raw"][column], rows["millstream"][column]
        if column:
            cells = [f"{rows[n][1]:,.0f}" for n in names] + [f"{ours / raw:.2f}"]
        else:
            cells = [f"{rows[n][0]:.1f}" for n in names] + [f"{ours - raw:+.1f}"]
            cells.append(f"{rows['faststream'][0] / ours:.1f}" if "faststream" in rows else "–")
        lines.append(f"| {CORE[scenario]} | " + " | ".join(cells) + " |")
    return lines


def section(peer: str | None, rounds: int, scale: float) -> list[str]:
    """Run everything and tell the tables."""
    from tests.servers.kafka import KafkaServer

    with KafkaServer() as server:
        bench = Kafka(server.url, peer, rounds, scale)
        results = {}
        for scenario in CORE:
            progress(f"kafka: {scenario}")
            results[scenario] = bench.run(scenario)
        progress("kafka: per key")
        keyed = bench.keyed()
    ideal = LANES / WORK
    return [
        "CPU µs per message (median of the rounds; lower is better):",
        "",
        *table(results, 0),
        "",
        "Messages per second (the sender and the server share the machine):",
        "",
        *table(results, 1),
        "",
        f"{KEYED:,} messages of {KEYS:,} keys over {PARTITIONS} partitions, each handled for",
        f"{WORK * 1000:.0f} ms, {LANES} at a time, in order per key; it begins with the first",
        "message that is sent:",
        "",
        "| | seconds | times the ideal |",
        "|---|--:|--:|",
        f"| the ideal | {KEYED / ideal:.2f} | 1.00 |",
        *(f"| {NAMES[n]} | {KEYED / r:.2f} | {ideal / r:.2f} |" for n, r in keyed.items()),
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
    encode = msgspec.json.Encoder().encode
    as_dict = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct = msgspec.json.Decoder(Order).decode
    as_model = OrderModel.__pydantic_validator__.validate_json
    done: dict[int, int] = {}

    async def take(order: Any) -> None:
        handled()

    async def take_all(order: OrderModel, raw: Any, logger: logging.Logger, who: str) -> None:
        handled()

    async def take_many(orders: list[Any]) -> None:
        for _ in orders:
            handled()

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
                await take_many([as_dict(message.value()) for message in messages])
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


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, address: str) -> None:
    from millstream import Batch, Depends, Logger
    from millstream.kafka import Topic
    from millstream.kafka.annotations import KafkaMessage

    topic = Topic(address, declare=False)
    options: Mapping[str, Any] = {"group_id": f"{address}.group"}
    if scenario == "dict":

        @surface.subscriber(topic, **options)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @surface.subscriber(topic, **options)
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario == "pydantic":

        @surface.subscriber(topic, **options)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @surface.subscriber(topic, **options)
        async def injected(
            order: OrderModel,
            message: KafkaMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "batch":

        @surface.subscriber(topic, **options, batch=Batch(BATCH, FILL))
        async def batches(orders: list[dict[str, Any]]) -> None:
            for _ in orders:
                handled()

    elif scenario == "publisher":

        @surface.subscriber(topic, **options)
        @surface.publisher(f"{address}.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    else:
        assert scenario == "keys"

        @surface.subscriber(topic, **options, concurrency=LANES)
        async def waiting(order: dict[str, Any]) -> None:
            await asyncio.sleep(WORK)
            handled()


@asynccontextmanager
async def millstream(url: str, scenario: str, address: str) -> Contender:
    from millstream.kafka import KafkaBroker

    broker = KafkaBroker(url)
    declare(broker, scenario, address)
    await broker.start()
    try:
        yield None
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, address: str) -> Contender:
    from fastapi import FastAPI

    from millstream.kafka.fastapi import KafkaRouter

    router = KafkaRouter(url)
    declare(router, scenario, address)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        yield None


# FastStream, on both of its clients; it commits by a timer, before handlers run


@asynccontextmanager
async def faststream_on(
    module: Any, message_type: Any, url: str, scenario: str, address: str
) -> Contender:
    from faststream import Depends, Logger  # pyright: ignore[reportMissingImports]

    # Its access log (two lines a message by default) is off, so that work is compared.
    broker = module.KafkaBroker(url, logger=log)
    options: dict[str, Any] = {
        "group_id": f"{address}.group",
        "auto_offset_reset": "earliest",
    }
    if scenario == "batch":
        options |= {"batch": True, "max_records": BATCH}
    subscriber = broker.subscriber(address, **options)
    if scenario == "dict":

        @subscriber
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @subscriber
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario == "pydantic":

        @subscriber
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @subscriber
        async def injected(
            order: OrderModel,
            message: message_type,  # pyright: ignore[reportInvalidTypeForm]
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "batch":

        @subscriber
        async def batches(orders: list[dict[str, Any]]) -> None:
            for _ in orders:
                handled()

    else:

        @subscriber
        @broker.publisher(f"{address}.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    await broker.start()
    try:
        yield None
    finally:
        await broker.stop()


def faststream(url: str, scenario: str, address: str) -> Any:
    from faststream import confluent  # pyright: ignore[reportMissingImports]
    from faststream.confluent.annotations import (  # pyright: ignore[reportMissingImports]
        KafkaMessage,
    )

    return faststream_on(confluent, KafkaMessage, url, scenario, address)


def faststream_aiokafka(url: str, scenario: str, address: str) -> Any:
    from faststream import kafka  # pyright: ignore[reportMissingImports]
    from faststream.kafka.annotations import KafkaMessage  # pyright: ignore[reportMissingImports]

    return faststream_on(kafka, KafkaMessage, url, scenario, address)


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
    "faststream-aiokafka": faststream_aiokafka,
}
