"""One contender in one scenario, in a process of its own; started by bench.py.

It subscribes, prints ``ready``, then for each line ``n`` on standard input handles n messages
(or makes n requests) and prints the CPU seconds of this process and the seconds they took.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel

#: Yields the work of one round where the contender drives itself; None where messages come.
Contender = AsyncIterator[Callable[[int], Awaitable[None]] | None]

log = logging.getLogger("bench")
log.setLevel(logging.WARNING)


class Item(msgspec.Struct):
    name: str
    price: float


class Order(msgspec.Struct):
    id: int
    customer: str
    items: list[Item]


class ItemModel(BaseModel):
    name: str
    price: float


class OrderModel(BaseModel):
    id: int
    customer: str
    items: list[ItemModel]


class Counter:
    """Counts handled messages down; the one thing every handler does."""

    def __init__(self) -> None:
        self.left = 0
        self.done = asyncio.Event()

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()

    def expect(self, n: int) -> None:
        self.left = n
        self.done.clear()


handled = Counter()


def tenant() -> str:
    return "t"


# raw nats-py: a callback with the same decoder and nothing around it


@asynccontextmanager
async def raw(url: str, scenario: str, subject: str) -> Contender:
    import nats
    from nats.aio.msg import Msg

    client = await nats.connect(url)
    encode = msgspec.json.Encoder().encode
    as_dict = msgspec.json.Decoder(dict[str, Any]).decode
    as_struct = msgspec.json.Decoder(Order).decode
    as_model = OrderModel.__pydantic_validator__.validate_json

    async def take(order: Any) -> None:
        handled()

    async def take_all(order: OrderModel, msg: Msg, logger: logging.Logger, who: str) -> None:
        handled()

    async def with_dict(msg: Msg) -> None:
        await take(as_dict(msg.data))

    async def with_struct(msg: Msg) -> None:
        await take(as_struct(msg.data))

    async def with_model(msg: Msg) -> None:
        await take(as_model(msg.data))

    async def injected(msg: Msg) -> None:
        await take_all(as_model(msg.data), msg, log, tenant())

    async def publishing(msg: Msg) -> None:
        await take(as_dict(msg.data))
        await client.publish("bench.out", encode({"ok": True}))

    async def replying(msg: Msg) -> None:
        await client.publish(msg.reply, encode({"id": as_dict(msg.data)["id"]}))

    callbacks = {
        "dict": with_dict,
        "msgspec": with_struct,
        "pydantic": with_model,
        "injected": injected,
        "publisher": publishing,
        "request": replying,
    }
    await client.subscribe(subject, cb=callbacks[scenario])
    await client.flush()
    body = {"id": 7}

    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await client.request(subject, encode(body), timeout=5)
            as_dict(answer.data)

    try:
        yield requests if scenario == "request" else None
    finally:
        await client.close()


# Millstream, alone and inside FastAPI: the same declarations on two surfaces


def declare(surface: Any, scenario: str, subject: str) -> None:
    from millstream import Depends, Logger
    from millstream.nats import NatsMessage

    if scenario == "dict":

        @surface.subscriber(subject)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @surface.subscriber(subject)
        async def with_struct(order: Order) -> None:
            handled()

    elif scenario == "pydantic":

        @surface.subscriber(subject)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @surface.subscriber(subject)
        async def injected(
            order: OrderModel,
            message: NatsMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @surface.subscriber(subject)
        @surface.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @surface.subscriber(subject)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    elif scenario == "jetstream":

        @surface.subscriber(subject, stream="BENCH", durable="d", concurrency=1)
        async def pulled(order: dict[str, Any]) -> None:
            handled()


def requesting(broker: Any, subject: str) -> Callable[[int], Awaitable[None]]:
    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, subject, timeout=5)
            await answer.decode()

    return requests


@asynccontextmanager
async def millstream(url: str, scenario: str, subject: str) -> Contender:
    from millstream.nats import NatsBroker

    broker = NatsBroker(url)
    declare(broker, scenario, subject)
    await broker.start()
    await broker.ping()
    try:
        yield requesting(broker, subject) if scenario == "request" else None
    finally:
        await broker.stop()


@asynccontextmanager
async def fastapi(url: str, scenario: str, subject: str) -> Contender:
    from fastapi import FastAPI

    from millstream.nats.fastapi import NatsRouter

    router = NatsRouter(url)
    declare(router, scenario, subject)
    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        await router.broker.ping()
        yield requesting(router.broker, subject) if scenario == "request" else None


@asynccontextmanager
async def faststream(url: str, scenario: str, subject: str) -> Contender:
    from faststream import Depends, Logger  # pyright: ignore[reportMissingImports]
    from faststream.nats import (  # pyright: ignore[reportMissingImports]
        JStream,
        NatsBroker,
        NatsMessage,
        PullSub,
    )

    # Its access log (two lines a message by default) is off, so that work is compared.
    broker = NatsBroker(url, logger=log)
    if scenario == "dict":

        @broker.subscriber(subject)
        async def with_dict(order: dict[str, Any]) -> None:
            handled()

    elif scenario == "msgspec":

        @broker.subscriber(subject)
        async def with_struct(order: dict[str, Any]) -> None:
            # It decodes JSON by itself; the conversion is what a user would write.
            msgspec.convert(order, Order)
            handled()

    elif scenario == "pydantic":

        @broker.subscriber(subject)
        async def with_model(order: OrderModel) -> None:
            handled()

    elif scenario == "injected":

        @broker.subscriber(subject)
        async def injected(
            order: OrderModel,
            message: NatsMessage,
            logger: Logger,
            who: Annotated[str, Depends(tenant)],
        ) -> None:
            handled()

    elif scenario == "publisher":

        @broker.subscriber(subject)
        @broker.publisher("bench.out")
        async def publishing(order: dict[str, Any]) -> dict[str, Any]:
            handled()
            return {"ok": True}

    elif scenario == "request":

        @broker.subscriber(subject)
        async def replying(order: dict[str, Any]) -> dict[str, Any]:
            return {"id": order["id"]}

    elif scenario == "jetstream":

        @broker.subscriber(
            subject,
            stream=JStream("BENCH", declare=False),
            durable="d",
            pull_sub=PullSub(batch_size=100, batch=False),
        )
        async def pulled(order: dict[str, Any]) -> None:
            handled()

    await broker.start()
    await broker.ping(5)
    try:
        yield requesting(broker, subject) if scenario == "request" else None
    finally:
        await broker.stop()


# JetStream without a framework


@asynccontextmanager
async def fetch(url: str, scenario: str, subject: str) -> Contender:
    """What nats-py offers: fetch a batch, acknowledge each."""
    import nats
    from nats.errors import TimeoutError as NatsTimeout

    client = await nats.connect(url)
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    subscription = await client.jetstream().pull_subscribe(subject, durable="d", stream="BENCH")

    async def pull() -> None:
        while True:
            try:
                messages = await subscription.fetch(100, timeout=5)
            except NatsTimeout:
                continue
            for message in messages:
                decode(message.data)
                await message.ack()
                handled()

    task = asyncio.create_task(pull())
    try:
        yield None
    finally:
        task.cancel()
        await client.close()


@asynccontextmanager
async def bare(url: str, scenario: str, subject: str) -> Contender:
    """The least that works on nats-py's connection: an inbox, requests for more, acks."""
    import nats
    from nats.aio.msg import Msg
    from nats.js.api import AckPolicy, ConsumerConfig

    client = await nats.connect(url)
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    await client.jetstream().add_consumer(
        "BENCH",
        ConsumerConfig(durable_name="d", ack_policy=AckPolicy.EXPLICIT, filter_subject=subject),
    )
    inbox = client.new_inbox()
    ask = json.dumps({"batch": 200, "expires": 30_000_000_000}).encode()
    ordered = 0

    async def take(message: Msg) -> None:
        nonlocal ordered
        if not message.reply:
            return
        decode(message.data)
        await client.publish(message.reply, b"+ACK")
        handled()
        ordered -= 1
        if ordered == 100:
            await more()

    async def more() -> None:
        nonlocal ordered
        ordered += 200
        await client.publish("$JS.API.CONSUMER.MSG.NEXT.BENCH.d", ask, reply=inbox)

    await client.subscribe(inbox, cb=take)
    await more()
    try:
        yield None
    finally:
        await client.close()


CONTENDERS: dict[str, Any] = {
    "raw": raw,
    "millstream": millstream,
    "fastapi": fastapi,
    "faststream": faststream,
    "fetch": fetch,
    "bare": bare,
}


async def main(name: str, scenario: str, subject: str, url: str) -> None:
    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    async with CONTENDERS[name](url, scenario, subject) as work:
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            n = int(line)
            handled.expect(n)
            say("go")
            cpu, wall = time.process_time(), time.perf_counter()
            if work is not None:
                await work(n)
            else:
                await handled.done.wait()
            say({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
