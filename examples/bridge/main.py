"""A bridge: a handler on RabbitMQ whose results go to NATS.

    millstream run examples.bridge.main:app     # RABBIT_URL and NATS_URL say where they are

An order is acknowledged on RabbitMQ once the stream has confirmed it. While NATS is away the orders
stay on RabbitMQ, however long that takes: the breaker stops the reading after some failures
and then tries one order at a time, until one gets through. An order that was confirmed and not yet
acknowledged when the process died comes again; the stream knows its id and keeps it once.
"""

from __future__ import annotations

import os

from msgspec import Struct

from millstream import Breaker, Exponential, Millstream, Retry
from millstream.nats import JStream, NatsBroker, NatsResponse
from millstream.rabbit import RabbitBroker


class Order(Struct):
    """What is let through; anything else goes to the dead letters, ``orders.dlq``."""

    id: int
    customer: str
    amount: float


rabbit = RabbitBroker(os.environ.get("RABBIT_URL", "amqp://guest:guest@127.0.0.1:5672/"))
nats = NatsBroker(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), publish_timeout=2.0)
app = Millstream(rabbit, nats)


@rabbit.subscriber(
    "orders",
    concurrency=16,
    # An outage may outlast any number of attempts that one would give a faulty handler.
    retry=Retry(attempts=1_000_000, delay=Exponential(base=0.5, cap=30.0)),
    breaker=Breaker(window=10.0, minimum=5, pause=1.0, longest=10.0),
)
@nats.publisher("orders.accepted", stream=JStream("ORDERS", subjects=["orders.>"]))
async def accept(order: Order) -> NatsResponse:
    """Let the order through, under its own id."""
    return NatsResponse(order, message_id=f"order-{order.id}")
