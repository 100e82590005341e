"""JetStream against a real server: durable pull consumers, batches, manual acks, get_one."""

import asyncio
import uuid

from faststream import AckPolicy
from faststream.exceptions import NackMessage
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub

broker = NatsBroker("nats://localhost:4222")
name = uuid.uuid4().hex
stream = JStream(f"S{name}", subjects=[f"{name}.>"])
seen = []
enough = asyncio.Event()


def note(value):
    seen.append(value)
    if len(seen) == 5:
        enough.set()


@broker.subscriber(
    f"{name}.manual", stream=stream, durable="manual", pull_sub=True, ack_policy=AckPolicy.MANUAL
)
async def manual(n: int, msg: NatsMessage):
    note(("manual", n))
    await msg.ack()


@broker.subscriber(f"{name}.again", stream=stream, durable="again", pull_sub=PullSub(batch_size=5))
async def again(n: int, msg: NatsMessage):
    attempt = msg.raw_message.metadata.num_delivered
    note(("again", attempt))
    if attempt == 1:
        raise NackMessage(delay=0.05)


@broker.subscriber(
    f"{name}.batch",
    stream=stream,
    durable="batch",
    pull_sub=PullSub(batch_size=2, timeout=1.0, batch=True),
)
async def batch(numbers: list[int]):
    for n in numbers:
        note(("batch", n))


reader = broker.subscriber(f"{name}.read", stream=stream, durable="read", pull_sub=True)


async def check():
    await broker.start()
    try:
        receipt = await broker.publish(1, f"{name}.manual", stream=stream.name)
        assert receipt.stream == stream.name
        await broker.publish(1, f"{name}.again", stream=stream.name)
        await broker.publish(1, f"{name}.batch", stream=stream.name)
        await broker.publish(2, f"{name}.batch", stream=stream.name)
        await asyncio.wait_for(enough.wait(), 10)
        assert sorted(seen) == [
            ("again", 1),
            ("again", 2),
            ("batch", 1),
            ("batch", 2),
            ("manual", 1),
        ]
        await broker.publish("one", f"{name}.read", stream=stream.name)
        message = await reader.get_one(timeout=5.0)
        assert await message.decode() == "one"
        await message.ack()
        bucket = await broker.key_value(f"kv{name}")
        await bucket.put("key", b"value")
        assert (await bucket.get("key")).value == b"value"
    finally:
        await broker.stop()
