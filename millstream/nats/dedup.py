"""Idempotent consumers across machines: the keys in a NATS key-value bucket."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from nats.errors import Error as NatsError
from nats.js.api import StorageType
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from ..dedup import Claim
from ..errors import SetupError, StateError
from ..message import current_message

if TYPE_CHECKING:
    from .broker import NatsBroker


T = TypeVar("T")


class _Entry(msgspec.Struct, array_like=True):
    """What stands under a key; ``until`` is in seconds since the epoch."""

    done: bool
    until: float


_decode = msgspec.json.Decoder(_Entry).decode


class NatsKvDedup:
    """Keys in a NATS key-value bucket, shared by all processes that reach the server.

    The clocks of these processes should agree to within a fraction of ``Dedup(lease=)``.

    Args:
        bucket: its name; made on first use.
        broker: whose connection to use; by default that of the subscription at work, which
            then has to be one of a NATS broker.
        max_age: seconds after which the bucket itself forgets a key; a week by default.
            ``Dedup(ttl=)`` can be up to this long. Of a bucket that exists already it is the
            least that is expected.
        storage: file or memory; file by default.
        replicas: servers that keep the bucket.
    """

    def __init__(
        self,
        bucket: str = "millstream-dedup",
        broker: NatsBroker | None = None,
        *,
        max_age: float = 604_800.0,
        storage: StorageType | None = None,
        replicas: int = 1,
    ) -> None:
        self.bucket, self.longest = bucket, max_age
        self._broker, self._storage, self._replicas = broker, storage, replicas
        self._checked: Any = None

    async def claim(self, key: str, lease: float) -> Claim:
        return await self._guarded(self._claim(key, lease))

    async def _claim(self, key: str, lease: float) -> Claim:
        store, name = await self._open(), escaped(key)
        now = self._driver().clock.wall()
        mine = msgspec.json.encode(_Entry(False, now + lease))
        while True:
            try:
                await store.create(name, mine)
                return "mine"
            except KeyWrongLastSequenceError:
                pass  # somebody was here before
            try:
                found = await store.get(name)
                entry = _decode(found.value or b"")
                if entry.until > now:
                    return "done" if entry.done else "busy"
                await store.update(name, mine, last=found.revision)
                return "mine"
            except (KeyNotFoundError, KeyWrongLastSequenceError):
                continue  # it changed in between

    async def done(self, key: str, ttl: float) -> None:
        await self._guarded(self._put(key, _Entry(True, self._driver().clock.wall() + ttl)))

    async def _put(self, key: str, entry: _Entry) -> None:
        await (await self._open()).put(escaped(key), msgspec.json.encode(entry))

    async def release(self, key: str) -> None:
        await self._guarded(self._release(key))

    async def _release(self, key: str) -> None:
        store, name = await self._open(), escaped(key)
        try:
            found = await store.get(name)
            if not _decode(found.value or b"").done:
                await store.update(
                    name, msgspec.json.encode(_Entry(False, 0.0)), last=found.revision
                )
        except (KeyNotFoundError, KeyWrongLastSequenceError):
            pass  # forgotten, or somebody else has it by now

    async def _guarded(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except NatsError:
            # Deleted while it was open? Then it is made again the next time.
            self._checked = None
            self._driver().stores.opened.pop(f"KV_{self.bucket}", None)
            raise

    def _driver(self) -> Any:
        if self._broker is not None:
            return self._broker.driver
        message = current_message()
        driver = message.link.driver if message is not None else None
        if not hasattr(driver, "stores"):
            raise StateError(
                f"NatsKvDedup({self.bucket!r}) is used outside of a NATS subscription, and "
                "nothing says whose connection it should take: give it broker="
            )
        return driver

    async def _open(self) -> Any:
        store = await self._driver().stores.key_value(
            self.bucket, ttl=self.longest, storage=self._storage, replicas=self._replicas
        )
        if store is not self._checked and isinstance(store, KeyValue):
            age = (await store.status()).ttl
            if age and age < self.longest:
                raise SetupError(
                    f"the bucket {self.bucket!r} forgets after {age:g} s, not {self.longest:g} s",
                    fix=f"change the bucket, or say so: NatsKvDedup(max_age={age:g})",
                )
            self._checked = store
        return store


def escaped(key: str) -> str:
    """A text as the key of a bucket (ADR-8: letters, digits and ``-/_=.``)."""
    if len(key) > 200:
        key = f"{key[:120]}-{hashlib.sha256(key.encode()).hexdigest()}"
    return re.sub(rb"[^A-Za-z0-9_-]", lambda m: b"=%02X" % m[0][0], key.encode()).decode()
