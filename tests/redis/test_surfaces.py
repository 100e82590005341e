"""The test broker, FastAPI, routers, annotations and names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from millstream import Depends, Logger, Retry
from millstream.errors import CapabilityError, SetupError
from millstream.redis import (
    ListSub,
    PubSub,
    RedisBroker,
    RedisPublisher,
    RedisRoute,
    RedisRouter,
    StreamSub,
    TestRedisBroker,
)
from millstream.redis.annotations import Redis, RedisListMessage, RedisMessage
from millstream.redis.annotations import RedisBroker as Broker
from millstream.redis.fastapi import RedisRouter as HttpRouter
from tests.helpers import eventually

NOWHERE = "redis://127.0.0.1:1"


async def test_the_test_broker_follows_the_rules_of_redis() -> None:
    broker = RedisBroker(NOWHERE)
    got: list[Any] = []

    @broker.subscriber("logs:{level}")
    @broker.publisher(list="lines")
    async def log(body: str, level: str) -> str:
        got.append(("log", level))
        return body

    @broker.subscriber(list="lines")
    async def line(body: str, message: RedisListMessage) -> None:
        got.append(("line", body, message.destination))

    @broker.subscriber(stream=StreamSub("orders", group="a"), retry=Retry(attempts=2, delay=0.1))
    async def order(body: int) -> int:
        got.append(("order", body))
        return body * 2

    @broker.subscriber("orders")
    async def channel(body: int) -> None:
        got.append(("channel", body))

    async with TestRedisBroker(broker) as test:
        await test.publish("hello", "logs:info")
        id = await test.publish(1, stream="orders")
        assert id.partition("-")[2]
        await test.publish(2, "orders")
        assert await test.request(4, stream="orders", response_model=int) == 8
        with pytest.raises(CapabilityError, match="with_real=True"):
            _ = broker.client
    assert got[:2] == [("log", "info"), ("line", "hello", "list://lines")]
    assert got[2:] == [("order", 1), ("channel", 2), ("order", 4)]


async def test_routers_prefix_every_kind() -> None:
    async def work(body: int) -> int:
        return body

    router = RedisRouter(
        "svc:",
        handlers=[RedisRoute(work, "in", publishers=[RedisPublisher(stream=StreamSub("out"))])],
    )

    @router.subscriber(list=ListSub("jobs"))
    async def job(body: int) -> None: ...

    @router.subscriber(PubSub("l.*", pattern=True))
    async def globbed(body: int) -> None: ...

    @router.subscriber(stream=StreamSub("out", group="g"))
    async def out(body: int) -> None: ...

    broker = RedisBroker(NOWHERE, routers=[router])
    broker.compile()
    assert [s.spec.destination for s in broker.subscriptions] == [
        *("svc:in", "list://svc:jobs", "svc:l.*", "stream://svc:out")
    ]
    assert [p.spec.destination for p in broker.publications] == ["stream://svc:out"]
    async with TestRedisBroker(broker) as test:
        await test.publish(3, "svc:in")
        assert out.mock.call_args.args == (3,)


def test_a_publication_is_to_one_place() -> None:
    for options, text in (
        ({}, "neither"),
        ({"list": "a", "stream": "b"}, "list and stream"),
        ({"channel": PubSub("a.*")}, "pattern"),
    ):
        broker = RedisBroker(NOWHERE)
        with pytest.raises(SetupError, match=text):
            broker.publisher(**options)  # type: ignore[arg-type]
            broker.bind()


async def test_what_a_prefix_leaves_as_it_is(broker: RedisBroker, client: Any, name: str) -> None:
    router = RedisRouter(f"{name}:")

    @router.subscriber("in")
    @router.publisher(list=ListSub("out", batch=True))
    @router.publisher("stream://log")
    async def work(body: int) -> list[int]:
        return [body, body + 1]

    broker.include_router(router)
    await broker.start()
    await broker.publish(1, f"{name}:in")
    await eventually(lambda: client.llen(f"{name}:out"))
    assert await client.lrange(f"{name}:out", 0, -1) == [b"1", b"2"]
    assert await client.xlen(f"{name}:log") == 1


async def test_fastapi(redis: Any, name: str) -> None:
    router = HttpRouter(redis.url)
    got: list[Any] = []

    def tenant() -> str:
        return "acme"

    @router.subscriber(stream=StreamSub(name, group="g"))
    async def order(
        body: dict[str, int],
        message: RedisMessage,
        logger: Logger,
        who: str = Depends(tenant),
    ) -> None:
        got.append((body, message.destination, who))

    @router.post("/orders")
    async def place(id: int, broker: Broker, redis: Redis) -> str:
        assert await redis.ping()
        return str(await broker.publish({"id": id}, stream=name))

    app = FastAPI()
    app.include_router(router)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        entry = (await client.post("/orders", params={"id": 7})).json()
        assert "-" in entry
        await eventually(lambda: got)
    assert got == [({"id": 7}, f"stream://{name}", "acme")]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "redis",
            "BinaryMessageFormatV1 ListSub Pipeline PubSub Redis RedisBroker RedisClusterBroker "
            "RedisMessage RedisPublisher RedisResponse RedisRoute RedisRouter RedisSentinelBroker "
            "RedisStreamMessage StreamSub TestApp TestRedisBroker fastapi",
        ),
        ("redis.annotations", "ContextRepo Logger RedisBroker RedisMessage"),
        ("redis.fastapi", "Logger RedisRouter RedisSentinelRouter"),
        ("redis.message", "PubSubMessage RedisMessage"),
        ("redis.response", "RedisPublishCommand RedisResponse"),
        ("redis.testing", "TestRedisBroker"),
        ("security", "BaseSecurity SASLGSSAPI SASLOAuthBearer SASLPlaintext SASLScram256"),
    ],
)
def test_names_that_people_import(module: str, names: str) -> None:
    found = importlib.import_module(f"millstream.{module}")
    for name in names.split():
        assert getattr(found, name), name
