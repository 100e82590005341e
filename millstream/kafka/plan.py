"""What a reader is told, and whom it tells: the same for both client libraries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from .client import Broken
from .offsets import Commit, Place, Start
from .options import KafkaSubscription

#: Seconds that the reader waits for something new before it looks at what else is to be done.
TURN = 0.1
#: Seconds after which the group may take one who stood still for gone. A commit of all offsets is
#: the price of a false alarm, and the least that a broker allows for a session is 6 seconds.
STILL = 1.0
#: Seconds for which a last commit is tried while the group is being shared out anew.
LEAVE = 2.0


class Plan(msgspec.Struct, frozen=True):
    """How one reader reads.

    Fields:
        spec: the subscription.
        topics: names, or one regular expression that begins with ``^``.
        group: the consumer group.
        begin: ``earliest`` or ``latest``.
        partitions: exactly these, with where to begin.
        refresh: seconds between two looks for new topics and partitions.
        without: topics that the regular expression takes and that are not read.
    """

    spec: KafkaSubscription
    topics: list[str]
    group: str | None
    begin: str
    partitions: Sequence[tuple[Place, int]] = ()
    refresh: float = 30.0
    without: Sequence[str] = ()

    def wants(self, name: str) -> bool:
        """Whether a topic is among those that are read."""
        if self.topics[0].startswith("^"):
            hidden = name.startswith("__") or name in self.without
            return not hidden and re.match(self.topics[0], name) is not None
        return name in self.topics


class Owner(Protocol):
    """Who uses a reader."""

    def arrived(self, messages: list[Any]) -> None:
        """Messages of any partitions, in the order of each; no more come before ``hold``."""

    async def gained(self, starts: Sequence[Start]) -> list[Start]:
        """These partitions are ours from now on; where to begin to read them."""
        ...

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
