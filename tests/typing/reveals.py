"""What editors show: each option of a declaration, though it is written once, in its Spec.

A comment says what both type checkers have to show in the line below it.
"""

from __future__ import annotations

from millstream.memory import MemoryBroker
from millstream.nats import NatsBroker, NatsRouter
from millstream.nats.fastapi import NatsRouter as FastAPIRouter

broker = NatsBroker("nats://127.0.0.1:4222")
# shows: subject: str; queue: str; concurrency: int; durable:; kv_watch:; retry:
reveal_type(broker.subscriber)
# shows: subject: str; queue: str; concurrency: int; durable:
reveal_type(NatsRouter("p").subscriber)
# shows: subject: str; queue: str; concurrency: int
reveal_type(FastAPIRouter("nats://x").subscriber)
# shows: concurrency: int; ack_policy:
reveal_type(MemoryBroker().subscriber)
# shows: subject: str; stream:; headers:
reveal_type(broker.publisher)
# shows: message:; subject: str; headers:; correlation_id:; timeout:
reveal_type(broker.publish)
# shows: message:; subject: str; timeout:
reveal_type(broker.request)


@broker.subscriber("a")
async def handle(order: dict[str, int], region: str) -> int:
    return 1


# shows: order: dict; region: str; int
reveal_type(handle)
