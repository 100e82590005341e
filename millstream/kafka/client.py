"""What the engine asks of a client library: the same of confluent-kafka and of aiokafka."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from .message import Record, RecordMetadata
from .offsets import Commit, Partition, Place
from .options import KafkaSubscription, Topic

Pairs = list[tuple[str, bytes]]


class Start(NamedTuple):
    """Where a partition begins that just came: the offset, and the note of its last commit."""

    topic: str
    partition: int
    offset: int
    note: str | None


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


class Refused(Broken):
    """A transaction was aborted because the cluster does not take some of its messages.

    Args:
        text: why.
        code: Kafka's name of the error.
        which: their places among the messages.
    """

    def __init__(self, text: str, code: str, which: Sequence[int]) -> None:
        super().__init__(text, code)
        self.which = which


class Plan(msgspec.Struct, frozen=True):
    """How one reader reads.

    Fields:
        spec: the subscription.
        topics: names, or one regular expression that begins with ``^``.
        group: the consumer group.
        begin: ``earliest`` or ``latest``.
        partitions: exactly these, with where to begin.
        refresh: seconds between two looks for new topics and partitions.
    """

    spec: KafkaSubscription
    topics: list[str]
    group: str | None
    begin: str
    partitions: Sequence[tuple[Place, int]] = ()
    refresh: float = 30.0

    def wants(self, name: str) -> bool:
        """Whether a topic is among those that are read."""
        if self.topics[0].startswith("^"):
            return not name.startswith("__") and re.match(self.topics[0], name) is not None
        return name in self.topics


class Owner(Protocol):
    """Who uses a reader."""

    def arrived(self, messages: list[Any]) -> None:
        """Messages of any partitions, in the order of each; no more come before ``hold``."""

    async def gained(self, starts: Sequence[Start]) -> None:
        """These partitions are ours from now on."""

    async def losing(self, places: Sequence[Place], *, gone: bool) -> list[Commit]:
        """These partitions go to somebody else; what to commit before they do.

        ``gone`` says that they are gone already, and nothing can be committed.
        """
        ...

    def failed(self, error: Broken) -> None:
        """The reader reports an error; a fatal one is its end."""

    def moved(self, start: Start) -> None:
        """What arrives of a partition from now on begins there."""

    def fence(self, places: Sequence[Place]) -> None:
        """These partitions are gone while we were stuck; called in any thread."""


class Reader(Protocol):
    """Reads for one subscription, and tells its :class:`Owner`.

    ``member`` is what the client library knows of our place in the group.
    """

    member: Any

    async def start(self) -> None: ...
    async def close(self) -> None:
        """Leave the group, after a last commit."""

    def hold(self, full: bool) -> None:
        """Read nothing for now, but stay in the group; or go on."""

    def halt(self, place: Place, stop: bool) -> None:
        """The same for one partition."""

    async def commit(self, commits: Sequence[Commit]) -> None:
        """Returns when the group knows; :class:`Broken` if it does not take it."""

    async def refresh(self) -> None:
        """Bring ``member`` up to date."""

    async def seek(self, place: Place, offset: int) -> None:
        """Read a partition from there; the owner is told when it is so.

        Raises:
            Broken: the partition is not read.
        """

    async def ends(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets behind the last messages."""
        ...

    async def begins(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets of the first messages."""
        ...

    async def times(self, places: Sequence[Place], ms: int) -> dict[Place, int]:
        """The offsets of the first messages that are not older than that."""
        ...


class Transactor(Protocol):
    """A transactional producer; one transaction after another."""

    async def open(self) -> None:
        """End what the last owner of its name left open, and fence it.

        Raises:
            Broken: the cluster does not let us.
        """

    async def run(self, sends: Sequence[Any], commits: Sequence[Commit], member: Any) -> None:
        """Store messages and offsets at once.

        Raises:
            Refused: it was aborted, and will be again with the same messages.
            Broken: it was aborted; or, fatal, it is not known and the producer is of no use any
                more. ``_FENCED`` says that another process has its name.
        """

    async def close(self) -> None: ...


class Client(Protocol):
    """One client library, connected to one cluster."""

    @staticmethod
    def records(messages: list[Any], parts: Mapping[Any, Partition]) -> list[Record]:
        """Messages of the library as ours: those that belong to a partition, which admits them."""
        ...

    @classmethod
    def bundles(
        cls, messages: list[Any], parts: Mapping[Any, Partition], size: int
    ) -> list[Record]:
        """The same, in bundles of up to ``size`` where there is nothing to know of each."""
        ...

    async def connect(self) -> None: ...
    async def close(self) -> None: ...
    async def ping(self, timeout: float) -> None:
        """Raise :class:`Broken` unless a broker answers in time."""

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        pairs: Pairs,
        partition: int | None,
        timestamp_ms: int | None,
    ) -> asyncio.Future[RecordMetadata]: ...
    async def flush(self, timeout: float) -> None: ...
    async def renew(self) -> None:
        """A new producer in place of one that failed for good."""

    def reader(self, plan: Plan, owner: Owner) -> Reader: ...
    def transactor(self, name: str) -> Transactor:
        """A producer with this transactional id."""
        ...

    async def make(self, topics: Sequence[Topic]) -> list[str]:
        """Make topics that are not there; the names of those that were made."""
        ...

    async def layout(self, topics: Sequence[str]) -> Mapping[str, list[int]]:
        """The partitions of topics; all topics if none is named. Unknown ones are left out."""
        ...

    async def ids(self, topics: Sequence[str]) -> dict[str, str]:
        """What tells a topic from an earlier one of its name. Unknown ones are left out."""
        ...

    async def ends(self, places: Sequence[Place]) -> dict[Place, int]:
        """The offsets behind the last messages."""
        ...

    async def cut(self, place: Place, before: int) -> None:
        """Delete the messages of a partition before an offset for good."""

    def scan(self, topic: str, starts: Mapping[Place, int]) -> AsyncIterator[Record]:
        """What a topic has now, partition by partition; nothing is consumed."""
        ...
