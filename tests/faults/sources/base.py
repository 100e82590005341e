"""What a source that scenarios run on offers; a broker adds a class or two of it.

A scenario asks for what it needs (``Capability``, ``confirms``, ``processes``) and never for a
broker by its name, unless the fault itself exists there only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from millstream import Exponential, Retry
from millstream.broker import Broker
from millstream.dedup import Dedup, SqliteDedup


class Setup(msgspec.Struct, kw_only=True):
    """How one application under test is set up; times in seconds.

    Fields:
        source: the name of its source.
        url: where its broker is.
        folder: where ledgers go.
        name: the first part of all its addresses.
        concurrency: lanes.
        ordered: whether the order per key is kept.
        ack_wait: after which an unsettled message is delivered again.
        work: for each message.
        attempts, delay: of the retry; the delay doubles.
        grace: of the drain.
        limit: of the handler's run.
        dedup: whether a file remembers what was handled.
        results: whether each message leads to another one, on a stream.
        reconnect: longest wait between two attempts to connect.
        ping: between two signs of life of a connection.
        stream: further settings of the stream.
        answers: whether there is a handler for requests too.
        publish_timeout: of everything it publishes.
        dead_letter: another address of the dead letters.
    """

    source: str = "jetstream"
    url: str = ""
    folder: str = ""
    name: str = "faults"
    concurrency: int = 1
    ordered: bool = False
    ack_wait: float = 2.0
    work: float = 0.01
    attempts: int = 5
    delay: float = 0.1
    grace: float = 5.0
    limit: float | None = None
    dedup: bool = False
    results: bool = False
    reconnect: float = 0.5
    ping: float = 1.0
    stream: dict[str, Any] = {}
    answers: bool = False
    publish_timeout: float = 5.0

    @property
    def subject(self) -> str:
        """Where the messages go."""
        return f"{self.name}.in.all"


class Source(ABC):
    """One kind of source."""

    name: str
    #: A publication is confirmed once it is stored, and comes again until it is settled.
    confirms = True
    #: It can be reached by other processes than this one.
    processes = True

    @abstractmethod
    def broker(self, setup: Setup) -> Broker:
        """A broker of this kind."""

    @abstractmethod
    def subscription(self, setup: Setup) -> dict[str, Any]:
        """The arguments of ``broker.subscriber`` besides the address and the common ones."""

    def results(self, setup: Setup) -> dict[str, Any]:
        """The arguments of ``broker.publisher`` for what handlers return."""
        return {}

    def publication(self, setup: Setup, id: str) -> dict[str, Any]:
        """The arguments of ``broker.publish`` besides the body and the address."""
        return {}

    def common(self, setup: Setup) -> dict[str, Any]:
        """The options of every broker."""
        store = SqliteDedup(f"{setup.folder}/dedup.db") if setup.dedup else None
        options = {
            "concurrency": setup.concurrency,
            "ordered_by": "key" if setup.ordered else None,
            "handler_timeout": setup.limit,
            "deduplicate": Dedup(key=body_id, store=store, lease=5.0) if store else None,
        }
        if self.confirms:
            options["retry"] = Retry(setup.attempts, delay=Exponential(setup.delay, cap=5.0))
        return options

    async def held(self, broker: Any, setup: Setup) -> int:
        """Messages that are not settled yet."""
        return 0

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        """The dead letters: bodies and headers."""
        return []

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        """What the handlers' results led to."""
        return []


def body_id(message: Any) -> str:
    """The id that the sender gave, whatever the broker calls the message."""
    return str(msgspec.json.decode(message.body)["id"])
