"""A process that consumes one topic and produces into another, exactly once.

Arguments: the server, both topics, the transactional id.
"""

from __future__ import annotations

import asyncio
import sys

from millstream import Millstream
from millstream.kafka import KafkaBroker, Topic

url, topic, out, name = sys.argv[1:5]
broker = KafkaBroker(url, transactional_id=name, transaction_timeout_ms=3000)


@broker.subscriber(
    Topic(topic, 2),
    group_id=topic,
    concurrency=4,
    session_timeout_ms=1500,
    heartbeat_interval_ms=200,
    transaction_interval_ms=30,
)
@broker.publisher(out)
async def handle(body: int) -> int:
    await asyncio.sleep(0.005)
    return body


asyncio.run(Millstream(broker).run())
