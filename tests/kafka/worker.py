"""A process that handles messages of one topic, and dies of those that say so.

Arguments: the server, the topic, the file to note bodies in, the number of lanes.
"""

from __future__ import annotations

import asyncio
import os
import sys

from millstream import Millstream, Retry
from millstream.kafka import KafkaBroker, KafkaMessage, Topic

url, topic, notes, lanes = sys.argv[1:5]
broker = KafkaBroker(url)


@broker.subscriber(
    Topic(topic, 4),
    group_id=topic,
    concurrency=int(lanes),
    session_timeout_ms=1500,
    heartbeat_interval_ms=200,
    auto_commit_interval_ms=200,
    retry=Retry(attempts=3, delay=0.01),
)
async def handle(body: str, message: KafkaMessage) -> None:
    key = (message.key or b"").decode()
    with open(notes, "a") as file:
        file.write(f"{body} {key} {message.delivery_count}\n")
    if body == "killer":
        os._exit(9)
    await asyncio.sleep(0.01)


asyncio.run(Millstream(broker).run())
