"""Retry topics: where a failed message waits while those behind it go on.

A topic for each attempt, so that in each all wait equally long and nobody waits behind a slower
one: ``{topic}.{group}.retry.1`` and so on. The group itself reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .message import Record, decoded
from .options import KafkaPublish, KafkaSubscription, Topic

if TYPE_CHECKING:
    from .driver import KafkaDriver

#: How many retry topics a subscription has at most; later attempts share the last.
MOST = 8
#: The headers of a message there: its topic, the attempt that comes, when it is due.
ORIGIN, ATTEMPT, DUE = "ms-retry-topic", "ms-retry-attempt", "ms-retry-due"
_OWN = (ORIGIN, ATTEMPT, DUE)


def names(spec: KafkaSubscription) -> list[str]:
    """The retry topics of a subscription."""
    retry = spec.retry
    if retry is None or retry.where != "topic" or spec.group_id is None:
        return []
    base = spec.destination if not spec.wild else spec.group_id
    base = base.split(",")[0] if not spec.wild else "pattern"
    count = min(retry.attempts - 1, MOST)
    return [f"{base}.{spec.group_id}.retry.{n}" for n in range(1, count + 1)]


def topics(spec: KafkaSubscription) -> list[Topic]:
    """The same as topics to be made, with as many partitions as what they belong to."""
    own = spec.topic_list
    like = own[0] if own and not spec.wild else Topic("")
    return [
        Topic(n, like.num_partitions, like.replication_factor, declare=True) for n in names(spec)
    ]


class Retries:
    """Puts messages into retry topics, and knows those that come from there."""

    def __init__(self, driver: KafkaDriver) -> None:
        self.driver = driver

    async def put(
        self, spec: KafkaSubscription, record: Record, attempt: int, delay: float
    ) -> None:
        """Store a message for its next attempt; returns when that is confirmed."""
        known = names(spec)
        headers = {k: v for k, v in decoded(record.pairs).items() if k not in _OWN}
        headers[ORIGIN] = record.topic
        headers[ATTEMPT] = str(attempt + 1)
        headers[DUE] = f"{self.driver.clock.wall() + delay:.3f}"
        command = KafkaPublish(record.value, known[min(attempt, len(known)) - 1], record.key)
        await self.driver.publish(command, record.value or b"", headers)

    def opened(self, record: Record) -> bool:
        """Whether a message comes from a retry topic; it then looks as it did before."""
        if record.pairs is None or not any(key == DUE for key, _ in record.pairs):
            return False
        headers = decoded(record.pairs)
        record.topic = headers.get(ORIGIN, record.topic)
        record.due = float(headers[DUE])
        record.count += int(headers.get(ATTEMPT, "1")) - 1
        record.unusual = record.unusual or record.count > 1
        record.pairs = [pair for pair in record.pairs if pair[0] not in _OWN] or None
        return True
