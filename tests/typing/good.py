"""Right uses: both type checkers must accept every line and see the types that are named."""

from __future__ import annotations

from typing import Annotated, Any, assert_type

from millstream import (
    AckPolicy,
    Context,
    ContextRepo,
    DeadLetter,
    Depends,
    Exponential,
    Header,
    Logger,
    Millstream,
    Response,
    Retry,
    StreamMessage,
)
from millstream.memory import MemoryBroker
from millstream.nats import JStream, NatsBroker, NatsMessage, NatsRouter, PullSub, TestNatsBroker
from millstream.nats.fastapi import NatsRouter as FastAPIRouter

broker = NatsBroker(
    "nats://127.0.0.1:4222", graceful_timeout=3.0, retry=Retry(attempts=3), dead_letter=None
)
NatsBroker(["nats://a:4222", "nats://b:4222"], ack_policy=AckPolicy.MANUAL)
router = NatsRouter("prefix.", ack_policy=AckPolicy.ACK)
web = FastAPIRouter("nats://127.0.0.1:4222")
app = Millstream(broker, title="typed")


def tenant(message: NatsMessage) -> str:
    return message.headers["tenant"]


@broker.subscriber(
    "orders.{region}",
    "billing",
    stream=JStream("ORDERS"),
    durable="d",
    pull_sub=PullSub(batch_size=10),
    concurrency=4,
    ordered_by="customer",
    retry=Retry(attempts=3, delay=Exponential(0.5, cap=10)),
    dead_letter=DeadLetter("orders.dead"),
    dependencies=[Depends(tenant)],
)
async def bill(
    order: dict[str, int],
    region: str,
    logger: Logger,
    message: NatsMessage,
    context: ContextRepo,
    who: Annotated[str, Depends(tenant)],
    trace: Annotated[str, Header("trace", default="")],
    raw: Any = Context("message.raw_message"),
) -> int:
    logger.info("%s", order)
    assert_type(await message.ack(), bool)
    assert_type(message.body, bytes)
    assert_type(message.correlation_id, str)
    return 1


@broker.subscriber("plain")
def plain(text: str) -> str:
    return text


# A handler keeps its signature.
assert_type(plain("x"), str)


@router.subscriber("routed", queue="q")
@router.publisher("out", headers={"a": "b"})
async def routed(text: str) -> Response:
    return Response(text, headers={"x": "y"})


@web.subscriber("orders.{region}")
@web.publisher("invoices")
async def invoice(order: dict[str, int], region: str) -> dict[str, int]:
    return order


subscriber = broker.subscriber("filtered")


@subscriber(filter=lambda message: message.content_type == "text/plain")
async def filtered(text: str) -> None: ...


out = broker.publisher("out", stream="S")
memory = MemoryBroker(graceful_timeout=1.0)


@memory.subscriber("in.{name}", concurrency=2)
async def in_memory(body: bytes, name: str) -> None: ...


async def use() -> None:
    assert_type(await filtered("x"), None)
    assert_type(await routed("x"), Response)
    assert_type(await invoice({}, region="eu"), dict[str, int])
    await broker.publish({"a": 1}, "orders.eu", headers={"a": "b"}, stream="ORDERS", timeout=1.0)
    await broker.request({"a": 1}, "rpc", timeout=1.0)
    await out.publish({"a": 1})
    message = await subscriber.get_one(timeout=1.0)
    assert_type(message, StreamMessage[Any] | None)
    async for one in subscriber:
        assert_type(one, StreamMessage[Any])
    assert_type(await broker.ping(), bool)
    async with TestNatsBroker(broker) as test:
        assert_type(test, NatsBroker)
        await test.publish("x", "plain")
    async with broker as connected:
        assert_type(connected, NatsBroker)
    await app.run()
