"""The other client library, aiokafka: all of it runs on the event loop, without threads.

It has neither cooperative rebalancing nor the groups of KIP-848, and its transactions do not
fence a member whose partitions moved; who wants those takes confluent-kafka.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import inspect
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka import errors as _errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.conn import AIOKafkaConnection, CloseReason, create_conn

from ..errors import SetupError
from ..security import tls_fault
from .client import ASK, Broken
from .message import Record, RecordMetadata, Send
from .offsets import Partition, Place, mark
from .options import Topic
from .plan import LEAVE, TURN

if TYPE_CHECKING:
    from .aio_reader import AioReader
    from .plan import Owner, Plan

T = TypeVar("T")
log = logging.getLogger("millstream.kafka")
# What it says of each attempt to connect and each rebalance, the engine says once.
if logging.getLogger("aiokafka").level == logging.NOTSET:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def _expected(send: Any) -> Any:
    """A connection's method that raises what the library expects of one that has ended.

    uvloop has a RuntimeError for that; whichever task of the library meets it ends for good.
    """

    @functools.wraps(send)
    def sent(connection: Any, *args: Any, **options: Any) -> Any:
        try:
            return send(connection, *args, **options)
        except _errors.KafkaError:
            raise
        except RuntimeError as error:
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise _errors.KafkaConnectionError(f"the connection has ended: {error}") from error

    return sent


for _name in ("send", "_send_sasl_token"):
    setattr(AIOKafkaConnection, _name, _expected(getattr(AIOKafkaConnection, _name)))

#: Messages that wait for the producer; more are refused for the moment.
WAITING = 100_000
#: A message that the producer has not taken: its number, its confirmation, what it is.
_Waiting: TypeAlias = tuple[int, asyncio.Future[RecordMetadata], dict[str, Any]]
#: What a message is refused with only because one before it was.
_BEHIND = (_errors.OutOfOrderSequenceNumber, _errors.UnknownProducerId)
#: What a question may end with. The library does not find the connection, where that was renewed
#: while it waited for an answer.
_UNANSWERED = (_errors.KafkaError, OSError, LookupError)
#: What a single connection is made with.
_GREETING = {
    *("client_id", "request_timeout_ms", "ssl_context", "security_protocol", "sasl_mechanism"),
    *("sasl_plain_username", "sasl_plain_password", "sasl_oauth_token_provider"),
    *("sasl_kerberos_service_name", "sasl_kerberos_domain_name"),
}
#: Behind each note.
_END = "\0"
#: Kafka's names of errors that somebody asks for, by their numbers.
_NAMES = {
    3: "UNKNOWN_TOPIC_OR_PART",
    10: "MSG_SIZE_TOO_LARGE",
    14: "COORDINATOR_LOAD_IN_PROGRESS",
    17: "TOPIC_EXCEPTION",
    18: "RECORD_LIST_TOO_LARGE",
    22: "ILLEGAL_GENERATION",
    25: "UNKNOWN_MEMBER_ID",
    26: "INVALID_SESSION_TIMEOUT",
    27: "REBALANCE_IN_PROGRESS",
    29: "TOPIC_AUTHORIZATION_FAILED",
    30: "GROUP_AUTHORIZATION_FAILED",
    31: "CLUSTER_AUTHORIZATION_FAILED",
    44: "POLICY_VIOLATION",
    58: "SASL_AUTHENTICATION_FAILED",
}


def broken(error: BaseException) -> Broken:
    """What an error of the library is called here."""
    number = getattr(error, "errno", None)
    text = str(error).partition("Error: ")[2] or str(error) or type(error).__name__
    code = _NAMES.get(number, type(error).__name__) if number is not None else ""
    if code.endswith("AUTHORIZATION_FAILED"):  # it says no more than what for
        what = error.args[0] if error.args else ""
        text = f"{code}: {', '.join(sorted(what)) if isinstance(what, set) else what}"
    if isinstance(error, _errors.AuthenticationFailedError):
        code = "_AUTHENTICATION"
    elif isinstance(error, _errors.KafkaTimeoutError):
        code = "_TIMED_OUT"
    if (fault := tls_fault(error)) is not None:
        text, code = fault, "_SSL"
    return Broken(text, code)


def records(messages: list[Any], parts: Mapping[Any, Partition]) -> list[Record]:
    """Messages of the library as ours: those that belong to a partition, which admits them."""
    found: list[Record] = []
    for m in messages:
        part = parts.get((m.topic, m.partition))
        if part is not None:
            made = Record(part, m.topic, m.partition, m.offset, m.value, m.key, m.headers, m)
            if m.headers:
                mark(made)
            if part.admit(made):
                found.append(made)
    return found


def noted(note: str) -> str:
    """A note as both libraries write it: confluent-kafka reads on beyond one without an end."""
    return note and note + _END


def suited(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that a class of the library takes."""
    taken = inspect.signature(kind).parameters
    return {name: value for name, value in settings.items() if name in taken}


async def quietly(ending: Coroutine[Any, Any, None]) -> None:
    """Let something of the library end: at most :data:`LEAVE` seconds, and whatever it raises.

    One that has hardly begun raises a CancelledError.
    """
    task = asyncio.ensure_future(ending)
    await asyncio.wait([task], timeout=LEAVE)
    if not task.done():  # it waits for a cluster that is away
        task.cancel()
        await asyncio.wait([task], timeout=LEAVE)
    if not task.done():
        log.debug("at the end: it does not end")
    elif not task.cancelled() and (error := task.exception()) is not None:
        log.debug("at the end: %r", error)


class AioClient:
    """A connection to a cluster; the same as :class:`millstream.kafka.client.Client`.

    Args:
        settings: aiokafka's, of everything.
        producing: of the producer besides.
        patience: seconds that a message may wait for its confirmation.
    """

    #: Messages are kept account of one by one.
    bundles = None
    records = staticmethod(records)

    def __init__(
        self, settings: Mapping[str, Any], producing: Mapping[str, Any], patience: float
    ) -> None:
        self.settings, self._producing, self._patience = settings, producing, patience
        kinds = AIOKafkaAdminClient, AIOKafkaConsumer, AIOKafkaProducer
        for name in settings.keys() - {n for kind in kinds for n in suited(kind, settings)}:
            raise SetupError(f"aiokafka has no setting {name!r}", fix="leave it out of config=")
        self.loop: asyncio.AbstractEventLoop
        self._admin: Any = None
        self._producer: Any = None
        self._looker: Any = None
        self._starting = asyncio.Lock()
        #: Messages that the producer has not taken, by topic: one that is not there keeps up
        #: nobody else's. Each has a task.
        self._waiting: dict[str, list[_Waiting]] = {}
        self._numbers = itertools.count()
        self._senders: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        #: A producer that another one takes over from, once it has sent what it has.
        self._retiring: asyncio.Task[None] | None = None
        self._closed = False
        #: Messages that are not confirmed.
        self._open: set[asyncio.Future[RecordMetadata]] = set()

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of any consumer."""
        return {**suited(AIOKafkaConsumer, self.settings), "enable_auto_commit": False}

    # Connection

    async def connect(self) -> None:
        self.loop, self._closed = asyncio.get_running_loop(), False
        try:
            async with asyncio.timeout(ASK):
                await self._greet()
                self._admin = AIOKafkaAdminClient(**suited(AIOKafkaAdminClient, self.settings))
                await self._admin.start()
                self._looker = AIOKafkaConsumer(**self.reading)
                await self._looker.start()
        except (_errors.KafkaError, OSError, TimeoutError) as error:
            await self.close()
            raise broken(error) from error
        except BaseException:
            await self.close()
            raise

    async def _greet(self) -> None:
        """Reach one of the servers: the library keeps to itself why it could not."""
        options = {k: v for k, v in self.settings.items() if k in _GREETING}
        for number, server in enumerate(self.settings["bootstrap_servers"], 1):
            host, _, port = server.rpartition(":")
            try:
                connection = await create_conn(host.strip("[]"), int(port), **options)
                connection.close()
                return
            except (_errors.KafkaError, OSError, TimeoutError):
                if number == len(self.settings["bootstrap_servers"]):
                    raise

    async def close(self) -> None:
        self._closed = True
        # All at once: each of them may wait for a cluster that is away.
        looker, self._looker = self._looker, None
        admin, self._admin = self._admin, None
        stops = [*([looker.stop()] if looker else ()), *([admin.close()] if admin else ())]
        await asyncio.gather(self._end_reading(), self._end_producing(), *map(quietly, stops))

    async def _end_reading(self) -> None:
        if self._ending:
            _, late = await asyncio.wait(self._ending, timeout=ASK)
            for task in late:
                task.cancel()  # what it has opened it closes
            if late:
                await asyncio.wait(late, timeout=LEAVE)

    def ending(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have a reader end; the client waits for it."""
        task = self.loop.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def _end_producing(self) -> None:
        producer, self._producer = self._producer, None
        self._waiting.clear()
        for sender in self._senders:
            sender.cancel()
        retiring, self._retiring = self._retiring, None
        if retiring is not None:
            retiring.cancel()
        if producer is not None:
            await self._drain(producer, LEAVE if self._open else ASK)
        if retiring is not None:
            await asyncio.wait([retiring])
        self._fail(Broken("closed", "_STATE"))

    async def _drain(self, producer: Any, timeout: float) -> None:
        """Let a producer send what it has, and end."""
        ending = asyncio.ensure_future(producer.stop())
        try:
            await asyncio.wait([ending], timeout=timeout)
        finally:
            if not ending.done():  # it waits without end for what no broker confirms
                ending.cancel()
                ends = producer._sender.close(), producer.client.close()
                await asyncio.gather(*map(quietly, ends))

    def _retire(self, producer: Any) -> None:
        """Have another producer take over from one that is of no use any more."""
        if self._producer is producer:
            self._producer = None
            self._retiring = self.loop.create_task(self._drain(producer, self._patience))

    def _fail(self, problem: Broken) -> None:
        for future in list(self._open):
            if not future.done():
                future.set_exception(problem)
                future.exception()  # whoever gave up does not have to look

    async def renew(self) -> None:
        """A new producer in place of one that failed for good."""
        await self._end_producing()

    async def ping(self, timeout: float) -> None:
        """Raise :class:`Broken` unless a broker answers in time."""
        await self.asked(self._need().describe_topics([]))

    def _need(self) -> Any:
        if self._admin is None:
            raise Broken("closed", "_STATE")
        return self._admin

    async def asked(self, question: Any) -> Any:
        """What the library answers; :class:`Broken` if it cannot."""
        try:
            return await question
        except _UNANSWERED as error:
            raise broken(error) from error

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again, for a few seconds, where a connection goes or a node is on its way."""
        end = time.monotonic() + ASK
        while True:
            try:
                return await ask()
            except Broken as error:
                cause = error.__cause__
                gone = isinstance(cause, OSError | LookupError) or _passes(cause)
                if not gone or time.monotonic() > end:
                    raise
            await asyncio.sleep(TURN)

    # Publishing

    def send(self, send: Send) -> asyncio.Future[RecordMetadata]:
        """Give a message to the producer; the future is its confirmation.

        Raises:
            BufferError: there is no room at the moment.
            Broken: it will never be taken.
        """
        if len(self._open) >= WAITING:
            raise BufferError
        value = send.value
        if value is None and send.key is None:  # nothing is deleted by it; the library wants one
            value = b""
        future: asyncio.Future[RecordMetadata] = self.loop.create_future()
        timer = self.loop.call_later(self._patience, _expire, future)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        future.add_done_callback(lambda _: timer.cancel())
        where = None if send.partition == -1 else send.partition
        message = {"value": value, "key": send.key, "headers": send.pairs, "partition": where}
        message["timestamp_ms"] = send.timestamp_ms or None
        self._queue(send.topic, (next(self._numbers), future, message))
        return future

    def _queue(self, topic: str, one: _Waiting) -> None:
        waiting = self._waiting.get(topic)
        if waiting is None:
            waiting = self._waiting[topic] = []
            sender = self.loop.create_task(self._send_on(topic, waiting))
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        heapq.heappush(waiting, one)

    async def _send_on(self, topic: str, waiting: list[_Waiting]) -> None:
        """Give the messages of a topic to the producer in the order in which they came."""
        while waiting:
            future, one, producer = waiting[0][1], None, self._producer
            if future.done():
                heapq.heappop(waiting)
                continue
            try:
                producer = producer or await self._started()
                one = heapq.heappop(waiting)  # some may have come back before that one
                _, future, message = one
                sent = await producer.send(topic, **message)
                sent.add_done_callback(functools.partial(self._answered, producer, topic, one))
            except Exception as error:  # whatever it is, those behind it go on
                one = one or heapq.heappop(waiting)
                if producer is not None and type(error) is _errors.KafkaError:  # its task ended
                    self._retire(producer)
                elif not (isinstance(error, _errors.ProducerClosed) or _passes(error)):
                    if not one[1].done():
                        one[1].set_exception(self._refused(broken(error)))
                    continue
                heapq.heappush(waiting, one)
                await asyncio.sleep(TURN)  # until nobody waits any more
        if self._waiting.get(topic) is waiting:  # no new producer has begun meanwhile
            del self._waiting[topic]

    def _answered(
        self, producer: Any, topic: str, one: _Waiting, sent: asyncio.Future[Any]
    ) -> None:
        future, error = one[1], None if sent.cancelled() else sent.exception()
        # It counts on from a batch that a broker refused, and all behind that are refused for it.
        behind = isinstance(error, _BEHIND)
        if behind or type(error) is _errors.KafkaError:
            self._retire(producer)
        if future.done():
            return
        if behind and not self._closed:
            self._queue(topic, one)
        elif sent.cancelled():
            future.set_exception(Broken("closed", "_STATE"))
        elif error is not None:
            future.set_exception(broken(error))
        else:
            found = sent.result()
            future.set_result(
                RecordMetadata(found.topic, found.partition, found.offset, found.timestamp)
            )

    async def _started(self) -> Any:
        """The producer: started for the first message, as it takes rights that readers need not."""
        async with self._starting:
            if self._retiring is not None:  # what it has comes first
                await asyncio.wait([self._retiring])
            if self._producer is None:
                settings = {**self._producing, **suited(AIOKafkaProducer, self.settings)}
                producer = AIOKafkaProducer(**settings)
                try:
                    await producer.start()
                except BaseException:
                    await quietly(producer.stop())
                    raise
                self._producer = producer
            return self._producer

    def _refused(self, problem: Broken) -> Broken:
        if "TOO_LARGE" not in problem.code:
            return problem
        most = self._producing["max_request_size"]
        return Broken(f"{problem} (max_request_size is {most} bytes)", problem.code)

    async def flush(self, timeout: float) -> None:
        if self._open:
            await asyncio.wait(self._open, timeout=timeout)

    # The cluster

    async def make(self, topics: Sequence[Topic]) -> list[str]:
        """Make topics that are not there; the names of those that were made."""
        unsure: set[str] = set()
        return await self.patiently(lambda: self._make(topics, unsure))

    async def _make(self, topics: Sequence[Topic], unsure: set[str]) -> list[str]:
        """``unsure`` are those that were asked for before, without an answer."""
        known = await self.layout([t.name for t in topics])
        made, before = [name for name in known if name in unsure], set(unsure)
        new = [
            # The empty assignment says that the broker's defaults are wanted.
            NewTopic(t.name, t.num_partitions or -1, t.replication_factor or -1, {}, t.config or {})
            if t.num_partitions is None or t.replication_factor is None
            else NewTopic(t.name, t.num_partitions, t.replication_factor, None, t.config or {})
            for t in topics
            if t.name not in known
        ]
        if not new:
            return made
        unsure |= {t.name for t in new}
        answer = await self.asked(self._need().create_topics(new, timeout_ms=int(ASK * 1000)))
        for name, number, text in answer.topic_errors:
            if number == 0 or (number == _errors.TopicAlreadyExistsError.errno and name in before):
                made.append(name)
            elif number != _errors.TopicAlreadyExistsError.errno:
                kind = _errors.for_code(number)
                raise Broken(text or kind.__name__, _NAMES.get(number, kind.__name__))
        for _ in range(50 if made else 0):  # until the brokers know them too
            if len(await self.layout(made)) == len(made):
                break
            await asyncio.sleep(0.02)
        return made

    async def layout(self, topics: Sequence[str] | None) -> Mapping[str, list[int]]:
        """The partitions of topics, or of all. Unknown ones are left out."""
        found: dict[str, list[int]] = {}
        # All of them: asked for a topic that is not there, the cluster would make it.
        for topic in await self.asked(self._need().describe_topics(None)):
            if topics is not None and topic["topic"] not in topics:
                continue
            number = topic["error_code"]
            if number == 0:
                found[topic["topic"]] = sorted(p["partition"] for p in topic["partitions"])
            elif number not in (3, 5):  # there is none, or it has no leader yet
                kind = _errors.for_code(number)
                raise Broken(kind.__name__, _NAMES.get(number, kind.__name__))
        return found

    async def ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Its protocol does not tell a topic from an earlier one of its name."""
        return dict.fromkeys(await self.layout(topics), "")

    async def ends(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets behind the last messages of partitions."""
        return await self._edges("end_offsets", [TopicPartition(*p) for p in places])

    async def begins(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets of the first messages."""
        return await self._edges("beginning_offsets", [TopicPartition(*p) for p in places])

    async def times(self, places: Sequence[Place], ms: int) -> dict[Place, int]:
        """The offsets of the first messages that are not older than that; -1 if all are."""
        asked = {TopicPartition(*p): ms for p in places}
        return await self._edges("offsets_for_times", asked)

    async def _edges(self, method: str, asked: Any) -> dict[Place, int]:
        self._need()
        found = await self.asked(getattr(self._looker, method)(asked)) if asked else {}
        return {
            Place(p.topic, p.partition): -1 if at is None else getattr(at, "offset", at)
            for p, at in found.items()
        }

    async def committed(self, group: str, places: Sequence[Place]) -> dict[Place, tuple[int, str]]:
        """What a group was told: the offset and the note, for partitions where it was.

        The library knows nothing of transactions that are open, so it gets what was told before.
        """
        asked = [TopicPartition(*p) for p in places]
        end = time.monotonic() + 2 * ASK
        while True:
            try:
                found = await self._need().list_consumer_group_offsets(group, partitions=asked)
                if len(found) == len(asked):
                    break
                # The library leaves out why: an error of the whole group.
                raise _errors.GroupLoadInProgressError("the group does not tell its offsets")
            except _UNANSWERED as error:
                passing = getattr(error, "retriable", True) or getattr(error, "errno", 0) == 15
                if not passing or time.monotonic() > end:
                    raise broken(error) from error
                await asyncio.sleep(TURN)  # its coordinator is chosen, or reads
        return {
            Place(p.topic, p.partition): (told.offset, (told.metadata or "").rstrip(_END))
            for p, told in found.items()
            if told.offset >= 0
        }

    async def cut(self, place: Place, before: int) -> None:
        """Delete the messages of a partition before an offset for good."""
        asked = {TopicPartition(*place): RecordsToDelete(before)}
        await self.asked(self._need().delete_records(asked))

    async def scan(self, topic: str, starts: Mapping[Place, int]) -> AsyncGenerator[Record, None]:
        """What a topic has now, partition by partition; nothing is consumed."""
        consumer = AIOKafkaConsumer(**{**self.reading, "isolation_level": "read_committed"})
        try:
            await self.asked(consumer.start())
            places = [Place(topic, n) for n in (await self.layout([topic])).get(topic, [])]
            first, last = await self.begins(places), await self.ends(places)
            for place in places:
                asked, part = TopicPartition(*place), Partition(place, 0, None)
                consumer.assign([asked])
                consumer.seek(asked, max(starts.get(place, 0), first[place]))
                while await consumer.position(asked) < last[place]:
                    messages = await self.asked(consumer.getmany(timeout_ms=500))
                    for record in records(messages.get(asked, []), {place: part}):
                        yield record
                    part.open.clear()
        finally:
            await quietly(consumer.stop())

    # Subscriptions

    def reader(self, plan: Plan, owner: Owner) -> AioReader:
        """What reads for a subscription."""
        from .aio_reader import AioReader

        return AioReader(self, plan, owner)


def _expire(future: asyncio.Future[RecordMetadata]) -> None:
    if not future.done():
        future.set_exception(Broken("no confirmation in time", "_MSG_TIMED_OUT"))


def _passes(error: BaseException | None) -> bool:
    return bool(getattr(error, "retriable", False))
