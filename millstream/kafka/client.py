"""The client library, confluent-kafka, for asyncio: its blocking calls in threads.

One thread hands over delivery reports, and one reads for each subscription (reader.py); whole
batches cross, so that no message pays for a hop between threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import admin as _administration

from .message import Record, RecordMetadata, Send
from .offsets import Commit, Partition, Place, bundles, records
from .options import Topic

if TYPE_CHECKING:
    from .plan import Owner, Plan
    from .reader import Reader

_admin: Any = _administration
AdminClient, NewTopic, OffsetSpec = _admin.AdminClient, _admin.NewTopic, _admin.OffsetSpec
log = logging.getLogger("millstream.kafka")

#: Messages that are taken from the library at once.
MOST = 2000
#: Seconds for one question to the cluster.
ASK = 5.0
#: The same where no server was reached at first: it may be by another of its addresses.
SOON = 1.5
#: Seconds between two looks whether we were refused.
GREET = 0.5
#: Seconds between two looks for delivery reports; an end waits for it.
REPORTS = 0.05
#: What is said instead of "No provider for SASL mechanism GSSAPI".
_NO_KERBEROS = (
    "this confluent-kafka was built without Kerberos, as its wheels are: build it against a "
    "librdkafka with libsasl2, or use client='aiokafka' with the package gssapi"
)
#: What a question fails with that no broker was there to answer.
_UNREACHED = ("_TRANSPORT", "_TIMED_OUT", "_ALL_BROKERS_DOWN", "_RESOLVE")
#: Of what the library says of a server: which one it is, why, and what only its authors need.
_REASON = re.compile(
    r"(?:\w+Coordinator: )?(?:\w+://)?(\S+?:\d+)(?:/\w+)?: (.*?)(?: \(after \d+ms in state .*\))?$",
    re.S,
)
#: What a broker says of a partition while its leader is chosen.
_MOVING = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
}


class Broken(Exception):
    """Kafka did not do what was asked.

    Args:
        text: why.
        code: Kafka's name of the error, such as ``UNKNOWN_TOPIC_OR_PART``.
        fatal: whether the client is of no use any more.
    """

    def __init__(self, text: str, code: str = "", fatal: bool = False) -> None:
        super().__init__(text)
        self.code, self.fatal = code, fatal


def broken(error: BaseException) -> Broken:
    """What an error of the library is called here."""
    if isinstance(error, Broken):
        return error
    inner = error.args[0] if isinstance(error, KafkaException) else error
    if isinstance(inner, KafkaError):
        return Broken(inner.str(), inner.name(), inner.fatal())
    return Broken(str(error))


def _reason(error: KafkaError) -> tuple[str, str]:
    """Which server an error is about, and what is wrong with it."""
    text = error.str()
    found = _REASON.match(text)
    return (found[1], found[2]) if found is not None else ("", text)


def partitions(commits: Sequence[Commit]) -> list[TopicPartition]:
    """Commits as the library takes them."""
    return [TopicPartition(c.topic, c.partition, c.offset, metadata=c.note) for c in commits]


def produce(producer: Any, send: Send, report: Callable[[Any, Any], None]) -> None:
    """Give a message to a producer of the library."""
    producer.produce(
        send.topic,
        send.value,
        send.key,
        send.partition,
        on_delivery=report,
        timestamp=send.timestamp_ms,
        headers=send.pairs or None,
    )


class Client:
    """A connection to a cluster: a producer and an administrator.

    Args:
        settings: librdkafka's, of everything.
        producing: of the producer besides.
        down: called on the loop with a reason when no broker is reached any more.
        transaction_timeout_ms: how long a transaction may be open.
        config: librdkafka's as the user gave them; they are before all of ours.
    """

    #: How its messages are kept account of: one by one, and many as one.
    records, bundles = staticmethod(records), staticmethod(bundles)

    def __init__(
        self,
        settings: Mapping[str, Any],
        producing: Mapping[str, Any],
        down: Callable[[str], None],
        transaction_timeout_ms: int = 10_000,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.transaction_timeout_ms = transaction_timeout_ms
        self.config = config or {}
        self.settings, self.producing = {**settings, **self.config}, {**producing, **self.config}
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
        #: Server → why it was not reached, in this attempt to connect or since that was told.
        self.misses: dict[str, str] = {}
        #: Whether all of them were tried, in this attempt to connect.
        self._nobody = False
        #: Delivery reports on their way to the loop.
        self._reports: deque[tuple[asyncio.Future[RecordMetadata], Any, Any]] = deque()

    # Connection

    async def connect(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.refusals.clear()
        self.misses.clear()
        self._nobody = False
        self._pool = ThreadPoolExecutor(8, "millstream-kafka")
        try:
            self._admin = AdminClient({**self.settings, "error_cb": self.on_error})
            await self._greet()
            self._produce()
        except (KafkaException, Broken) as error:
            await self.close()
            reason = broken(error) if isinstance(error, KafkaException) else error
            if "No provider for SASL mechanism" in str(reason):
                raise Broken(_NO_KERBEROS, "_AUTHENTICATION") from error
            if self.refusals:
                raise Broken(self.refusals[0], "_AUTHENTICATION") from error
            if self.misses and reason.code in _UNREACHED:
                one = len(self.misses) == 1  # whoever catches this says which server was asked
                text = next(iter(self.misses.values())) if one else self._missed()
                raise Broken(text, reason.code) from error
            raise reason from error

    def _produce(self) -> None:
        settings = {
            **self.settings,
            "error_cb": self.on_error,
            # So a message to a topic that is not there fails with that, and not for the time.
            "topic.metadata.propagation.max.ms": int(self.producing["message.timeout.ms"]) // 2,
            **self.producing,
        }
        self._producer = Producer(settings)
        self._open = True
        self._poller = threading.Thread(target=self._report, name="kafka-reports", daemon=True)
        self._poller.start()

    async def _end_producing(self) -> None:
        self._open = False
        poller, self._poller = self._poller, None
        if poller is not None:
            await asyncio.to_thread(poller.join, 2)
            self._hand_over()
        self._producer = None

    async def _greet(self) -> None:
        """Wait until a broker answers, or refuses us: only ``poll`` tells of that."""
        began = time.monotonic()
        while True:
            try:
                await self.ask(self._admin.list_topics, timeout=GREET)
                return
            except Broken:
                await self.ask(self._admin.poll, 0)
                patience = SOON if self._nobody else ASK
                if self.refusals or time.monotonic() - began > patience:
                    raise

    async def close(self) -> None:
        await self._end_producing()
        self._admin = None
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
        """Raise :class:`Broken` unless a broker answers in time."""
        if self._admin is None:
            raise Broken("closed", "_STATE")
        try:
            await asyncio.wrap_future(self._admin.describe_cluster(request_timeout=timeout))
        except KafkaException as error:
            raise broken(error) from error

    def on_error(self, error: KafkaError) -> None:
        """Called by the library, in any of its threads."""
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            self.refusals.append(_reason(error)[1])
        elif error.code() in (KafkaError._TRANSPORT, KafkaError._RESOLVE):
            self.misses.setdefault(*_reason(error))
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._nobody = True
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION):
            self.tell(self._tell_down, error.str())
        log.debug("%s", error)

    def _missed(self) -> str:
        return "; ".join(f"{server}: {why}" for server, why in list(self.misses.items()))

    def _tell_down(self, reason: str) -> None:
        if self._open and self.misses:  # which servers, by the addresses that they tell themselves
            reason = self._missed()
            self.misses.clear()
        self._down(reason)

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(function, *args)

    # Publishing

    def send(self, send: Send) -> asyncio.Future[RecordMetadata]:
        """Give a message to the producer; the future is its delivery report.

        Raises:
            BufferError: there is no room at the moment.
            Broken: it will never be taken.
        """
        future: asyncio.Future[RecordMetadata] = self.loop.create_future()
        report = functools.partial(self._delivered, future)
        try:
            produce(self._producer, send, report)
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
                producer.poll(REPORTS)
            except KafkaException as error:  # fatal: what is published from now on says so
                log.debug("the producer: %s", error)
                self._fatal = broken(error)
            if self._reports:
                self.tell(self._hand_over)

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
        await self._end_producing()
        self._produce()

    # The cluster

    async def make(self, topics: Sequence[Topic]) -> list[str]:
        """Make topics that are not there; the names of those that were made."""
        known = await self.layout([t.name for t in topics])
        new = [
            NewTopic(
                t.name,
                t.num_partitions or -1,
                t.replication_factor or -1,
                config=dict(t.config or {}),
            )
            for t in topics
            if t.name not in known
        ]
        if not new:
            return []
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

    async def layout(self, topics: Sequence[str]) -> Mapping[str, list[int]]:
        """The partitions of topics. Unknown ones are left out."""
        found = await self._described(topics)
        return {name: sorted(p.id for p in topic.partitions) for name, topic in found.items()}

    async def ids(self, topics: Sequence[str]) -> dict[str, str]:
        """What tells a topic from an earlier one of its name. Unknown ones are left out."""
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
        return await self._edges(places, OffsetSpec.latest())

    async def begins(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets of the first messages."""
        return await self._edges(places, OffsetSpec.earliest())

    async def times(self, places: Sequence[Place], ms: int) -> dict[Place, int]:
        """The offsets of the first messages that are not older than that; -1 if all are."""
        return await self._edges(places, OffsetSpec.for_timestamp(ms))

    async def _edges(self, places: Sequence[Place], edge: Any) -> dict[Place, int]:
        return await self.ask(self.edges, places, edge)  # type: ignore[no-any-return]

    def edges(self, places: Sequence[Place], edge: Any) -> dict[Place, int]:
        """The offsets at one edge of partitions; for threads."""
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

    async def scan(self, topic: str, starts: Mapping[Place, int]) -> AsyncGenerator[Record, None]:
        """What a topic has now, partition by partition; nothing is consumed."""
        settings = {**self.settings, "group.id": "ms-scan", "enable.auto.commit": False}
        settings |= {"enable.partition.eof": True, "isolation.level": "read_committed"}
        # It tells of an end only when it waited so long for more.
        settings["fetch.wait.max.ms"] = 20
        consumer = await self.ask(Consumer, settings)
        try:
            places = [Place(topic, n) for n in (await self.layout([topic])).get(topic, [])]
            # Asked by the library itself, which takes half a second to come to it.
            first = await self.begins(places)
            for place in places:
                part, begin = Partition(place, 0, None), max(starts.get(place, 0), first[place])
                await self.ask(consumer.assign, [TopicPartition(*place, begin)])
                end = time.monotonic() + ASK
                while time.monotonic() < end:
                    for message in await self.ask(_some, consumer):
                        if message.error() is None:
                            [found] = records([message], {place: part})
                            part.open.clear()
                            yield found
                            end = time.monotonic() + ASK
                        elif message.error().code() == KafkaError._PARTITION_EOF:
                            end = 0.0
        finally:
            await self.ask(consumer.close)

    def reader(self, plan: Plan, owner: Owner) -> Reader:
        """What reads for a subscription."""
        from .reader import Reader

        return Reader(self, plan, owner)


def _some(consumer: Any) -> list[Any]:
    first = consumer.poll(0.5)
    return [] if first is None else [first, *consumer.consume(MOST, 0)]
