"""confluent-kafka behind the engine: its blocking calls in threads, whole batches across.

One thread reads for each subscription and one hands over delivery reports; no message pays for a
hop between threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import operator
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import admin as _administration

from .. import killpoints
from ..letters import REPLAY_TO
from .client import Broken, Owner, Pairs, Plan, Refused, Start
from .message import Bundle, Record, RecordMetadata
from .offsets import Commit, Partition, Place
from .options import Topic

_admin: Any = _administration
AdminClient, NewTopic, OffsetSpec = _admin.AdminClient, _admin.NewTopic, _admin.OffsetSpec
log = logging.getLogger("millstream.kafka")

#: Messages that cross from the reader's thread at once.
MOST = 2000
#: Seconds that the reader waits for something new before it looks at what else is to be done.
TURN = 0.1
#: Seconds for which a full reader waits for room before it pauses at the client.
STALL = 0.5
#: Seconds for one question to the cluster.
ASK = 5.0
#: Seconds between two looks whether we were refused.
GREET = 0.5
#: Seconds for which a last commit is tried while the group is being shared out anew.
LEAVE = 2.0
_SHARING = {
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.STALE_MEMBER_EPOCH,
}
#: What a broker says of a partition while its leader is chosen.
_MOVING = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
}
#: Errors that come and go while brokers do.
_PASSING = {
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._PARTITION_EOF,
    KafkaError._TIMED_OUT,
}


def broken(error: BaseException) -> Broken:
    """What an error of the library is called here."""
    inner = error.args[0] if isinstance(error, KafkaException) else error
    if isinstance(inner, KafkaError):
        return Broken(inner.str(), inner.name(), inner.fatal())
    return Broken(str(error))


_topic, _number = operator.methodcaller("topic"), operator.methodcaller("partition")


def _ours(pairs: Any) -> bool:
    """Whether headers say something of how a message is to be handled."""
    return any(key.startswith("ms-") for key, _ in pairs or ())


def _mark(record: Record) -> None:
    if any(key == REPLAY_TO for key, _ in record.pairs or ()):
        record.marked = record.unusual = True


class ConfluentClient:
    """A producer, an administrator and readers.

    Args:
        settings: librdkafka's, of everything.
        producing: of the producer besides.
        consuming: of readers besides.
        down: called on the loop with a reason when no broker is reached any more.
        transaction_timeout_ms: how long a transaction may be open.
    """

    @staticmethod
    def records(messages: list[Any], parts: Mapping[Any, Partition]) -> list[Record]:
        found: list[Record] = []
        part: Partition | None = None
        topic, number = "", -1
        for message in messages:
            if message.partition() != number or message.topic() != topic:  # they come in runs
                topic, number = message.topic(), message.partition()
                part = parts.get((topic, number))
            if part is None:
                continue
            offset, pairs = message.offset(), message.headers()
            made = Record(
                part, topic, number, offset, message.value(), message.key(), pairs, message
            )
            if pairs:
                _mark(made)
            if part.plain and offset >= part.next:
                part.next = offset + 1
                part.open.append(made)
            elif not part.admit(made):
                continue
            found.append(made)
        return found

    @classmethod
    def bundles(
        cls, messages: list[Any], parts: Mapping[Any, Partition], size: int
    ) -> list[Record]:
        found: list[Record] = []
        for topic, same in itertools.groupby(messages, _topic):
            for number, run in itertools.groupby(same, _number):
                part, many = parts.get((topic, number)), list(run)
                if part is None:
                    continue
                headers = [message.headers() for message in many]
                if (
                    not part.plain
                    or many[0].offset() < part.next
                    or (any(headers) and any(_ours(pairs) for pairs in headers))
                ):
                    found += cls.records(many, parts)
                    continue
                part.next = many[-1].offset() + 1
                for start in range(0, len(many), size):
                    some = many[start : start + size]
                    last: int = some[-1].offset()
                    made = Bundle(part, topic, number, last, None, None, None, some)
                    part.open.append(made)
                    found.append(made)
        return found

    def __init__(
        self,
        settings: Mapping[str, Any],
        producing: Mapping[str, Any],
        consuming: Mapping[str, Any],
        down: Callable[[str], None],
        transaction_timeout_ms: int = 10_000,
    ) -> None:
        self.transaction_timeout_ms = transaction_timeout_ms
        self.settings, self.producing, self.consuming = settings, producing, consuming
        self._down = down
        self._pool: ThreadPoolExecutor | None = None
        self.loop: asyncio.AbstractEventLoop
        self._admin: Any = None
        self._producer: Any = None
        self._poller: threading.Thread | None = None
        self._open = False
        #: What ended a producer for good.
        self._fatal: Broken | None = None
        #: Why brokers refused to talk to us, in this attempt to connect.
        self.refusals: list[str] = []
        #: Delivery reports on their way to the loop.
        self._reports: deque[tuple[asyncio.Future[RecordMetadata], Any, Any]] = deque()

    # Connection

    async def connect(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.refusals.clear()
        self._pool = ThreadPoolExecutor(8, "millstream-kafka")
        try:
            common = {**self.settings, "error_cb": self._on_error}
            self._admin = AdminClient(common)
            await self._greet()
            self._producer = Producer({**common, **self.producing})
        except (KafkaException, Broken) as error:
            await self.close()
            reason = broken(error) if isinstance(error, KafkaException) else error
            if self.refusals:
                raise Broken(self.refusals[0], "_AUTHENTICATION") from error
            raise reason from error
        self._open = True
        self._poller = threading.Thread(target=self._report, name="kafka-reports", daemon=True)
        self._poller.start()

    async def _greet(self) -> None:
        """Wait until a broker answers, or refuses us: only ``poll`` tells of that."""
        end = time.monotonic() + ASK
        while True:
            try:
                await self.ask(self._admin.list_topics, timeout=GREET)
                return
            except Broken:
                await self.ask(self._admin.poll, 0)
                if self.refusals or time.monotonic() > end:
                    raise

    async def close(self) -> None:
        self._open = False
        poller, self._poller = self._poller, None
        if poller is not None:
            await asyncio.to_thread(poller.join, 2)
            self._hand_over()
        self._producer = self._admin = None
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    async def ask(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a blocking call of the library in a thread.

        Raises:
            Broken: it failed.
        """
        if self._pool is None:
            raise Broken("closed", "_STATE")
        call = functools.partial(function, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except KafkaException as error:
            raise broken(error) from error
        except RuntimeError as error:  # closed meanwhile
            raise Broken(str(error), "_STATE") from error

    async def ping(self, timeout: float) -> None:
        if self._admin is None:
            raise Broken("closed", "_STATE")
        try:
            await asyncio.wrap_future(self._admin.describe_cluster(request_timeout=timeout))
        except KafkaException as error:
            raise broken(error) from error

    def _on_error(self, error: KafkaError) -> None:
        """Called by the library, in any of its threads."""
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            self.refusals.append(error.str())
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION):
            self._tell(self._down, error.str())
        log.debug("%s", error)

    def _tell(self, function: Callable[..., Any], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(function, *args)

    # Publishing

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        pairs: Pairs,
        partition: int | None,
        timestamp_ms: int | None,
    ) -> asyncio.Future[RecordMetadata]:
        """Give a message to the producer; the future is its delivery report.

        Raises:
            BufferError: there is no room at the moment.
            Broken: it will never be taken.
        """
        future: asyncio.Future[RecordMetadata] = self.loop.create_future()
        more: dict[str, Any] = {}
        if pairs:
            more["headers"] = pairs
        if partition is not None:
            more["partition"] = partition
        if timestamp_ms is not None:
            more["timestamp"] = timestamp_ms
        try:
            self._producer.produce(
                topic, value, key, on_delivery=functools.partial(self._delivered, future), **more
            )
        except KafkaException as error:
            problem = self._because(broken(error))
            if "TOO_LARGE" in problem.code:
                most = self.producing.get("message.max.bytes")
                problem = Broken(f"{problem} (max_request_size is {most} bytes)", problem.code)
            raise problem from error
        return future

    def _delivered(self, future: asyncio.Future[RecordMetadata], error: Any, message: Any) -> None:
        self._reports.append((future, error, message))

    def _report(self) -> None:
        """The thread that hands over delivery reports, all that are there at once."""
        producer = self._producer
        while self._open:
            try:
                producer.poll(TURN / 2)  # an end waits for it
            except KafkaException as error:  # fatal: what is published from now on says so
                log.debug("the producer: %s", error)
                self._fatal = broken(error)
            if self._reports:
                self._tell(self._hand_over)

    def _hand_over(self) -> None:
        reports = self._reports
        while reports:
            future, error, message = reports.popleft()
            if future.done():
                continue
            if error is not None:
                future.set_exception(self._because(broken(error)))
            else:
                future.set_result(
                    RecordMetadata(
                        message.topic(),
                        message.partition(),
                        message.offset(),
                        message.timestamp()[1],
                    )
                )

    def _because(self, problem: Broken) -> Broken:
        """What ended the producer, where a message only tells that it has ended."""
        ended = problem.code in ("_FATAL", "_PURGE_QUEUE", "_PURGE_INFLIGHT")
        return self._fatal if ended and self._fatal is not None else problem

    async def flush(self, timeout: float) -> None:
        if self._producer is not None:
            await self.ask(self._producer.flush, timeout)
            self._hand_over()

    async def renew(self) -> None:
        """A new producer in place of one that failed for good."""
        old, poller = self._producer, self._poller
        self._open = False
        if poller is not None:
            await asyncio.to_thread(poller.join, 2)
        self._hand_over()
        del old
        common = {**self.settings, "error_cb": self._on_error}
        self._producer = Producer({**common, **self.producing})
        self._open = True
        self._poller = threading.Thread(target=self._report, name="kafka-reports", daemon=True)
        self._poller.start()

    # The cluster

    async def make(self, topics: Sequence[Topic]) -> list[str]:
        known = await self.layout([t.name for t in topics])
        wanted = {t.name: t for t in topics if t.name not in known}
        if not wanted:
            return []
        new = [
            NewTopic(
                t.name,
                t.num_partitions or -1,
                t.replication_factor or -1,
                config=dict(t.config or {}),
            )
            for t in wanted.values()
        ]
        made: list[str] = []
        for name, future in self._admin.create_topics(new, request_timeout=ASK).items():
            try:
                await asyncio.wrap_future(future)
                made.append(name)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise broken(error) from error
        for _ in range(50 if made else 0):  # until the brokers know them too
            if len(await self.layout(made)) == len(made):
                break
            await asyncio.sleep(0.02)
        return made

    async def layout(self, topics: Sequence[str] = ()) -> Mapping[str, list[int]]:
        if not topics:
            found = await self.ask(self._admin.list_topics, timeout=ASK)
            return {
                name: sorted(topic.partitions)
                for name, topic in found.topics.items()
                if topic.error is None
            }
        found = await self._described(topics)
        return {name: sorted(p.id for p in topic.partitions) for name, topic in found.items()}

    async def ids(self, topics: Sequence[str]) -> dict[str, str]:
        return {name: str(t.topic_id) for name, t in (await self._described(topics)).items()}

    async def _described(self, topics: Sequence[str]) -> dict[str, Any]:
        # Not `list_topics`: asked for a topic that is not there, it would have it made.
        futures = self._admin.describe_topics(TopicCollection(list(topics)), request_timeout=ASK)
        known: dict[str, Any] = {}
        for name, future in futures.items():
            try:
                known[name] = await asyncio.wrap_future(future)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise broken(error) from error
        return known

    async def admin(self, method: str, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A call of the library's AdminClient: what each of its futures gave."""
        futures = getattr(self._admin, method)(*args, request_timeout=ASK, **kwargs)
        found: dict[Any, Any] = {}
        for key, future in futures.items():
            try:
                found[key] = await asyncio.wrap_future(future)
            except KafkaException as error:
                raise broken(error) from error
        return found

    async def ends(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets behind the last messages of partitions."""
        return await self.ask(self.edges, places, OffsetSpec.latest())  # type: ignore[no-any-return]

    def edges(self, places: Sequence[Place], edge: Any) -> dict[Place, int]:
        """The same, or those of the first messages; for threads."""
        if not places:
            return {}
        wanted = {TopicPartition(*p): edge for p in places}
        end = time.monotonic() + ASK
        while True:
            found = self._admin.list_offsets(wanted, request_timeout=ASK)
            try:
                return {Place(p.topic, p.partition): f.result().offset for p, f in found.items()}
            except KafkaException as error:
                if error.args[0].code() not in _MOVING or time.monotonic() > end:
                    raise
                time.sleep(GREET / 5)

    async def cut(self, place: Place, before: int) -> None:
        """Delete the messages of a partition before an offset for good."""
        await self.admin("delete_records", [TopicPartition(*place, before)])

    async def scan(self, topic: str, starts: Mapping[Place, int]) -> AsyncIterator[Record]:
        """What a topic has now, partition by partition; nothing is consumed."""
        settings = {**self.settings, "group.id": "ms-scan", "enable.auto.commit": False}
        settings |= {"enable.partition.eof": True, "isolation.level": "read_committed"}
        consumer = await self.ask(Consumer, settings)
        try:
            for number in (await self.layout([topic])).get(topic, []):
                place = Place(topic, number)
                begin = starts.get(place, OFFSET_BEGINNING)
                part = Partition(place, 0, None)
                await self.ask(consumer.assign, [TopicPartition(*place, begin)])
                end = time.monotonic() + ASK
                while time.monotonic() < end:
                    for message in await self.ask(_some, consumer):
                        if message.error() is None:
                            [found] = self.records([message], {place: part})
                            part.open.clear()
                            yield found
                            end = time.monotonic() + ASK
                        elif message.error().code() == KafkaError._PARTITION_EOF:
                            end = 0.0
        finally:
            await self.ask(consumer.close)

    def reader(self, plan: Plan, owner: Owner) -> ConfluentReader:
        return ConfluentReader(self, plan, owner)

    def transactor(self, name: str) -> ConfluentTransactor:
        return ConfluentTransactor(self, name)


class ConfluentReader:
    """One consumer of the library in a thread of its own."""

    def __init__(self, client: ConfluentClient, plan: Plan, owner: Owner) -> None:
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
            "error_cb": self._on_error,
        }
        if spec.group_protocol == "consumer":
            settings["group.protocol"] = "consumer"
        else:
            wanted = spec.partition_assignment_strategy or "cooperative-sticky"
            names = wanted if isinstance(wanted, list | tuple) else [wanted]
            settings["partition.assignment.strategy"] = ",".join(map(_strategy, names))
        for field, name in _OPTIONS.items():
            value = getattr(spec, field)
            if value is not None:
                settings[name] = value
        self.settings = {**settings, **client.consuming, **(spec.config or {})}
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
        self.member: Any = None
        self._ended: asyncio.Future[None] | None = None
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
        thread = threading.Thread(target=self._live, name="kafka-reader", daemon=True)
        if self.plan.partitions or self.plan.group is None:
            await self.client.ask(self._take, True)
        else:
            self._consumer.subscribe(
                self.plan.topics,
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_lost,
            )
        thread.start()

    async def close(self) -> None:
        self._stopping = True
        self._room.set()
        if self._ended is not None:
            await asyncio.wait([self._ended])
        elif self._consumer is not None:
            await self.client.ask(self._consumer.close)

    def hold(self, full: bool) -> None:
        if full:
            self._room.clear()
        else:
            self._room.set()

    def halt(self, place: Place, stop: bool) -> None:
        (self._halted.add if stop else self._halted.discard)(place)
        consumer = self._consumer
        change = consumer.pause if stop else consumer.resume
        self._order(functools.partial(change, [TopicPartition(*place)]))

    async def commit(self, commits: Sequence[Commit]) -> None:
        offsets = _offsets(commits)
        commit = functools.partial(self._consumer.commit, offsets=offsets, asynchronous=False)
        for partition in await self._order(commit) or ():
            if partition.error is not None:
                raise broken(partition.error)

    async def refresh(self) -> None:
        await self._order(self._refresh)

    def _refresh(self) -> None:
        # Only in the reader's thread, or it waits for ever.
        self.member = self._consumer.consumer_group_metadata()

    async def seek(self, place: Place, offset: int) -> None:
        await self._order(functools.partial(self._seek, place, offset))

    def _seek(self, place: Place, offset: int) -> None:
        self._consumer.seek(TopicPartition(*place, offset))
        # Told behind all that came from the old place, and before what comes from the new.
        self.client._tell(self.owner.moved, Start(*place, offset, None))

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

    async def ends(self, places: Sequence[Place]) -> dict[Place, int]:
        return await self.client.ends(places)

    async def begins(self, places: Sequence[Place]) -> dict[Place, int]:
        return await self.client.ask(self.client.edges, places, OffsetSpec.earliest())  # type: ignore[no-any-return]

    async def times(self, places: Sequence[Place], ms: int) -> dict[Place, int]:
        return await self.client.ask(self.client.edges, places, OffsetSpec.for_timestamp(ms))  # type: ignore[no-any-return]

    # In the thread

    def _live(self) -> None:
        problem: Broken | None = None
        consumer, tell, arrived = self._consumer, self.client._tell, self.owner.arrived
        room = self._room
        poll, consume, most = consumer.poll, consumer.consume, self._most - 1
        looked = time.monotonic()
        by_hand = self.plan.group is None and not self.plan.partitions
        try:
            while not self._stopping:
                if self._orders:
                    self._obey()
                if not room.is_set() and not room.wait(STALL):
                    self._stall()
                    continue
                first = poll(TURN)
                if first is not None:
                    batch = [first, *consume(most, 0)] if most else [first]
                    errors = [m for m in batch if m.error() is not None]
                    for message in errors:
                        batch.remove(message)
                        problem = broken(message.error())
                        if message.error().code() in _PASSING:
                            continue
                        tell(self.owner.failed, problem)
                        if problem.fatal:
                            return
                    if batch:
                        room.clear()  # until the owner has seen them
                        tell(arrived, batch)
                elif by_hand and time.monotonic() > looked + self.plan.refresh:
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

    def _obey(self) -> None:
        while self._orders:
            work, future = self._orders.popleft()
            result: Any = None
            problem: Broken | None = None
            try:
                result = work()
            except (KafkaException, RuntimeError) as error:
                problem = broken(error)
            self.client._tell(_answer, future, result, problem)

    def _stall(self) -> None:
        """Stay in the group while there is no room for messages."""
        consumer = self._consumer
        held: list[TopicPartition] = []
        while not self._room.is_set() and not self._stopping:
            new = [p for p in consumer.assignment() if p not in held]
            if new:
                consumer.pause(new)
                held += new
            self._obey()
            message = consumer.poll(TURN)
            if message is not None and message.error() is None:
                self.client._tell(self.owner.arrived, [message])
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
                if topic.error is None and self._wanted(name)
                for number in topic.partitions
                if (name, number) not in mine
            ]
        starts = self._starts(new)
        if first or new:
            self._await(self.owner.gained(starts))
        if new:
            consumer.incremental_assign([TopicPartition(*s[:3]) for s in starts])

    def _wanted(self, name: str) -> bool:
        return self.plan.wants(name)

    def _starts(self, partitions: list[TopicPartition]) -> list[Start]:
        """Where partitions begin, as the group or the log tells."""
        consumer = self._consumer
        notes: dict[Place, str | None] = {}
        asked = [p for p in partitions if p.offset == -1001]
        if asked and self.plan.group is not None:
            for p in consumer.committed(asked, timeout=ASK * 2):
                if p.error is not None:
                    raise KafkaException(p.error)
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

    def _on_assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        if self._last is not None:
            assign = consumer.incremental_assign if self.incremental else consumer.assign
            assign(partitions)
            return
        self._refresh()
        starts = self._starts([TopicPartition(p.topic, p.partition) for p in partitions])
        self._await(self.owner.gained(starts))
        begin = [TopicPartition(*s[:3]) for s in starts]
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
                consumer.commit(offsets=_offsets(self._last), asynchronous=False)
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
                self._consumer.commit(offsets=_offsets(commits), asynchronous=False)
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
                    self._obey()  # it may wait for one of its orders
        except Exception as error:
            log.debug("on the loop: %r", error)
            return None

    def _on_error(self, error: KafkaError) -> None:
        self.client._on_error(error)


#: Errors of messages that no cluster will take, however often they are sent.
_REFUSALS = {
    "MSG_SIZE_TOO_LARGE",
    "RECORD_LIST_TOO_LARGE",
    "INVALID_MSG",
    "INVALID_RECORD",
    "TOPIC_AUTHORIZATION_FAILED",
    "TOPIC_EXCEPTION",
    "UNKNOWN_TOPIC_OR_PART",
    "_UNKNOWN_TOPIC",
    "_UNKNOWN_PARTITION",
}


class ConfluentTransactor:
    """A transactional producer of the library, in a thread of its own."""

    def __init__(self, client: ConfluentClient, name: str) -> None:
        limit = client.transaction_timeout_ms
        self.settings = {
            **client.settings,
            **client.producing,
            "error_cb": client._on_error,
            "enable.idempotence": True,
            "acks": "all",
            "transactional.id": name,
            "transaction.timeout.ms": limit,
            # Nothing may wait longer than the transaction does.
            "message.timeout.ms": min(client.producing["message.timeout.ms"], limit),
            "socket.timeout.ms": min(client.settings["socket.timeout.ms"], limit),
            "delivery.report.only.error": True,
        }
        self._limit = limit / 1000
        self._pool = ThreadPoolExecutor(1, "kafka-transactions")
        self._producer: Any = None
        self._began = killpoints.kill_point("transaction_began")
        self._sent = killpoints.kill_point("transaction_sent")
        self._told = killpoints.kill_point("transaction_offsets")
        self._committed = killpoints.kill_point("transaction_committed")

    async def open(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self._open)

    def _open(self) -> None:
        try:
            self._producer = Producer(self.settings)
            # Longer than the cluster needs to abort what the last owner of the name left.
            self._patiently(self._producer.init_transactions, self._limit + 20.0)
        except KafkaException as error:
            raise broken(error) from error

    async def run(self, sends: Sequence[Any], commits: Sequence[Commit], member: Any) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._pool, self._run, sends, commits, member)
        except RuntimeError as error:  # closed meanwhile
            raise Broken(str(error), "_STATE", True) from error

    def _run(self, sends: Sequence[Any], commits: Sequence[Commit], member: Any) -> None:
        began = time.monotonic()
        refused: dict[int, str] = {}
        try:
            self._transact(sends, commits, member, refused)
        except (KafkaException, BufferError, ValueError, TypeError) as error:
            problem = broken(error)
            if not problem.fatal:
                try:
                    self._patiently(self._producer.abort_transaction, self._limit)
                    # The library's own numbering has gaps now, at which it stumbles later.
                    self._open()
                except (KafkaException, Broken) as second:
                    problem = second if isinstance(second, Broken) else broken(second)
                    problem.fatal = True
            if problem.fatal and time.monotonic() > began + self._limit * 0.9:
                # The cluster aborted it, which looks the same as another owner of the name.
                problem = Broken(f"open for too long: {problem}", "_EXPIRED", True)
            if refused and not problem.fatal:
                codes = next(iter(refused.values()))
                raise Refused(str(problem), codes, list(refused)) from error
            raise problem from error

    def _transact(
        self,
        sends: Sequence[Any],
        commits: Sequence[Commit],
        member: Any,
        refused: dict[int, str],
    ) -> None:
        producer = self._producer
        producer.begin_transaction()
        if self._began is not None:
            self._began()
        end = time.monotonic() + self._limit
        for number, (topic, value, key, pairs, partition, timestamp_ms) in enumerate(sends):
            more: dict[str, Any] = {}
            if pairs:
                more["headers"] = pairs
            if partition is not None:
                more["partition"] = partition
            if timestamp_ms is not None:
                more["timestamp"] = timestamp_ms
            report = functools.partial(_report_refusal, refused, number)
            while True:
                try:
                    producer.produce(topic, value, key, on_delivery=report, **more)
                    break
                except BufferError:
                    if time.monotonic() > end:
                        raise
                    producer.poll(0.05)
                except KafkaException as error:
                    if broken(error).code in _REFUSALS:
                        refused[number] = broken(error).code
                    raise
        if self._sent is not None:
            producer.flush(self._limit)
            self._sent()
        if commits:
            send = functools.partial(
                producer.send_offsets_to_transaction, _offsets(commits), member
            )
            self._patiently(send, self._limit)
        if self._told is not None:
            self._told()
        self._patiently(producer.commit_transaction, self._limit)
        if self._committed is not None:
            self._committed()

    def _patiently(self, call: Callable[[float], Any], seconds: float) -> None:
        """Call again what did not end in time, which goes on then where it was."""
        end = time.monotonic() + seconds
        while True:
            try:
                call(min(seconds, ASK))
                return
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > end:
                    raise

    async def close(self) -> None:
        self._producer = None
        self._pool.shutdown(wait=False)


def _report_refusal(refused: dict[int, str], number: int, error: Any, message: Any) -> None:
    if error is not None and error.name() in _REFUSALS:
        refused[number] = error.name()


def _some(consumer: Any) -> list[Any]:
    first = consumer.poll(0.5)
    return [] if first is None else [first, *consumer.consume(MOST, 0)]


def _offsets(commits: Sequence[Commit]) -> list[TopicPartition]:
    return [TopicPartition(c.topic, c.partition, c.offset, metadata=c.note) for c in commits]


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


def _strategy(strategy: Any) -> str:
    """librdkafka's name of a strategy."""
    name = str(getattr(strategy, "name", strategy))
    return {"sticky": "cooperative-sticky"}.get(name, name)


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
__all__ = ["ConfluentClient", "ConfluentReader", "ConfluentTransactor", "broken"]
