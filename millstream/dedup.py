"""Idempotent consumers: a message that was handled before is not handled again.

At-least-once sources deliver some messages twice: after a kill between the handler and the
acknowledgement, or when a sender repeats itself. A store remembers the keys of what was
handled; the key is marked after the handler and its publications and before the message is
settled, so that a kill in between leads to a second run, never to a lost message.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from .ack import Settlement
from .clock import Clock, LoopClock
from .errors import BatchFailed, NackMessage, SetupError
from .message import BatchMessage, Message
from .middleware import Call

if TYPE_CHECKING:
    import sqlite3

#: What a store answers to a claim: run it, it is being run elsewhere, or it was done.
Claim = Literal["mine", "busy", "done"]


class DedupStore(Protocol):
    """Remembers keys; shared by all processes that must not repeat each other's work.

    A store that cannot remember for ever says in an attribute ``longest`` for how many seconds
    it can.
    """

    async def claim(self, key: str, lease: float) -> Claim:
        """Take a key for ``lease`` seconds, unless it is done or somebody else has it."""
        ...

    async def done(self, key: str, ttl: float) -> None:
        """Remember for ``ttl`` seconds that the key was handled."""

    async def release(self, key: str) -> None:
        """Give a claimed key back: its handling failed."""


class Dedup(msgspec.Struct, frozen=True):
    """Handle each key once.

    Fields:
        key: a header's name, or a function of the message; the message's id by default.
        ttl: seconds for which a handled key is remembered; a day by default. It has to be
            longer than a message can take to come again.
        store: where keys are kept; by default in this process, which sees only the
            repetitions that reach this process while it lives.
        lease: seconds after which the claim of a process that died is free again; longer
            than any handler runs.
    """

    key: str | Callable[[Message[Any]], str] | None = None
    ttl: float = 86_400.0
    store: DedupStore | None = None
    lease: float = 60.0

    def __post_init__(self) -> None:
        longest = getattr(self.store, "longest", None)
        if longest is not None and self.ttl > longest:
            raise SetupError(
                f"Dedup(ttl={self.ttl:g}): the store forgets after {longest:g} s",
                code="MS142",
                fix="shorten ttl, or let the store remember longer",
            )

    def key_of(self, message: Message[Any]) -> str:
        """A message's key.

        Raises:
            SetupError: the header that should carry it is missing.
        """
        if callable(self.key):
            return str(self.key(message))
        if self.key is None:
            return message.message_id
        value = message.headers.get(self.key)
        if value is None:
            raise SetupError(
                f"Dedup(key={self.key!r}): the message has no such header", code="MS140"
            )
        return value


class Once:
    """Runs ``call`` for messages that were not handled before.

    Args:
        dedup: what the user asked for.
        scope: keeps the keys of subscriptions apart.
        clock: the default store's.
        call: the handling of a message.
    """

    def __init__(self, dedup: Dedup, scope: str, clock: Clock, call: Call) -> None:
        self.dedup, self.scope, self.call = dedup, scope, call
        self.store = dedup.store or MemoryDedup(clock)

    async def run(self, message: Message[Any]) -> Any:
        if isinstance(message, BatchMessage):
            return await self._run_batch(message)
        store, dedup = self.store, self.dedup
        key = self._key(message)
        claim = await store.claim(key, dedup.lease)
        if claim == "done":
            return None
        if claim == "busy":
            raise NackMessage(delay=self._again)
        try:
            result = await self.call(message)
        except BaseException:
            await store.release(key)
            raise
        await store.done(key, dedup.ttl)
        return result

    async def _run_batch(self, batch: BatchMessage) -> Any:
        """The same for a list, each message of which has a key of its own."""
        mine: list[Message[Any]] = []
        failed: Container[int] = range(len(batch.messages))
        try:
            for message in batch.messages:
                claim = await self.store.claim(self._key(message), self.dedup.lease)
                if claim == "mine":
                    mine.append(message)
                elif claim == "done":
                    await message.settle(Settlement.ACK)
                else:
                    await message.settle(Settlement.NACK, self._again)
            batch.messages[:] = mine
            result = await self.call(batch) if mine else None
            failed = ()
            return result
        except BatchFailed as error:
            failed = error.errors
            raise
        finally:
            for index, message in enumerate(mine):
                if index in failed:
                    await self.store.release(self._key(message))
                else:
                    await self.store.done(self._key(message), self.dedup.ttl)

    @property
    def _again(self) -> float:
        """Seconds after which to look at a message whose twin is being handled and may fail."""
        return min(1.0, self.dedup.lease)  # when the twin's lease is over at the latest

    async def missing(self, message: Message[Any]) -> bool:
        """Whether a message was neither handled nor is at this moment."""
        key = self._key(message)
        claim = await self.store.claim(key, self.dedup.lease)
        if claim == "mine":
            await self.store.release(key)
        return claim == "mine"

    def _key(self, message: Message[Any]) -> str:
        return f"{self.scope}:{self.dedup.key_of(message)}"


class MemoryDedup:
    """Keys in this process; forgotten when it ends."""

    def __init__(self, clock: Clock | None = None, *, limit: int = 100_000) -> None:
        self._clock = clock or LoopClock()
        self._limit = limit
        #: The oldest entries stand first.
        self._keys: OrderedDict[str, tuple[bool, float]] = OrderedDict()

    async def claim(self, key: str, lease: float) -> Claim:
        now = self._clock.now()
        done, until = self._keys.get(key, (False, 0.0))
        if until > now:
            return "done" if done else "busy"
        self._put(key, False, now + lease)
        return "mine"

    async def done(self, key: str, ttl: float) -> None:
        self._put(key, True, self._clock.now() + ttl)

    async def release(self, key: str) -> None:
        self._keys.pop(key, None)

    def _put(self, key: str, done: bool, until: float) -> None:
        self._keys[key] = (done, until)
        self._keys.move_to_end(key)
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)


class SqliteDedup:
    """Keys in a SQLite file, shared by the processes of one machine.

    Args:
        path: the file; made if it is not there.
    """

    #: Forgotten keys are swept out once in so many statements.
    SWEEP = 1000

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._count = 0

    async def claim(self, key: str, lease: float) -> Claim:
        return await asyncio.to_thread(self._claim, key, lease)

    async def done(self, key: str, ttl: float) -> None:
        await asyncio.to_thread(
            self._execute,
            "INSERT INTO keys VALUES (?, 1, ?) "
            "ON CONFLICT (key) DO UPDATE SET done = 1, until = excluded.until",
            key,
            time.time() + ttl,
        )

    async def release(self, key: str) -> None:
        await asyncio.to_thread(self._execute, "DELETE FROM keys WHERE key = ? AND done = 0", key)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _claim(self, key: str, lease: float) -> Claim:
        now = time.time()
        # One statement decides, so that two processes cannot both win.
        won = self._execute(
            "INSERT INTO keys VALUES (?, 0, ?) "
            "ON CONFLICT (key) DO UPDATE SET done = 0, until = excluded.until "
            "WHERE keys.until <= ? RETURNING 1",
            key,
            now + lease,
            now,
        )
        if won:
            return "mine"
        found = self._execute("SELECT done FROM keys WHERE key = ?", key)
        return "done" if found and found[0][0] else "busy"

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            connection = self._open()
            rows = connection.execute(statement, values).fetchall()
            self._count += 1
            if self._count % self.SWEEP == 0:
                connection.execute("DELETE FROM keys WHERE until <= ?", (time.time(),))
            return rows

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            import sqlite3  # only for those who use it: it is slow to import

            connection = sqlite3.connect(
                self._path, timeout=10, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS keys "
                "(key TEXT PRIMARY KEY, done INTEGER NOT NULL, until REAL NOT NULL) WITHOUT ROWID"
            )
            connection.execute("CREATE INDEX IF NOT EXISTS keys_until ON keys (until)")
            self._connection = connection
        return self._connection
