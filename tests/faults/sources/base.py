"""What a source that scenarios run on offers, and the settings of one scenario.

How a broker joins: a module beside this one with a subclass of :class:`Source` for each kind of
source it has, and its name in ``MODULES`` of tests/faults/registry.py. The class says

1. how things are reached: ``server``, ``url``, ``broker``, ``subscription``; ``results`` and
   ``publication`` where those need options;
2. what the broker itself knows, asked with its own client and not with ours: ``held``, ``dead``,
   ``made``;
3. what it is like: the attributes below. A scenario asks for them (``@on(confirms=True)``) and
   never for a broker by its name, unless the fault itself exists there only;
4. which faults can be brought about there: the methods under "Faults". A source takes part in the
   scenarios of those that it overrides (``@on(has="delete_group")``).

A server must keep what it confirmed when it is killed and started again. It may be used by many
scenarios, one after the other, each with a ``setup.name`` of its own for everything it declares;
a scenario that does something to its server gets one that nobody has used before and nobody uses
afterwards only in so far as ``setup`` says (``watched``, ``logins``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from millstream import Exponential, Retry
from millstream.broker import Broker
from millstream.dedup import Dedup, SqliteDedup
from millstream.driver import Capability
from tests.servers import Server


class Setup(msgspec.Struct, kw_only=True):
    """How one application under test is set up; times in seconds.

    Fields:
        kind: ``module:class`` of its source.
        url: where its broker is.
        folder: where ledgers go.
        name: the first part of all its addresses, and of whatever else is declared.
        concurrency: lanes.
        ordered: whether the order per key is kept.
        ack_wait: after which an unsettled message is delivered again.
        work: for each message.
        attempts, delay: of the retry; the delay doubles.
        grace: of the drain.
        limit: of the handler's run.
        dedup: whether a file remembers what was handled.
        results: whether each message leads to another one, which is stored.
        reconnect: longest wait between two attempts to connect.
        ping: between two signs of life of a connection; two missing ones end it.
        answers: whether there is a handler for requests too.
        publish_timeout: of everything it publishes.
        room: bytes of messages that the source may hold; 0 for no limit.
        watched: whether the server, too, ends a connection after two missing signs of life.
        logins: whether the server knows the users ``worker`` and ``sender``, password ``pw``.
    """

    kind: str
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
    answers: bool = False
    publish_timeout: float = 5.0
    room: int = 0
    watched: bool = False
    logins: bool = False


class Source(ABC):
    """One kind of source."""

    name: ClassVar[str]
    #: Between the parts of an address.
    separator: ClassVar[str] = "."
    #: A publication is confirmed once it is stored, and comes again until it is settled.
    confirms: ClassVar[bool] = True
    #: What is published again with the same id is stored once.
    once: ClassVar[bool] = False
    #: A publication whose connection broke before its confirmation is sent again by the client.
    resends: ClassVar[bool] = False
    #: ``broker.publish`` takes the ``key`` whose order is kept.
    keyed: ClassVar[bool] = False
    #: Seconds for which a broker may not know yet that a message is settled.
    behind: ClassVar[float] = 0.0
    #: Seconds for which a message that a fault hit may wait before it is begun, since a worker
    #: puts it behind the others.
    linger: ClassVar[float] = 0.0
    #: The method of an intake by which a worker publishes a message anew and then acknowledges it:
    #: a worker that dies in between leaves it there twice, though it never began it.
    moves: ClassVar[str] = ""
    #: Other processes than this one can reach it, so that there is a server.
    processes: ClassVar[bool] = True
    #: Of the subscription.
    capabilities: ClassVar[Capability] = Capability.NOTHING
    #: An unsettled message comes again after ``setup.ack_wait`` though its worker lives; without,
    #: only when the worker's connection ends.
    deadline: ClassVar[bool] = True
    #: Whether consumers can tell that what they read from was gone while they were away.
    notices: ClassVar[bool] = True
    #: Bytes of the largest message; None where the server has no limit worth a try.
    max_message: ClassVar[int | None] = None
    #: What a request ends with when nobody listens; None where nobody answers requests.
    nobody: ClassVar[type[Exception] | None] = None
    #: What the error says when ``setup.room`` is used up; "" where there is no such limit.
    full: ClassVar[str] = ""
    #: What ``forbid`` can take away from the user ``worker``: "fetch", "acknowledge".
    forbids: ClassVar[tuple[str, ...]] = ()
    #: What the log says when a permission is missing.
    denied: ClassVar[str] = ""

    # How it is reached

    def server(self, setup: Setup) -> Server | None:
        """A server that was not started yet; None for a source in this process.

        Where its binary is not here it ends the test with :func:`tests.servers.missing`.
        """
        return None

    def url(self, port: int, user: str = "") -> str:
        """Where clients connect to, as ``user`` if one is given."""
        return ""

    def way(self, server: Any) -> tuple[int, int]:
        """The port that a proxy connects to, and the one that it listens on; 0 for any."""
        return server.port, 0

    def address(self, setup: Setup, *parts: str) -> str:
        """An address of this scenario; without parts where its messages go."""
        return self.separator.join((setup.name, *(parts or ("in", "all"))))

    @abstractmethod
    def broker(self, setup: Setup) -> Broker:
        """A broker of this kind, with the times of the setup."""

    @abstractmethod
    def subscription(self, setup: Setup) -> dict[str, Any]:
        """The arguments of ``broker.subscriber`` besides the address and the common ones.

        ``address`` among them replaces the address, where a source is more than that.
        """

    def answering(self, setup: Setup) -> dict[str, Any]:
        """The same for the subscriber that answers requests."""
        return {}

    def results(self, setup: Setup) -> dict[str, Any]:
        """The arguments of ``broker.publisher`` for what handlers return."""
        return {}

    def publication(self, setup: Setup, id: str) -> dict[str, Any]:
        """The arguments of ``broker.publish`` besides the body and the address.

        The same ``id`` means the same message, sent again since nobody knows whether it arrived.
        """
        return {}

    def common(self, setup: Setup) -> dict[str, Any]:
        """The options of every subscriber."""
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

    # What the broker knows; ``broker`` is connected, and sends

    async def held(self, broker: Any, setup: Setup) -> int:
        """Messages that are not settled yet, waiting or in some process; -1 if nobody can tell."""
        return -1

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        """The dead letters: bodies and headers."""
        return []

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        """What the handlers' results led to: the bodies."""
        return []

    def asking(self, broker: Any) -> int:
        """How many callers the broker's driver believes to wait for an answer."""
        return 0

    # Faults

    def wipe(self, server: Any) -> None:
        """Delete all that a server stored; it is stopped."""
        raise NotImplementedError

    async def delete_source(self, broker: Any, setup: Setup) -> None:
        """Delete what holds the messages, as an operator would: the stream, queue or topic."""
        raise NotImplementedError

    async def delete_group(self, broker: Any, setup: Setup) -> None:
        """Delete what remembers how far the workers are, where the messages stay."""
        raise NotImplementedError

    async def refuse_letters(self, broker: Any, setup: Setup) -> None:
        """Let no dead letter be stored, from now on."""
        raise NotImplementedError

    async def take_letters(self, broker: Any, setup: Setup) -> None:
        """Let dead letters be stored again; what stood in their way is gone."""
        raise NotImplementedError

    def forbid(self, server: Any, what: str) -> None:
        """Take something of ``forbids`` away from the user ``worker``; "" gives all back.

        The server may run already, and connections stay open.
        """
        raise NotImplementedError


def body_id(message: Any) -> str:
    """The id that the sender gave, whatever the broker calls the message."""
    return str(msgspec.json.decode(message.body)["id"])
