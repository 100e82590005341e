"""What editors show: each option of a declaration, though it is written once, in its Spec."""

from __future__ import annotations

from millstream.memory import MemoryBroker
from millstream.nats import NatsBroker, NatsRouter
from millstream.nats.fastapi import NatsRouter as FastAPIRouter

broker = NatsBroker("nats://127.0.0.1:4222")
reveal_type(broker.subscriber)  # shows: subject: str; queue: str; concurrency: int; durable:; kv_watch:; retry:
reveal_type(NatsRouter("p").subscriber)  # shows: subject: str; queue: str; concurrency: int; durable:
reveal_type(FastAPIRouter("nats://x").subscriber)  # shows: subject: str; queue: str; concurrency: int
reveal_type(MemoryBroker().subscriber)  # shows: concurrency: int; ack_policy:
reveal_type(broker.publisher)  # shows: subject: str; stream:; headers:
reveal_type(broker.publish)  # shows: message:; subject: str; headers:; correlation_id:; timeout:
reveal_type(broker.request)  # shows: message:; subject: str; timeout:


@broker.subscriber("a")
async def handle(order: dict[str, int], region: str) -> int:
    return 1


reveal_type(handle)  # shows: order: dict; region: str; int
