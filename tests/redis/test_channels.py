"""Channels: patterns, placeholders, envelopes, requests; and what is wrong with an address."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from redis.asyncio import Redis

from millstream import Path, Response
from millstream.errors import AddressError, NoResponders, PublishError, RemoteError, SetupError
from millstream.redis import (
    BinaryMessageFormatV1,
    JSONMessageFormat,
    MessageFormat,
    PubSub,
    RedisBroker,
    RedisMessage,
    RedisResponse,
)
from millstream.redis.annotations import Pipeline
from millstream.redis.annotations import Redis as Client
from millstream.redis.options import SYNTAX
from tests.helpers import eventually


async def test_placeholders_and_patterns(broker: RedisBroker, client: Redis, name: str) -> None:
    got: list[Any] = []

    @broker.subscriber(f"{name}:order-{{id}}.{{what}}")
    async def placed(body: str, id: int, what: Annotated[str, Path()]) -> None:
        got.append((body, id, what))

    @broker.subscriber(PubSub(f"{name}:l?g[ab]*", pattern=True))
    async def globbed(body: str, message: RedisMessage) -> None:
        got.append((body, message.destination.rpartition(":")[2]))

    await broker.start()
    for channel in ("order-7.paid", "order-7.paid.twice", "order-x", "loga", "lugb.x", "logc"):
        await client.publish(f"{name}:{channel}", channel)
    await eventually(lambda: len(got) == 3)
    await asyncio.sleep(0.1)
    assert sorted(map(str, got)) == [
        "('loga', 'loga')",
        "('lugb.x', 'lugb.x')",
        "('order-7.paid', 7, 'paid')",
    ]


def test_addresses() -> None:
    address = SYNTAX.compile("logs.{level}:{host}")
    assert address.pattern == "logs.*:*"
    assert address.extract("logs.info:a") == {"level": "info", "host": "a"}
    assert address.matches("logs.x:y") and not address.matches("logs.x.z:y")
    assert SYNTAX.compile("stream://a*{b").matches("stream://a*{b")
    for wrong in ("a.{1x}", "{a}.{a}", "a.{}"):
        with pytest.raises(AddressError):
            SYNTAX.compile(wrong)


async def test_a_plain_body_is_plain_on_the_wire(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    async with client.pubsub() as listener:
        await listener.subscribe(name)
        await broker.start()
        assert await broker.publish({"id": 1}, name) == 1
        await broker.publish("text", name)
        await broker.publish("with", name, headers={"tenant": "acme"})
        values = [
            message["data"]
            async for message in _first(listener.listen(), 4)
            if message["type"] == "message"
        ]
    assert values[:2] == [b'{"id":1}', b"text"]
    body, headers = BinaryMessageFormatV1.parse(values[2])
    assert (body, headers["tenant"]) == (b"with", "acme")


async def _first(items: Any, number: int) -> Any:
    async for item in items:
        yield item
        number -= 1
        if not number:
            return


class Shouting(MessageFormat):
    """Somebody's own format."""

    @classmethod
    def encode(cls, body: bytes, headers: Any) -> bytes:
        return b"!" + body.upper()

    @classmethod
    def parse(cls, data: bytes) -> tuple[bytes, dict[str, str]]:
        return data[1:].lower(), {"shouted": "yes"}


@pytest.mark.parametrize("format", [None, BinaryMessageFormatV1, JSONMessageFormat, Shouting])
@pytest.mark.parametrize("kind", ["channel", "list", "stream"])
async def test_formats(redis: Any, name: str, format: Any, kind: str) -> None:
    broker = RedisBroker(redis.url, message_format=format)
    got: list[Any] = []

    @broker.subscriber(**{kind: name})
    async def handler(body: str, message: RedisMessage) -> None:
        got.append((body, dict(message.headers)))

    await broker.start()
    await broker.publish("hello", **{kind: name}, headers={"tenant": "ä"})
    await eventually(lambda: got)
    [(body, headers)] = got
    assert body == "hello"
    assert headers == {"shouted": "yes"} if format is Shouting else headers["tenant"] == "ä"
    await broker.stop()


def test_what_is_no_envelope_is_a_body() -> None:
    whole = BinaryMessageFormatV1.encode(b"x" * 10, {"a": "b"})
    for end in range(len(whole) - 11):
        body, _ = BinaryMessageFormatV1.parse(whole[:end])
        assert body == whole[:end]
    assert BinaryMessageFormatV1.parse(whole) == (b"x" * 10, {"a": "b"})
    assert JSONMessageFormat.parse(b'{"data": 1}') == (b'{"data": 1}', {})


@pytest.mark.parametrize("kind", ["channel", "list", "stream"])
async def test_requests_to_every_kind(
    broker: RedisBroker, second: RedisBroker, name: str, kind: str
) -> None:
    @broker.subscriber(**{kind: name})
    async def handler(body: int) -> Any:
        if body < 0:
            raise ValueError("negative")
        return RedisResponse(body * 2, headers={"who": "me"})

    await broker.start()
    await second.connect()
    if kind == "stream":  # what is new for it begins when it has begun to read
        await asyncio.sleep(0.1)
    reply: Any = await second.request(4, **{kind: name}, correlation_id="c-1")
    assert await reply.decode() == 8
    assert (reply.headers["who"], reply.correlation_id) == ("me", "c-1")
    assert await second.request(5, **{kind: name}, response_model=int) == 10
    if kind != "list":  # the others give up, and say so, at once
        with pytest.raises(RemoteError, match="negative"):
            await second.request(-1, **{kind: name})
    with pytest.raises(NoResponders):
        await second.request(1, f"{name}-nobody")


async def test_answers_go_to_a_stream_that_is_named(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    @broker.subscriber(name)
    async def handler(body: int) -> Any:
        return Response(body + 1)

    await broker.start()
    await broker.publish(1, name, reply_to=f"stream://{name}-answers")

    async def answered() -> Any:
        return await client.xrange(f"{name}-answers")

    [(_, fields)] = await eventually(answered)
    assert fields[b"__data__"] == b"2"


async def test_an_answer_takes_the_options_of_its_response(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    @broker.subscriber(name)
    @broker.publisher(stream=f"{name}-out")
    async def handler(body: int) -> Any:
        return RedisResponse(body + 1, maxlen=100, message_format=BinaryMessageFormatV1)

    await broker.start()
    for n in range(300):
        await broker.publish(n, name, reply_to=f"stream://{name}-answers")

    async def answered() -> Any:
        last = await client.xrevrange(f"{name}-answers", count=1)
        return last and BinaryMessageFormatV1.parse(last[0][1][b"__data__"])[0] == b"300"

    await eventually(answered)
    # Redis trims by whole nodes of a hundred entries.
    assert await client.xlen(f"{name}-answers") < 300
    await broker.publish(7, name, reply_to=f"list://{name}-list")
    await eventually(lambda: client.llen(f"{name}-list"))
    [raw] = await client.lrange(f"{name}-list", 0, -1)
    assert raw == BinaryMessageFormatV1.encode(b"8", {})
    assert await broker.request(7, name, response_model=int) == 8


async def test_a_pipeline_takes_what_is_published(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    done: list[Any] = []

    @broker.subscriber(name)
    async def handler(body: int, pipe: Pipeline, redis: Client) -> None:
        await broker.publish(1, list=f"{name}-l", pipeline=pipe)
        await broker.publish(2, stream=f"{name}-s", pipeline=pipe)
        assert await redis.llen(f"{name}-l") == 0
        done.append(await pipe.execute())

    await broker.start()
    await broker.publish(0, name)
    await eventually(lambda: done)
    assert done[0][0] == 1 and await client.xlen(f"{name}-s") == 1


async def test_a_value_of_another_kind_is_said(
    broker: RedisBroker, client: Redis, name: str
) -> None:
    await client.set(name, "a string")
    await broker.connect()
    with pytest.raises(PublishError, match="another kind of value"):
        await broker.publish(1, list=name)
    with pytest.raises(SetupError, match="nowhere"):
        await broker.publish(1)

    @broker.subscriber(list=name)
    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match="another kind of value"):
        await broker.start()
