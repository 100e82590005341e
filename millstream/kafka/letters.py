"""Dead letters in a topic.

A log keeps what it has, so a letter is removed by a mark: a record in ``{topic}.removed`` that
names its partition and offset. What lies before the oldest letter that is not removed is deleted
from the log for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from ..errors import NoLetters, NoResponders, SetupError
from ..letters import Letter
from ..message import Link
from ..retry import DeadLetter
from .client import Broken
from .message import KafkaMessage, Record
from .offsets import Place
from .options import KafkaPublish, KafkaSubscription, Topic

if TYPE_CHECKING:
    from ..subscription import Subscription
    from .driver import KafkaDriver


def check_letters(subscription: Subscription) -> None:
    """Raise a :class:`SetupError` for a pattern that would read its own dead letters.

    Only the cluster's brokers do so, where they choose the topics; other clients leave them out.
    """
    spec = subscription.spec
    assert isinstance(spec, KafkaSubscription)
    chosen = spec.group_protocol == "consumer" and spec.group_id is not None
    if not chosen or subscription.failing.dead_letter is None:
        return
    for topic in left_out(spec):
        raise SetupError(
            f"{spec.destination!r} takes {topic!r} too, where its own dead letters go: each would "
            "fail again without end; with group_protocol='consumer' it cannot be said which topics "
            "a pattern does not take",
            where=subscription.where,
            fix="group_protocol='classic', a narrower pattern, or dead_letter=, a topic that it "
            "does not take, or None",
        )


def left_out(spec: KafkaSubscription) -> list[str]:
    """The topics that a pattern would take and is not to: its own dead letters and their marks."""
    letter = spec.buried
    if letter is None or (letter is msgspec.UNSET and spec.group_id is None):
        return []
    named = letter.destination if isinstance(letter, DeadLetter) else None
    topic = named or letters_of(spec)
    return [name for name in (topic, marks_of(topic)) if spec.covers(name)]


def marks_of(topic: str) -> str:
    """Where it is marked which dead letters of a topic are removed."""
    return f"{topic}.removed"


def letters_of(spec: KafkaSubscription) -> str:
    """Where the dead letters of a subscription go that does not say it."""
    text = spec.destination.split(",")[0]
    if spec.wild:
        text = re.sub(r"\\(.)", r"\1", text).replace("*", "any")
        text = re.sub(r"\.{2,}", ".", re.sub(r"[^a-zA-Z0-9._-]", "", text)).strip(".")
    return f"{text}.dlq"


class KafkaLetters:
    """The dead letters of one topic; a letter's id is ``partition-offset``."""

    def __init__(self, driver: KafkaDriver, topic: str) -> None:
        self.driver, self.topic = driver, topic
        self.marks = marks_of(topic)
        self._link = Link(driver, None)

    async def _removed(self) -> set[str]:
        client = self.driver.client
        if not await client.layout([self.marks]):
            return set()
        return {(record.key or b"").decode() async for record in client.scan(self.marks, {})}

    async def _places(self) -> list[Place]:
        found = (await self.driver.client.layout([self.topic])).get(self.topic)
        if found is None:
            raise NoLetters(f"there is no topic {self.topic!r}")
        return [Place(self.topic, number) for number in found]

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        await self._places()
        removed, seen = await self._removed(), 0
        first, starts = 0, dict[Place, int]()
        if after is not None:
            partition, _, offset = after.partition("-")
            first = int(partition)
            starts[Place(self.topic, first)] = int(offset) + 1
        async with contextlib.aclosing(self.driver.client.scan(self.topic, starts)) as found:
            async for record in found:
                if limit is not None and seen >= limit:
                    return
                id = f"{record.partition}-{record.offset}"
                if id in removed or record.partition < first:
                    continue
                seen += 1
                message = KafkaMessage(record, self._link)
                stored = message.timestamp
                assert stored is not None
                yield Letter(id, message, stored)

    async def count(self) -> int:
        return len([letter async for letter in self.read()])

    async def remove(self, id: str) -> bool:
        partition, _, offset = id.partition("-")
        if not (partition.isdecimal() and offset.isdecimal()):
            return False
        known = {letter.id async for letter in self.read()}
        if id not in known:
            return False
        client = self.driver.client
        await client.make([Topic(self.marks, 1, config={"cleanup.policy": "compact"})])
        await self.driver.publish(KafkaPublish(b"", self.marks, id), b"{}", None)
        known.discard(id)
        left = [int(i.partition("-")[2]) for i in known if i.startswith(f"{partition}-")]
        place = Place(self.topic, int(partition))
        before = min(left, default=(await client.ends([place]))[place])
        with contextlib.suppress(Broken):  # it is marked all the same
            await client.cut(place, before)
        return True

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        record: Record = letter.message.raw
        if not await self.driver.client.layout([letter.origin]):
            raise NoResponders(f"there is no topic {letter.origin!r}")
        command = KafkaPublish(letter.message.body, letter.origin, record.key)
        receipt = await self.driver.publish(command, letter.message.body, headers)
        if isinstance(receipt, asyncio.Future):
            await receipt
