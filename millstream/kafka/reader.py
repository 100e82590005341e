"""Reads for one subscription: a consumer of the library in a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from .client import ASK, MOST, Broken, Client, OffsetSpec, broken, partitions
from .offsets import Commit, Place, Start
from .plan import LEAVE, STILL, TURN, Owner, Plan

log = logging.getLogger("millstream.kafka")

#: Seconds for which a full reader waits for room before it pauses at the client.
STALL = 0.5
_SHARING = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.STALE_MEMBER_EPOCH,
}
#: Seconds for which a group may not tell where its partitions begin.
UNDECIDED = 60.0
_UNDECIDED = {
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.UNSTABLE_OFFSET_COMMIT,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
}
#: Errors that come and go while brokers do.
_PASSING = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._PARTITION_EOF,
    KafkaError._TIMED_OUT,
}
_OPTIONS = {
    "group_instance_id": "group.instance.id",
    "client_rack": "client.rack",
    "session_timeout_ms": "session.timeout.ms",
    "heartbeat_interval_ms": "heartbeat.interval.ms",
    "max_poll_interval_ms": "max.poll.interval.ms",
    "isolation_level": "isolation.level",
    "fetch_min_bytes": "fetch.min.bytes",
    "fetch_max_bytes": "fetch.max.bytes",
    "fetch_max_wait_ms": "fetch.wait.max.ms",
    "max_partition_fetch_bytes": "max.partition.fetch.bytes",
    "check_crcs": "check.crcs",
}


_error = operator.methodcaller("error")


class Reader:
    """Reads for one subscription, and tells its :class:`Owner`.

    ``member`` is what the library knows of our place in the group.
    """

    def __init__(self, client: Client, plan: Plan, owner: Owner) -> None:
        self.client, self.plan, self.owner = client, plan, owner
        self.loop = client.loop
        spec = plan.spec
        settings: dict[str, Any] = {
            **client.settings,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": plan.begin,
            "enable.partition.eof": False,
            "group.id": plan.group or f"ms-{id(self):x}",
            "topic.metadata.refresh.interval.ms": int(plan.refresh * 1000),
            "allow.auto.create.topics": False,
            "queued.max.messages.kbytes": 16_384,
            "fetch.queue.backoff.ms": 20,
            "error_cb": client.on_error,
        }
        if spec.group_protocol == "consumer":
            settings["group.protocol"] = "consumer"
        else:
            names = map(_strategy, spec.strategies or ["cooperative-sticky"])
            settings["partition.assignment.strategy"] = ",".join(names)
        for field, name in _OPTIONS.items():
            value = getattr(spec, field)
            if value is not None:
                settings[name] = value
        if plan.topics[:1] and plan.topics[0].startswith("^") and spec.exclude_internal_topics:
            settings["topic.blacklist"] = "^__"
        self.settings = {**settings, **client.config, **(spec.config or {})}
        if plan.without:
            hidden = [self.settings.get("topic.blacklist"), *map(_exactly, plan.without)]
            self.settings["topic.blacklist"] = ",".join(filter(None, hidden))
        self.incremental = spec.group_protocol == "consumer" or "cooperative" in str(
            self.settings.get("partition.assignment.strategy", "")
        )
        self.budget = spec.revoke_timeout_ms / 1000 + 2
        self._most = spec.max_poll_records or MOST
        self._room = threading.Event()
        self._room.set()
        self._stopping = False
        #: Once everything is let go of: the last commit, until the group has it. What the group
        #: still gives is not for the owner any more.
        self._last: list[Commit] | None = None
        self._consumer: Any = None
        #: Until when (``time.monotonic``) it may be believed that the partitions are ours.
        self.trusted = math.inf
        self.member: Any = None
        self._ended: asyncio.Future[None] | None = None
        #: What a callback of the library raised.
        self._raised: Exception | None = None
        #: What is held back, by place.
        self._halted: set[Place] = set()
        #: What the thread is to do, and who waits for it.
        self._orders: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    async def start(self) -> None:
        try:
            self._consumer = Consumer(self.settings)
        except KafkaException as error:
            raise broken(error) from error
        self._ended = self.loop.create_future()
        self.member = self._consumer.consumer_group_metadata()
        try:
            if self.plan.partitions or self.plan.group is None:
                await self.client.ask(self._take, True)
            else:
                self._consumer.subscribe(
                    self.plan.topics,
                    on_assign=self._kept(self._on_assign),
                    on_revoke=self._kept(self._on_revoke),
                    on_lost=self._kept(self._on_lost),
                )
                self.trust()
        except BaseException as error:
            self._ended = None  # there is no thread that would end it
            if isinstance(error, KafkaException):
                raise broken(error) from error
            raise
        threading.Thread(target=self._live, name="kafka-reader", daemon=True).start()

    async def close(self) -> None:
        """Leave the group, after a last commit."""
        self._stopping = True
        self._room.set()
        if self._ended is not None:
            await asyncio.wait([self._ended])
        elif self._consumer is not None:
            await self.client.ask(self._consumer.close)

    def hold(self, full: bool) -> None:
        """Read nothing for now, but stay in the group; or go on."""
        if full:
            self._room.clear()
        else:
            self._room.set()

    def halt(self, place: Place, stop: bool) -> None:
        """The same for one partition."""
        (self._halted.add if stop else self._halted.discard)(place)
        consumer = self._consumer
        change = consumer.pause if stop else consumer.resume
        self._order(functools.partial(change, [TopicPartition(*place)]))

    async def commit(self, commits: Sequence[Commit]) -> None:
        """Returns when the group knows; :class:`Broken` if it does not take it."""
        offsets = partitions(commits)
        commit = functools.partial(self._consumer.commit, offsets=offsets, asynchronous=False)
        for partition in await self._order(commit) or ():
            if partition.error is not None:
                raise broken(partition.error)

    def trust(self) -> None:
        """The group has confirmed that we are in it."""
        self.trusted = time.monotonic() + STILL

    async def refresh(self) -> None:
        """Bring ``member`` up to date."""
        await self._order(self._refresh)

    def _refresh(self) -> None:
        # Only in the reader's thread, or it waits for ever.
        self.member = self._consumer.consumer_group_metadata()

    async def seek(self, place: Place, offset: int) -> None:
        """Read a partition from there; the owner is told when it is so.

        Raises:
            Broken: the partition is not read.
        """
        await self._order(functools.partial(self._seek, place, offset))

    def _seek(self, place: Place, offset: int) -> None:
        self._consumer.seek(TopicPartition(*place, offset))
        # Told behind all that came from the old place, and before what comes from the new.
        self.client.tell(self.owner.moved, Start(*place, offset, None))

    def _order(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Have something done by the reader's thread.

        From another one, librdkafka's blocking calls do not return while that thread polls.
        """
        future: asyncio.Future[Any] = self.loop.create_future()
        future.add_done_callback(_seen)
        if self._ended is None or self._ended.done():
            future.set_exception(Broken("the reader is closed", "_STATE"))
        else:
            self._orders.append((work, future))
        return future

    # In the thread

    def _tick(self) -> None:
        """This thread runs; once it stood still, only the group can say what is ours."""
        now = time.monotonic()
        if now <= self.trusted < math.inf:
            self.trusted = now + STILL

    def _live(self) -> None:
        consumer, tell, room = self._consumer, self.client.tell, self._room
        looked = time.monotonic()
        by_hand = self.plan.group is None and not self.plan.partitions
        try:
            while not self._stopping:
                self._tick()
                if self._orders:
                    self._obey()
                if not room.is_set() and not room.wait(STALL):
                    self._stall()
                elif not self._read() and by_hand and time.monotonic() > looked + self.plan.refresh:
                    looked = time.monotonic()
                    self._take(False)
        except Exception as error:
            log.debug("the reader ended", exc_info=True)
            problem = broken(error)
            tell(self.owner.failed, Broken(str(problem), problem.code, True))
        finally:
            try:
                try:
                    if self.plan.group is not None:
                        self._leave()
                finally:
                    consumer.close()
            except Exception as error:
                log.debug("closing the reader: %r", error)
            tell(_answer, self._ended, None, None)
            self._obey()  # nothing of it can be done any more, and that is said

    def _read(self) -> bool:
        """Hand over what has come; whether there was anything.

        Raises:
            Broken: nothing will come any more.
        """
        first = self._consumer.poll(TURN)
        if self._raised is not None:
            raise self._raised
        if first is None:
            return False
        batch = [first, *self._consumer.consume(self._most - 1, 0)] if self._most > 1 else [first]
        for message in [*filter(_error, batch)]:
            batch.remove(message)
            problem = broken(message.error())
            if message.error().code() in _PASSING:
                continue
            if problem.fatal:
                raise problem
            self.client.tell(self.owner.failed, problem)
        if batch:
            self._room.clear()  # until the owner has seen them
            self.client.tell(self.owner.arrived, batch)
        return True

    def _obey(self) -> None:
        while self._orders:
            work, future = self._orders.popleft()
            result: Any = None
            problem: Broken | None = None
            try:
                result = work()
            except (KafkaException, RuntimeError) as error:
                problem = broken(error)
            self.client.tell(_answer, future, result, problem)

    def _stall(self) -> None:
        """Stay in the group while there is no room for messages."""
        consumer = self._consumer
        held: list[TopicPartition] = []
        while not self._room.is_set() and not self._stopping:
            self._tick()
            new = [p for p in consumer.assignment() if p not in held]
            if new:
                consumer.pause(new)
                held += new
            self._obey()
            message = consumer.poll(TURN)
            if message is not None and message.error() is None:
                self.client.tell(self.owner.arrived, [message])
        mine = consumer.assignment()
        back = [p for p in mine if Place(p.topic, p.partition) not in self._halted]
        if back:
            consumer.resume(back)

    def _take(self, first: bool) -> None:
        """Take partitions without a group: those given, or all that there are."""
        consumer = self._consumer
        if self.plan.partitions:
            new = [TopicPartition(*place, offset) for place, offset in self.plan.partitions]
        else:
            mine = {(p.topic, p.partition) for p in consumer.assignment()}
            topics = consumer.list_topics(timeout=ASK).topics
            late = first and self.plan.begin == "latest"
            new = [
                TopicPartition(name, number, OFFSET_END if late else OFFSET_BEGINNING)
                for name, topic in topics.items()
                if topic.error is None and self.plan.wants(name)
                for number in topic.partitions
                if (name, number) not in mine
            ]
        starts = self._starts(new)
        if first or new:
            self._await(self.owner.gained(starts))
        if new:
            consumer.incremental_assign([TopicPartition(*s[:3]) for s in starts])

    def _starts(self, partitions: list[TopicPartition]) -> list[Start]:
        """Where partitions begin, as the group or the log tells."""
        notes: dict[Place, str | None] = {}
        asked = [p for p in partitions if p.offset == -1001]
        if asked and self.plan.group is not None:
            for p in self._committed(asked):
                if p.offset >= 0:
                    notes[Place(p.topic, p.partition)] = p.metadata or ""
                for mine in partitions:
                    if (mine.topic, mine.partition) == (p.topic, p.partition):
                        mine.offset = p.offset
        late: list[TopicPartition] = []
        early: list[TopicPartition] = []
        for p in partitions:
            if p.offset == OFFSET_END or (p.offset == -1001 and self.plan.begin == "latest"):
                late.append(p)
            elif p.offset < 0:
                early.append(p)
        for some, edge in ((late, OffsetSpec.latest()), (early, OffsetSpec.earliest())):
            found = self.client.edges([Place(p.topic, p.partition) for p in some], edge)
            for p in some:
                p.offset = found[Place(p.topic, p.partition)]
        return [
            Start(p.topic, p.partition, p.offset, notes.get(Place(p.topic, p.partition)))
            for p in partitions
        ]

    def _committed(self, asked: list[TopicPartition]) -> list[TopicPartition]:
        """What the group was told last of partitions.

        It does not say that as long as a transaction is open that an owner left by dying.
        """
        end = time.monotonic() + UNDECIDED
        while True:
            try:
                found: list[TopicPartition] = self._consumer.committed(asked, timeout=ASK)
                for p in found:
                    if p.error is not None:
                        raise KafkaException(p.error)
                return found
            except KafkaException as error:
                late = error.args[0].code() not in _UNDECIDED or time.monotonic() > end
                if late or self._stopping:
                    raise
                self.client.tell(self.owner.failed, broken(error))
                self._tick()
                self._obey()

    def _kept(self, callback: Callable[[Any, list[TopicPartition]], None]) -> Any:
        """A callback for the library, which would make no exception of what is raised in it."""

        def call(consumer: Any, partitions: list[TopicPartition]) -> None:
            try:
                callback(consumer, partitions)
            except Exception as error:
                self._raised = error

        return call

    def _on_assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        if self._last is not None:
            assign = consumer.incremental_assign if self.incremental else consumer.assign
            assign(partitions)
            return
        self._refresh()
        starts = self._starts([TopicPartition(p.topic, p.partition) for p in partitions])
        starts = self._await(self.owner.gained(starts)) or starts
        begin = [TopicPartition(s.topic, s.partition, s.offset) for s in starts]
        if self.incremental:
            consumer.incremental_assign(begin)
        else:
            consumer.assign(begin)

    def _on_revoke(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        places = [Place(p.topic, p.partition) for p in partitions]
        self._commit_last(self._losing(places, gone=False))

    def _on_lost(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        self._losing([Place(p.topic, p.partition) for p in partitions], gone=True)

    def _losing(self, places: list[Place], *, gone: bool) -> list[Commit]:
        if self._last is not None:
            return [c for c in self._last if Place(c.topic, c.partition) in places]
        self._halted.difference_update(places)
        commits = self._await(self.owner.losing(places, gone=gone))
        self._obey()  # an older commit that came after the last one would undo it
        if commits is None:  # the loop is stuck, and the group does not wait
            self.owner.fence(places)
        return commits or []

    def _leave(self) -> None:
        """Let go of everything; where the group is being shared out anew, with patience.

        A commit that is refused would make this look like a crash to the next owner.
        """
        consumer, end = self._consumer, time.monotonic() + LEAVE
        places = [Place(p.topic, p.partition) for p in consumer.assignment()]
        self._last = self._losing(places, gone=False)
        while self._last:
            try:
                consumer.commit(offsets=partitions(self._last), asynchronous=False)
                self._last = []
            except KafkaException as error:
                if error.args[0].code() not in _SHARING or time.monotonic() > end:
                    log.warning("the last commit was refused: %s", error)
                    self._last = []
                    return
                consumer.poll(TURN)  # until the group has shared out; what it takes is committed
                mine = {(p.topic, p.partition) for p in consumer.assignment()}
                self._last = [c for c in self._last if c[:2] in mine]

    def _commit_last(self, commits: list[Commit]) -> None:
        if commits:
            try:
                self._consumer.commit(offsets=partitions(commits), asynchronous=False)
            except KafkaException as error:
                log.warning("the last commit before a partition went was refused: %s", error)

    def _await(self, work: Any) -> Any:
        """Wait for something on the loop."""
        try:
            future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # the loop is closed
            work.close()
            return None
        end = time.monotonic() + self.budget
        try:
            while True:
                try:
                    return future.result(0.02)
                except TimeoutError:
                    if future.done() or time.monotonic() > end:
                        raise
                    self._tick()
                    self._obey()  # it may wait for one of its orders
        except Exception as error:
            log.debug("on the loop: %r", error)
            return None


def _answer(future: asyncio.Future[Any], result: Any, problem: Broken | None) -> None:
    if future.done():
        return
    if problem is not None:
        future.set_exception(problem)
    else:
        future.set_result(result)


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _exactly(topic: str) -> str:
    """A regular expression of librdkafka's for one topic."""
    return "^" + topic.replace(".", r"\.") + "$"


def _strategy(strategy: Any) -> str:
    """librdkafka's name of a strategy."""
    name = str(getattr(strategy, "name", strategy))
    return {"sticky": "cooperative-sticky"}.get(name, name)
