"""Reads for one subscription with aiokafka, in tasks of the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as _errors
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from ..driver import SubscriptionSpec
from ..errors import SetupError
from .aio import AioClient, broken, noted, quietly, suited
from .client import MOST, Broken
from .offsets import Commit, Place, Start
from .options import KafkaSubscription
from .plan import LEAVE, STILL, TURN, Owner, Plan

log = logging.getLogger("millstream.kafka")
#: Milliseconds that a member may read nothing: for ever, as its handlers may take any time.
IDLE = 2**31 - 1
_ASSIGNORS: dict[str, Any] = {
    "range": RangePartitionAssignor,
    "roundrobin": RoundRobinPartitionAssignor,
    "sticky": StickyPartitionAssignor,
}
#: Options of a subscription that are arguments of its consumers under the same name.
_SAME = (
    *("group_instance_id", "client_rack", "session_timeout_ms", "heartbeat_interval_ms"),
    *("isolation_level", "fetch_min_bytes", "fetch_max_bytes", "fetch_max_wait_ms"),
    *("max_partition_fetch_bytes", "check_crcs"),
)


def check(spec: SubscriptionSpec) -> None:
    """Raise a :class:`SetupError` for what this library does not know."""
    assert isinstance(spec, KafkaSubscription)
    if spec.group_protocol != "classic":
        raise SetupError(
            f"group_protocol={spec.group_protocol!r} with client='aiokafka'",
            fix="take client='confluent', or the classic protocol",
        )
    for strategy in spec.strategies:
        if isinstance(strategy, str) and strategy not in _ASSIGNORS:
            raise SetupError(
                f"partition_assignment_strategy={strategy!r} with client='aiokafka'",
                fix=f"one of {', '.join(_ASSIGNORS)}, or client='confluent'",
            )
    for name in (spec.config or {}).keys() - suited(AIOKafkaConsumer, spec.config or {}).keys():
        raise SetupError(f"aiokafka's consumer has no setting {name!r}", fix="leave it out")


class AioReader(ConsumerRebalanceListener):  # type: ignore[misc]
    """Reads for one subscription; the same as :class:`millstream.kafka.reader.Reader`."""

    member = None

    def __init__(self, client: AioClient, plan: Plan, owner: Owner) -> None:
        self.client, self.plan, self.owner = client, plan, owner
        spec = plan.spec
        settings: dict[str, Any] = {
            # The others wait for us so long when the group is shared out anew.
            "rebalance_timeout_ms": spec.revoke_timeout_ms + 10_000,
            "max_poll_interval_ms": spec.max_poll_interval_ms or IDLE,
            **client.reading,
            "group_id": plan.group,
            "auto_offset_reset": "none",  # see _begin and _reset
            "metadata_max_age_ms": int(plan.refresh * 1000),
            "exclude_internal_topics": spec.exclude_internal_topics,
        }
        for name in _SAME:
            if getattr(spec, name) is not None:
                settings[name] = getattr(spec, name)
        some = spec.strategies or ["sticky"]
        settings["partition_assignment_strategy"] = [_ASSIGNORS.get(s, s) for s in some]
        self._settings = {**settings, **(spec.config or {})}
        self._consumer: Any = None
        self._most = spec.max_poll_records or MOST
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None
        self._halted: set[Place] = set()
        self._looked = 0.0
        #: Until when (``time.monotonic``) it may be believed that the partitions are ours.
        self.trusted = math.inf
        #: Partitions come: the library tells the group nothing of us meanwhile.
        self._silent = False

    async def start(self) -> None:
        plan = self.plan
        self._consumer = await self.client.patiently(self._open)
        self._looked = time.monotonic()
        if plan.partitions or plan.group is None:
            await self.client.patiently(lambda: self._take(True))
        else:
            if any(topic.startswith("^") for topic in plan.topics):
                some = [t if t.startswith("^") else f"^{re.escape(t)}$" for t in plan.topics]
                without = "|".join(map(re.escape, plan.without))
                pattern = f"(?!(?:{without})$)(?:{'|'.join(some)})" if without else "|".join(some)
                self._consumer.subscribe(pattern=pattern, listener=self)
            else:
                self._consumer.subscribe(plan.topics, listener=self)
            self.trust()
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def _open(self) -> Any:
        consumer = AIOKafkaConsumer(**self._settings)
        try:
            await self.client.asked(consumer.start())
        except BaseException:
            await self._stop(consumer)
            raise
        return consumer

    async def close(self) -> None:
        """Leave the group, after a last commit."""
        # A task of its own: whoever asks may be cancelled meanwhile, as the handler that stops.
        await asyncio.shield(self.client.ending(self._end()))

    async def _end(self) -> None:
        task, self._task = self._task, None
        try:
            while task is not None and not task.done():
                task.cancel()  # the library may swallow it
                await asyncio.wait([task], timeout=TURN)
        finally:
            consumer, self._consumer = self._consumer, None
            if consumer is not None:
                await self._leave(consumer)

    async def _leave(self, consumer: Any) -> None:
        try:
            if self.plan.group is not None and (mine := consumer.assignment()):
                await self._lose(consumer, mine)
        finally:
            await self._stop(consumer)

    async def _stop(self, consumer: Any) -> None:
        await quietly(consumer.stop())
        await quietly(consumer._client.close())  # a stop that fails leaves it open

    def hold(self, full: bool) -> None:
        """Read nothing for now, but stay in the group; or go on."""
        if full:
            self._room.clear()
        else:
            self._room.set()

    def halt(self, place: Place, stop: bool) -> None:
        """The same for one partition."""
        (self._halted.add if stop else self._halted.discard)(place)
        consumer, asked = self._consumer, TopicPartition(*place)
        if consumer is not None and asked in consumer.assignment():
            (consumer.pause if stop else consumer.resume)(asked)

    def trust(self) -> None:
        """The group has confirmed that we are in it."""
        self.trusted = time.monotonic() + STILL

    async def refresh(self) -> None:
        """There is nothing to bring up to date."""

    async def commit(self, commits: Sequence[Commit]) -> None:
        """Returns when the group knows; :class:`Broken` if it does not take it."""
        if self._consumer is None:
            raise Broken("the reader is closed", "_STATE")
        await self._commit(self._consumer, commits)

    async def _commit(self, consumer: Any, commits: Sequence[Commit]) -> None:
        if self._expelled(consumer):
            raise Broken("we are no member of the group any more", "UNKNOWN_MEMBER_ID")
        offsets = {TopicPartition(c.topic, c.partition): (c.offset, noted(c.note)) for c in commits}
        await self.client.asked(consumer.commit(offsets))

    def _expelled(self, consumer: Any) -> bool:
        """Whether the group knows us no more.

        The library would commit as somebody outside of it, which an empty group takes.
        """
        # Nothing public says it.
        return not self.plan.partitions and consumer._coordinator.generation < 0

    async def seek(self, place: Place, offset: int) -> None:
        """Read a partition from there; the owner is told when it is so."""
        if self._consumer is None or TopicPartition(*place) not in self._consumer.assignment():
            raise Broken(f"{place} is not read", "_STATE")
        self._consumer.seek(TopicPartition(*place), offset)
        self.owner.moved(Start(*place, offset, None))

    # Reading

    async def _live(self) -> None:
        consumer, room, wait = self._consumer, self._room, int(TURN * 1000)
        while True:
            now = time.monotonic()
            if now <= self.trusted < math.inf and not self._silent:
                self.trusted = now + STILL
            try:
                if now > self._looked + self.plan.refresh:
                    await self._look()
                if (reading := consumer._fetcher.error_future).done():  # it would say nothing
                    error = reading.exception()
                    reason = (error.__cause__ or error) if error is not None else "it has ended"
                    raise Broken(f"the library reads no more: {reason!r}", "", True)
                if not consumer.assignment():
                    consumer._coordinator.check_errors()  # nothing public does only that
                    await asyncio.sleep(TURN)
                    continue
                if not room.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TURN):
                            await room.wait()
                    continue
                try:
                    found = await consumer.getmany(timeout_ms=wait, max_records=self._most)
                except _errors.OffsetOutOfRangeError as error:
                    await self._reset(consumer, error.args[0])
                    continue
                for messages in found.values():
                    self.owner.arrived(messages)
            except _errors.NoOffsetForPartitionError:
                pass  # where it begins is said in a moment
            except Exception as error:
                problem = error if isinstance(error, Broken) else broken(error)
                # One without a kind has ended the library's work for the group.
                passing = isinstance(error, (_errors.KafkaError, OSError, Broken))
                problem.fatal |= not passing or type(error) is _errors.KafkaError
                log.debug("%s: %s", self.plan.spec.destination, problem, exc_info=not passing)
                self.owner.failed(problem)
                await asyncio.sleep(TURN)

    async def _reset(self, consumer: Any, offsets: Mapping[TopicPartition, int]) -> None:
        """Read on where a partition has messages: it has none where we would go on."""
        places = [Place(p.topic, p.partition) for p in offsets]
        first, last = await self.client.begins(places), await self.client.ends(places)
        for place, offset in zip(places, offsets.values(), strict=True):
            if TopicPartition(*place) not in consumer.assignment():
                continue
            edge = last[place] if self.plan.begin == "latest" else first[place]
            if offset > last[place]:  # what we know of it is of no use
                log.warning(
                    "partition %d of %s ends at %d, before %d, where we are: it was deleted, or "
                    "lost its last messages; reading on from %d",
                    *(place.partition, place.topic, last[place], offset, edge),
                )
                self.owner.fence([place])
                self.halt(place, False)
                await self.seek(place, edge)
            else:  # its oldest messages were deleted; or the one we asked was behind the others
                consumer.seek(TopicPartition(*place), offset if offset >= first[place] else edge)

    async def _look(self) -> None:
        """Look for new partitions, where no group gives us ours, and for topics that are gone."""
        self._looked = time.monotonic()
        plan = self.plan
        if plan.group is None and not plan.partitions:
            await self._take(False)
        elif not plan.topics[0].startswith("^"):
            known = await self.client.layout(plan.topics)
            if gone := {name for name in plan.topics if name not in known}:
                # Among all topics there are none that we may not see; nothing public says more.
                if denied := gone & self._consumer._client.cluster.unauthorized_topics:
                    raise broken(_errors.TopicAuthorizationFailedError(denied))
                raise Broken(f"{', '.join(gone)}: there is no such topic", "UNKNOWN_TOPIC_OR_PART")

    async def _take(self, first: bool) -> None:
        """Take partitions without a group: those given, or all that there are."""
        consumer, plan = self._consumer, self.plan
        mine = consumer.assignment()
        if plan.partitions:
            begin = dict(plan.partitions)
        else:
            single = not plan.topics[0].startswith("^")
            there = await self.client.layout(plan.topics if single else None)
            late = -1 if first and plan.begin == "latest" else -2
            begin = {
                Place(name, number): late
                for name, numbers in there.items()
                if plan.wants(name)
                for number in numbers
                if (name, number) not in mine
            }
        starts = await self._starts(begin)
        if first or starts:
            starts = await self.owner.gained(starts) or starts
        if not starts:
            return
        before = {p: await consumer.position(p) for p in mine}
        consumer.assign([*mine, *(TopicPartition(*s[:2]) for s in starts)])
        for partition, offset in before.items():
            consumer.seek(partition, offset)
        for start in starts:
            consumer.seek(TopicPartition(*start[:2]), start.offset)
        for place in self._halted:
            self.halt(place, True)

    async def _starts(self, begin: Mapping[Place, int]) -> list[Start]:
        """Where partitions begin, as the group or the log tells."""
        told: dict[Place, tuple[int, str]] = {}
        asked = [place for place, offset in begin.items() if offset == -1001]
        if asked and self.plan.group is not None:
            told = await self.client.committed(self.plan.group, asked)
        offsets = {**begin, **{place: offset for place, (offset, _) in told.items()}}
        end = -1001 if self.plan.begin == "latest" else None
        late = [place for place, offset in offsets.items() if offset in (-1, end)]
        offsets |= await self.client.ends(late)
        offsets |= await self.client.begins([p for p, offset in offsets.items() if offset < 0])
        return [
            Start(*p, offset, told[p][1] if p in told else None) for p, offset in offsets.items()
        ]

    # What the library calls while the group is shared out anew

    # Coroutines are allowed, whatever its annotations say.
    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, assigned: Any
    ) -> None:
        consumer = self._consumer
        if consumer is None:
            return
        self.trust()
        self._silent = True
        try:
            await self._begin(consumer, assigned)
        except Exception as error:  # the library would go on without those partitions
            log.debug("%s: not begun", self.plan.spec.destination, exc_info=True)
            self.owner.failed(Broken(f"partitions cannot be begun: {error!r}", "", True))
        finally:
            self._silent = False

    async def _begin(self, consumer: Any, assigned: Any) -> None:
        """Read partitions from where they begin; nothing of them before that is known."""
        consumer.pause(*assigned)
        places = [Place(p.topic, p.partition) for p in assigned]
        while self._consumer is consumer:
            try:
                starts = await self._starts(dict.fromkeys(places, -1001))
                break
            except Broken as error:  # its offsets are not told yet, perhaps
                self.owner.failed(error)
                await asyncio.sleep(TURN)
        else:
            return
        starts = await self.owner.gained(starts) or starts
        for start in starts:
            partition = TopicPartition(*start[:2])
            if partition in consumer.assignment():
                consumer.seek(partition, start.offset)
                if start[:2] not in self._halted:
                    consumer.resume(partition)

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, revoked: Any
    ) -> None:
        if self._consumer is not None and revoked:  # it begins with none
            await self._lose(self._consumer, revoked)

    async def _lose(self, consumer: Any, partitions: Any) -> None:
        places = [Place(p.topic, p.partition) for p in partitions]
        self._halted.difference_update(places)
        commits = await self.owner.losing(places, gone=self._expelled(consumer))
        if commits:
            try:
                async with asyncio.timeout(LEAVE):  # the library would try for ever
                    await self._commit(consumer, commits)
            except (Broken, TimeoutError) as error:
                reason = str(error) or "no answer in time"
                log.warning("the last commit before a partition went was refused: %s", reason)
