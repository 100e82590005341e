"""The ways to publish, answers, and what travels along."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pydantic
import pytest

from millstream import Message, MsgPack, Response, Retry
from millstream.errors import DecodeError, EncodeError, RemoteError, SetupError
from millstream.kafka import KafkaBroker
from millstream.memory import MemoryBroker, MemoryRouter
from millstream.mqtt import MqttBroker
from millstream.nats import NatsBroker
from millstream.rabbit import RabbitBroker
from millstream.redis import RedisBroker
from millstream.testing import TestBroker


class Model(pydantic.BaseModel):
    id: int


class Item(msgspec.Struct):
    model: Model


async def test_four_ways_to_publish() -> None:
    broker = MemoryBroker()
    publisher = broker.publisher("out", headers={"a": "declared", "b": "declared"})
    got: list[Any] = []

    @broker.subscriber("in")
    @publisher
    async def by_object(value: int) -> int:
        return value

    @broker.subscriber("in2")
    @broker.publisher("out")
    async def by_decorator(value: int) -> int:
        return value

    @broker.subscriber("out")
    async def out(value: int, message: Message[Any]) -> None:
        got.append((value, message.headers.get("a"), message.headers.get("b")))

    async with TestBroker(broker) as running:
        await running.publish(1, "out")
        await running.publish(2, "in")
        await running.publish(3, "in2")
        await publisher.publish(4, headers={"b": "own"})
        await running.publish_batch(5, 6, subject="out")
    assert got == [
        (1, None, None),
        (2, "declared", "declared"),
        (3, None, None),
        (4, "declared", "own"),
        (5, None, None),
        (6, None, None),
    ]


async def test_none_publishes_nothing_and_an_empty_response_does() -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handler(value: int) -> Any:
        return None if value else Response(None, headers={"empty": "yes"})

    @broker.subscriber("out")
    async def out(value: bytes, message: Message[Any]) -> None:
        got.append((value, message.headers["empty"]))

    async with TestBroker(broker) as running:
        await running.publish(1, "in")
        await running.publish(0, "in")
    assert got == [(b"", "yes")]


async def test_the_correlation_id_travels() -> None:
    broker = MemoryBroker()
    got: list[Any] = []
    publisher = broker.publisher("out")

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handler(value: int) -> int:
        await publisher.publish(value)
        return value

    @broker.subscriber("made")
    @broker.publisher("out")
    async def made(value: int, message: Message[Any]) -> int:
        got.append(message.correlation_id)
        return value

    @broker.subscriber("own")
    @broker.publisher("out")
    async def own(value: int) -> Response:
        return Response(value, correlation_id="own")

    @broker.subscriber("out")
    async def out(value: int, message: Message[Any]) -> None:
        got.append(message.correlation_id)

    async with TestBroker(broker) as running:
        await running.publish(1, "in", correlation_id="given")
        assert got == ["given", "given"]
        got.clear()
        await running.publish(1, "made")
        assert len(got) == 2
        assert got[0] == got[1]
        got.clear()
        await running.publish(1, "own", correlation_id="given")
        assert got == ["own"]


@pytest.mark.parametrize(
    ("value", "body", "content_type"),
    [
        (b"x", b"x", None),
        (bytearray(b"x"), b"x", None),
        ("ä", "ä".encode(), "text/plain"),
        (None, b"", None),
        ({"a": 1}, b'{"a":1}', None),
        (Model(id=1), b'{"id":1}', None),
        (Item(Model(id=1)), b'{"model":{"id":1}}', None),
        ([Model(id=1)], b'[{"id":1}]', None),
        (1.5, b"1.5", None),
    ],
)
async def test_bodies_are_plain(value: Any, body: bytes, content_type: str | None) -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in")
    async def handler(message: Message[Any]) -> None:
        got.append((message.body, message.content_type))

    async with TestBroker(broker) as running:
        await running.publish(value, "in")
    assert got == [(body, content_type)]


async def test_a_value_without_a_representation() -> None:
    async with TestBroker(MemoryBroker()) as running:
        with pytest.raises(EncodeError, match="object"):
            await running.publish(object(), "in")


async def test_answers() -> None:
    broker = MemoryBroker()

    @broker.subscriber("double")
    async def double(value: int) -> Response:
        if value < 0:
            raise ValueError("negative\nnumber")
        return Response({"id": value * 2}, headers={"x": "y"})

    async with TestBroker(broker) as running:
        answer = await running.request(2, "double")
        assert await answer.decode() == {"id": 4}
        assert answer.headers["x"] == "y"
        assert await running.request(2, "double", response_model=Model) == Model(id=4)
        with pytest.raises(DecodeError, match="the answer"):
            await running.request(2, "double", response_model=list[int])
        with pytest.raises(RemoteError) as caught:
            await running.request(-1, "double")
        assert (caught.value.type, caught.value.text) == ("ValueError", "negative\nnumber")
        publisher = broker.publisher("double")
        assert await publisher.request(3, response_model=Model) == Model(id=6)


async def test_an_answer_takes_the_options_of_its_response() -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handler(value: str) -> Response:
        return Response(
            value, headers={"a": "b"}, subject="elsewhere", content_type="text/x", reply_to="more"
        )

    @broker.subscriber("answers")
    @broker.subscriber("out")
    @broker.subscriber("elsewhere")
    async def seen(value: str, message: Message[Any]) -> None:
        more = (message.content_type, message.reply_to, message.headers["a"])
        got.append((message.destination, *more))

    async with TestBroker(broker) as running:
        await running.publish("x", "in", reply_to="answers", correlation_id="c")
        assert sorted(got) == [
            ("answers", "text/x", "more", "b"),
            ("elsewhere", "text/x", "more", "b"),
        ]
        answer = await running.request("x", "in", timeout=1)
        assert (answer.content_type, answer.headers["a"]) == ("text/x", "b")


async def test_an_unknown_option_of_an_answer_is_told_to_who_asked() -> None:
    broker = MemoryBroker()

    @broker.subscriber("in", retry=Retry(attempts=1))
    async def handler(value: str) -> Response:
        return Response(value, colour="red")

    async with TestBroker(broker) as running:
        with pytest.raises(RemoteError, match="Response has no option 'colour'"):
            await running.request("x", "in", timeout=1)


async def test_an_answer_is_read_by_the_codec_of_the_publisher_that_asked() -> None:
    broker = MemoryBroker()
    router = MemoryRouter(codec=MsgPack())

    @router.subscriber("double")
    async def double(value: Model) -> Model:
        return Model(id=value.id * 2)

    publisher = router.publisher("double")
    broker.include_router(router)
    async with TestBroker(broker):
        assert await publisher.request(Model(id=2), response_model=Model) == Model(id=4)
        answer = await publisher.request(Model(id=3))
        assert await answer.decode() == {"id": 6}


async def test_no_reply_answers_nothing() -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in", no_reply=True)
    async def handler(value: int) -> int:
        return value

    @broker.subscriber("answers")
    async def answers(value: int) -> None:
        got.append(value)

    @broker.subscriber("in2")
    async def answering(value: int) -> int:
        return value

    async with TestBroker(broker) as running:
        await running.publish(1, "in", reply_to="answers")
        await running.publish(2, "in2", reply_to="answers")
    assert got == [2]


async def test_a_subclass_may_have_a_publish_of_its_own() -> None:
    class Counting(MemoryBroker):
        count = 0

        async def publish(self, *args: Any, **options: Any) -> Any:
            self.count += 1
            return await super().publish(*args, **options)

    broker = Counting()
    async with broker:
        await broker.publish(1, "a")
        await broker.publish(2, "a")
    assert broker.count == 2


@pytest.mark.parametrize(
    ("send", "owner"),
    [
        (lambda broker, **o: broker.publish(1, "out", **o), "MemoryBroker.publish"),
        (lambda broker, **o: broker.request(1, "out", **o), "MemoryBroker.request"),
        (
            lambda broker, **o: broker.publish_batch(1, 2, subject="out", **o),
            "MemoryBroker.publish_batch",
        ),
        (lambda broker, **o: broker.publisher("out").publish(1, **o), "publishing to 'out'"),
        (lambda broker, **o: broker.publisher("out").request(1, **o), "publishing to 'out'"),
        (lambda broker, **o: broker.subscriber("out").get_one(**o), "get_one"),
    ],
)
@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("timeuot", "did you mean 'timeout'?"),
        ("no_ack", "message.ack() settles what get_one gave"),
        ("rpc", "request(..., timeout=...) waits for the answer"),
        ("value", "the message is the first argument"),
        ("colour", "one of: "),
    ],
)
async def test_an_unknown_option_of_what_is_sent_or_read(
    send: Callable[..., Awaitable[Any]], owner: str, option: str, fix: str
) -> None:
    broker, got = MemoryBroker(), list[Any]()

    @broker.subscriber("out")
    async def out(value: int) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        with pytest.raises(SetupError) as caught:
            await send(running, **{option: 1})
        await running.publish(3, "out")
    assert (caught.value.code, got) == ("MS120", [3])
    assert caught.value.what == f"{owner} has no option {option!r}"
    assert fix in caught.value.fix and __file__ in caught.value.where


@pytest.mark.parametrize(
    "broker", [KafkaBroker(), MqttBroker(), NatsBroker(), RabbitBroker(), RedisBroker()]
)
@pytest.mark.parametrize("verb", ["publish", "request"])
def test_an_unknown_option_is_told_before_there_is_a_connection(broker: Any, verb: str) -> None:
    with pytest.raises(SetupError, match=f"Broker.{verb} has no option 'colour'"):
        getattr(broker, verb)("body", "out", colour="red")
    with pytest.raises(SetupError, match=f"Broker.{verb}: .*positional"):
        getattr(broker, verb)(*range(9))
