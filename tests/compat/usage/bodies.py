"""Several arguments, parsers and decoders."""

import json

from faststream.nats import NatsBroker, NatsMessage, TestNatsBroker
from pydantic import Field

broker = NatsBroker("nats://localhost:4222")
seen = []


@broker.subscriber("fields")
async def fields(name: str, user_id: int = Field(..., ge=1), tags: list[str] = ()):
    seen.append((name, user_id, list(tags)))


async def upper(msg: NatsMessage, original) -> dict:
    body = await original(msg)
    return {k: v.upper() for k, v in body.items()}


def by_hand(msg: NatsMessage) -> dict:
    return {"name": json.loads(msg.body)["name"] + "!"}


@broker.subscriber("decoded", decoder=upper)
async def decoded(body: dict):
    seen.append(body)


@broker.subscriber("by-hand", decoder=by_hand)
async def handmade(body: dict):
    seen.append(body)


async def parse(msg, original) -> NatsMessage:
    message = await original(msg)
    seen.append(type(message).__name__)
    return message


@broker.subscriber("parsed", parser=parse)
async def parsed(body: bytes):
    seen.append(body)


@broker.subscriber("untyped")
async def untyped(body):
    seen.append(body)


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish({"name": "ada", "user_id": 1}, "fields")
        await test.publish({"name": "ada", "user_id": 1, "tags": ["a"]}, "fields")
        assert seen == [("ada", 1, []), ("ada", 1, ["a"])]
        seen.clear()
        await test.publish({"name": "ada"}, "decoded")
        await test.publish({"name": "ada"}, "by-hand")
        assert seen == [{"name": "ADA"}, {"name": "ada!"}]
        seen.clear()
        await test.publish(b"bytes", "parsed")
        assert seen == ["NatsMessage", b"bytes"]
        seen.clear()
        await test.publish({"a": [1]}, "untyped")
        await test.publish("text", "untyped")
        assert seen == [{"a": [1]}, "text"]
