"""Wrong uses: both type checkers must refuse exactly the lines marked so."""

from __future__ import annotations

from millstream import AckPolicy, Millstream, Retry
from millstream.memory import MemoryBroker
from millstream.nats import NatsBroker, NatsRouter
from millstream.nats.fastapi import NatsRouter as FastAPIRouter

broker = NatsBroker("nats://127.0.0.1:4222")
router = NatsRouter("prefix.")
web = FastAPIRouter("nats://127.0.0.1:4222")
memory = MemoryBroker()

broker.subscriber("a", concurency=2)  # refused
broker.subscriber("a", concurrency="2")  # refused
broker.subscriber(1)  # refused
broker.subscriber("a", "b", "c")  # refused
broker.subscriber("a", ack_policy="manual")  # refused
broker.subscriber("a", stream=5)  # refused
router.subscriber("a", concurency=2)  # refused
web.subscriber("a", concurency=2)  # refused
memory.subscriber("a", concurency=2)  # refused
broker.publisher()  # refused
broker.publisher("a", subjekt="b")  # refused
broker.publisher("a", timeout="1")  # refused
NatsBroker("nats://127.0.0.1:4222", gracefull_timeout=1)  # refused
NatsBroker("nats://127.0.0.1:4222", graceful_timeout="1")  # refused
NatsBroker(4222)  # refused
Retry(attempts="3")  # refused
Millstream("broker")  # refused


@broker.subscriber("a", ack_policy=AckPolicy.ACK)
async def handle(order: dict[str, int], region: str) -> int:
    return 1


async def use() -> None:
    await handle({}, 1)  # refused
    await handle({})  # refused
    await handle({}, "eu", "x")  # refused
    text: str = await handle({}, "eu")  # refused
    await broker.publish({}, "a", header={})  # refused
    await broker.publish({}, 1)  # refused
    await broker.request({}, "a", timeout="1")  # refused
    print(text)
