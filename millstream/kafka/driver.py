"""The Kafka driver: one client library, and everything that goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..address import AddressSyntax
from ..base import BaseDriver, Questions, disconnected, not_yet_connected
from ..checks import check_types
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    ConnectError,
    Fenced,
    MessageTooLarge,
    PublishError,
    PublishTimeout,
    SetupError,
)
from ..message import Message, new_id
from .client import Broken, Client
from .flow import Flow, log
from .letters import KafkaLetters, left_out, letters_of
from .message import KafkaMessage, Record, RecordMetadata, Send
from .offsets import Place
from .options import (
    SYNTAX,
    KafkaPublication,
    KafkaPublish,
    KafkaSubscription,
    Topic,
    TopicPartition,
)
from .plan import Plan
from .retries import Retries, names, topics
from .transactions import Transactional, TransactionalFlow
from .transactor import Transactor
from .units import unit_of

if TYPE_CHECKING:
    from .aio import AioClient

#: Seconds between two looks whether the cluster is back.
LOOK = 0.5
#: Seconds between two looks whether there is room for a message.
ROOM = 0.005
#: Seconds that a reader of a pattern takes to see a new topic.
REFRESH = 5.0
#: Milliseconds for which answers to requests are kept.
_REPLIES = {"retention.ms": "600000", "cleanup.policy": "delete"}


class KafkaDriver(BaseDriver):
    """One connection to a Kafka cluster.

    Args:
        make: gives the client; called with a function to be told of outages.
        where: the cluster's addresses, for people.
        publish_timeout: seconds for one publication, where the command does not say it.
        refresh: seconds between two looks for new topics and partitions.
        create: whether topics are made that are not there.
        reply_topic: where answers to requests come.
        transactional: what is said of transactions, if there are to be any.
        largest: bytes of the largest message that the producer takes.
    """

    name: ClassVar[str] = "kafka"
    syntax: ClassVar[AddressSyntax] = SYNTAX
    command: ClassVar[type[PublishCommand]] = KafkaPublish
    control_headers: ClassVar[str | tuple[str, ...]] = ""

    def __init__(
        self,
        make: Callable[[Callable[[str], None]], Client | AioClient],
        where: str,
        *,
        publish_timeout: float = 5.0,
        refresh: float | None = None,
        create: bool = True,
        reply_topic: str = "millstream.replies",
        transactional: Transactional | None = None,
        largest: int = 1_048_576,
        patience: float = 10.0,
    ) -> None:
        super().__init__(log, publish_timeout=publish_timeout)
        self.client: Client | AioClient = make(self._down)
        self._where, self.refresh, self.create = where, refresh, create
        self.reply_topic = reply_topic
        self.transactional, self._largest = transactional, largest
        self._transactor: Transactor | None = None
        self._transacting = asyncio.Lock()
        self.retries = Retries(self)
        self._connected = False
        self._looking = False
        #: Seconds after which a broker that does not answer is not reached.
        self._patience = patience
        #: Why no broker is reached at the moment.
        self._reason = ""
        self._replies: Flow | None = None
        self._replies_lock = asyncio.Lock()
        #: Requests that wait for their answers, by correlation id.
        self.asked: Questions[str, Record] = Questions()
        self._subscriptions = 0

    def describe(self) -> str:
        return self._where

    # Connection

    async def connect(self) -> None:
        if self._connected:
            return
        try:
            await self.client.connect()
        except Broken as error:
            if error.code == "_INVALID_ARG":
                raise SetupError(
                    f"{self._where}: {error}", fix="see the options of KafkaBroker"
                ) from error
            permanent = "AUTH" in error.code or "SSL" in error.code
            raise ConnectError(f"{self._where}: {error}", permanent=permanent) from error
        self._connected, self._reason = True, ""
        self.spawn(self._listen())

    async def close(self) -> None:
        try:
            await self.end()
            replies, self._replies = self._replies, None
            if replies is not None:
                await replies.close()
            if self._transactor is not None:
                await self._transactor.close()
                self._transactor = None
            if self._connected and not self._reason:
                with contextlib.suppress(Broken):
                    await self.client.flush(2.0)
        finally:  # also if there was no time for the rest
            if self._connected:
                self._connected = False
                await self.client.close()

    async def ping(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self.client.ping(timeout)
        except (Broken, TimeoutError):
            return False
        return True

    def _down(self, reason: str) -> None:
        """The library reaches no broker, or believes so: it is asked for a sign of life."""
        if self._connected and not self._looking:
            self._looking = True
            self.spawn(self._look(reason))

    async def _listen(self) -> None:
        """Ask for a sign of life now and then: who falls silent is not down for the library."""
        while True:
            await asyncio.sleep(self._patience / 2)
            if self._looking or await self.ping(self._patience) or self._looking:
                continue
            self._looking = True
            await self._look(f"no answer within {self._patience:g} s", sure=True)

    async def _look(self, reason: str, *, sure: bool = False) -> None:
        try:
            if not sure and await self.ping(2.0):
                return
            self._reason = reason
            self.notify("disconnected", reason)
            while not await self.ping(2.0):
                await asyncio.sleep(LOOK)
            self._reason = ""
            self.notify("reconnected", self._where)
        finally:
            self._looking = False

    # Declarations and subscriptions

    async def declare(self, specs: Sequence[Spec]) -> None:
        try:
            await self.ensure(specs)
        except Broken as error:
            raise self._refusal("topics cannot be made", error) from error

    async def ensure(self, specs: Sequence[Spec]) -> list[str]:
        """Make what topics are missing; the names of those that were made."""
        wanted: dict[str, Topic] = {}
        for spec in specs:
            found: list[Topic] = []
            if isinstance(spec, KafkaSubscription):
                found = [*([] if spec.wild else spec.topic_list), *topics(spec)]
            elif isinstance(spec, KafkaPublication):
                found = [spec.topic if isinstance(spec.topic, Topic) else Topic(spec.topic)]
            for topic in found:
                known = wanted.get(topic.name)
                if topic.declare and (known is None or known.num_partitions is None):
                    wanted[topic.name] = topic
        return await self.client.make(list(wanted.values())) if wanted and self.create else []

    def _refusal(self, what: str, error: Broken) -> Exception:
        if "AUTHORIZATION" in error.code or error.code == "POLICY_VIOLATION":
            return SetupError(
                f"{what}: {error}", fix="have them made by an operator, or grant the right"
            )
        if error.code == "_INVALID_ARG":
            return SetupError(f"{what}: {error}", fix="see the options of the subscriber")
        return ConnectError(f"{self._where}: {what}: {error}")

    def plan(self, spec: KafkaSubscription) -> Plan:
        """How a subscription is read."""
        group = spec.group_id
        begin = spec.auto_offset_reset or ("latest" if group is None else "earliest")
        if spec.wild:
            pattern = SYNTAX.compile(spec.destination).pattern
            listed = [pattern] if not names(spec) else [pattern, *names(spec)]
        else:
            listed = [*(t.name for t in spec.topic_list), *names(spec)]
        refresh = self.refresh or (REFRESH if spec.wild or group is None else 30.0)
        parts = [(Place(p.topic, p.partition), p.offset) for p in spec.partitions]
        return Plan(spec, listed, group, begin, parts, refresh, left_out(spec))

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        assert isinstance(spec, KafkaSubscription)
        exactly_once = self.transactional is not None and spec.group_id is not None
        kind = TransactionalFlow if exactly_once else Flow
        flow = kind(self, spec, sink, lost, self.plan(spec))
        try:
            await self._look_for(spec.partitions)
            await self.begin(flow)
        except Broken as error:
            raise self._refusal(f"{spec.destination} cannot be read", error) from error
        return flow

    async def _look_for(self, partitions: Sequence[TopicPartition]) -> None:
        """Raise a :class:`SetupError` for those that a topic does not have."""
        if not partitions:
            return
        there = await self.client.layout(list({p.topic for p in partitions}))
        for p in partitions:
            if p.topic in there and p.partition not in there[p.topic]:
                raise SetupError(
                    f"{p.topic} has no partition {p.partition}",
                    fix=f"it has {len(there[p.topic])}, counted from 0",
                )

    # Publishing

    async def publish(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> RecordMetadata | asyncio.Future[RecordMetadata] | None:
        if command.reply_to:
            headers = {**(headers or {}), "reply_to": command.reply_to}
        if self.transactional is not None:
            unit = unit_of(self)
            if unit is not None:
                receipt = unit.add(self._as_send(command, data, headers), self._largest)
                return _confirmed(receipt) if command.no_confirm else receipt
        return await self._publish(command, data, headers)

    async def _publish(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> RecordMetadata | asyncio.Future[RecordMetadata]:
        """Send at once, outside of any transaction."""
        future = self._offer(command, data, headers)
        if future is None:
            future = await self._offered(command, data, headers)
        if command.no_confirm:
            return future
        timeout = command.timeout
        if timeout is None or timeout == self.publish_timeout:
            try:
                return await future
            except Broken as error:
                raise self._unsent(command, error) from error
        try:
            async with asyncio.timeout(timeout):
                return await future
        except Broken as error:
            raise self._unsent(command, error) from error
        except TimeoutError:
            raise self._unsent(command, Broken("no confirmation", "_MSG_TIMED_OUT")) from None

    async def flush(self) -> None:
        """Wait until all that the library has is confirmed, or has failed."""
        await self.client.flush(self.publish_timeout)

    def _offer(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> asyncio.Future[RecordMetadata] | None:
        """Give a message to the library; None while it has no room."""
        if not self._connected:
            raise not_yet_connected(self._where)
        try:
            return self.client.send(self._as_send(command, data, headers))
        except BufferError:
            return None
        except Broken as error:
            raise self._unsent(command, error) from error
        except (AttributeError, TypeError) as error:
            raise _mistake(command, error) from error

    def _as_send(self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None) -> Send:
        topic = command.destination
        if not topic:
            raise SetupError("a message to nowhere", fix="name a topic")
        key = command.key
        return Send(
            topic,
            data if data or command.message is not None else None,
            key.encode() if isinstance(key, str) else key,
            [(name, text.encode()) for name, text in headers.items()] if headers else [],
            -1 if command.partition is None else command.partition,
            command.timestamp_ms or 0,
        )

    async def _offered(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None
    ) -> asyncio.Future[RecordMetadata]:
        end = time.monotonic() + (command.timeout or self.publish_timeout)
        while True:
            await asyncio.sleep(ROOM)
            future = self._offer(command, data, headers)
            if future is not None:
                return future
            if time.monotonic() > end:
                raise self._unsent(command, Broken("no room for it", "_MSG_TIMED_OUT"))

    def _unsent(self, command: KafkaPublish, error: Broken) -> Exception:
        """What a message that was not taken is called here."""
        topic = command.destination
        if "TOO_LARGE" in error.code:
            return MessageTooLarge(f"{topic!r}: {error}")
        if error.fatal:
            self.spawn(self._renew(str(error)))
        if error.code in ("_MSG_TIMED_OUT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "REQUEST_TIMED_OUT"):
            if self._reason:
                return disconnected(self._where, self._reason)
            seconds = command.timeout or self.publish_timeout
            return PublishTimeout(f"{topic!r}: no confirmation within {seconds:g} s")
        return PublishError(f"{topic!r} was not published: {error}")

    async def _renew(self, reason: str) -> None:
        self.notify("error", f"the producer is made anew: {reason}")
        with contextlib.suppress(Broken):
            await self.client.renew()

    async def transact(self, sends: Sequence[Send]) -> None:
        """Store messages at once, or none of them.

        Raises:
            Fenced: another process has the same transactional id.
            MessageTooLarge: one of them is too large; none is stored.
            PublishError: none of them is stored.
        """
        assert self.transactional is not None
        async with self._transacting:
            name = f"{self.transactional.id}.publish"
            if self._transactor is None:
                assert isinstance(self.client, Client)  # the other library has no transactions
                transactor = Transactor(self.client, name)
                try:
                    await transactor.open()
                except Broken as error:
                    await transactor.close()
                    raise PublishError(f"no transaction: {error}") from error
                self._transactor = transactor
            try:
                await self._transactor.run([sends], (), None)
            except Broken as error:
                if error.code == "_FENCED":
                    text = f"another process has the transactional id {name!r}"
                    raise Fenced(f"{text}; each process needs one of its own") from error
                if error.fatal:
                    await self._transactor.close()
                    self._transactor = None
                kind = MessageTooLarge if "TOO_LARGE" in error.code else PublishError
                raise kind(f"the transaction was aborted: {error}") from error

    # Requests

    async def request(
        self, command: KafkaPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Record:
        end = asyncio.get_running_loop().time() + timeout
        await self._open_replies(command, timeout)
        headers = dict(headers or {})
        known = headers.get("correlation_id")
        id = known if known and known not in self.asked else new_id()
        headers |= {"correlation_id": id, "reply_to": self.reply_topic}
        command.reply_to, command.timeout = self.reply_topic, timeout
        command.no_confirm = False
        with self.asked.ask(id, command.destination, timeout, end) as answer:
            # A request in a transaction would be seen only after its answer is there.
            await self._publish(command, data, headers)
            return await answer

    async def _open_replies(self, command: KafkaPublish, timeout: float) -> None:
        """Read the shared topic of answers, from now on."""
        async with self._replies_lock:
            if self._replies is not None:
                return
            spec = KafkaSubscription(Topic(self.reply_topic, config=_REPLIES))
            flow = Flow(self, spec, self._answered, self._no_replies, self.plan(spec))
            try:
                async with asyncio.timeout(timeout):
                    await self.ensure([spec])
                    await flow.start()
            except (Broken, TimeoutError) as error:
                await flow.close()
                raise self._unsent(command, Broken(str(error), "_MSG_TIMED_OUT")) from error
            self._replies = flow

    def _no_replies(self, error: Exception) -> None:
        self._replies = None
        self.notify("error", f"answers are not read any more: {error}")

    async def _answered(self, record: Record) -> None:
        id = next((v for k, v in record.pairs or () if k == "correlation_id"), None)
        self.asked.answer((id or b"").decode("utf-8", "replace"), record)

    def reply_envelope(self) -> type[Message[Any]]:
        return KafkaMessage

    # Dead letters

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        assert isinstance(spec, KafkaSubscription)
        return name or letters_of(spec)

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        address = self.letters_at(spec, name)
        if declare:
            await self.client.make([Topic(address, config={"retention.ms": "-1"})])
        return address

    def letters(self, address: str) -> KafkaLetters:
        return KafkaLetters(self, address)


def _mistake(command: KafkaPublish, error: Exception) -> SetupError:
    """What is wrong with a message that could not even be given to the library."""
    topic: Any = command.topic
    headers: dict[str, Any] = dict(command.headers or {})
    if not isinstance(topic, str | Topic):
        return SetupError(f"topic={topic!r}", code="MS121", fix="a name, or a Topic")
    for name, value in headers.items():
        if not isinstance(value, str):
            return SetupError(
                f"header {name!r} is {value!r}", code="MS121", fix="headers are texts"
            )
    try:
        check_types(command, "publish")
    except SetupError as mistake:
        return mistake
    return SetupError(f"{topic!r} was not published: {error}")


def _confirmed(receipt: RecordMetadata) -> asyncio.Future[RecordMetadata]:
    future: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
    future.set_result(receipt)
    return future
