"""The consumer behind a JetStream subscription: its name, its settings, and where it goes on."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from ..errors import SetupError
from .flow import log
from .options import ACK_WAIT, NatsSubscription

if TYPE_CHECKING:
    from .driver import NatsDriver

#: Seconds after which the server forgets a consumer without a durable name that nobody reads.
INACTIVE = 300.0
#: Seconds between two signs of life of the server while it has nothing to deliver.
HEARTBEAT = 5.0
#: The key in a consumer's metadata under which the messages stand whose last attempt began.
BEGUN = "ms-begun"
#: How many of them are kept.
NOTES = 64
#: Settings that only say where a new consumer starts; the server refuses to change them.
_START = {"deliver_policy", "opt_start_seq", "opt_start_time"}


def durable_name(spec: NatsSubscription, retention: str) -> str | None:
    """The durable name that a subscription asks for, or None for a consumer that is not kept.

    Explicit names win. A ``queue`` names one together with what it reads, so that the same
    queue on several subjects works as it does on core NATS. On a work-queue stream there is
    one reader per subject by definition, so its name is derived as well. Everything else is
    ephemeral: two services that happen to read one subject must never share its messages
    without having said so.
    """
    config = spec.config or ConsumerConfig()
    if named := spec.durable or config.durable_name:
        return named
    if spec.watch is not None or spec.ordered_consumer or config.name:
        return None
    if spec.queue:
        return _join(spec.queue, spec.filters)
    if retention == "workqueue":
        return _join("millstream", spec.filters)
    return None


def _join(first: str, filters: Iterable[str]) -> str:
    subjects = "-".join(f.replace("*", "any").replace(">", "all") for f in filters)
    name = re.sub(r"[^\w-]+", "_", f"{first}-{subjects}".rstrip("-"))
    # Long names become folder names on the server; a digest keeps them apart.
    return (
        name if len(name) <= 64 else f"{name[:51]}-{hashlib.sha1(name.encode()).hexdigest()[:12]}"
    )


class Consumer:
    """Finds, creates, updates and recreates one consumer."""

    def __init__(self, driver: NatsDriver, spec: NatsSubscription) -> None:
        self.driver, self.spec = driver, spec
        self.stream = spec.stream_name or ""
        self.name = ""
        self.durable = False
        self.ack_wait = ACK_WAIT
        #: Where the server pushes to; None for a consumer that is fetched from.
        self.deliver_subject: str | None = None
        self.deliver_group = ""
        self.max_ack_pending = 0
        self.max_batch = 0
        self.expires = 30.0
        #: Seconds between the server's signs of life on a push consumer; 0 for none.
        self.heartbeat = 0.0
        #: Whether somebody read a push consumer already when it was found.
        self.bound = False
        #: Whether another stream of the same name was there when the consumer was looked after.
        self.emptied = False
        self._stream_created = ""
        self._created: str | None = None
        self._noting = asyncio.Lock()
        #: What this process noted; it lives, so those attempts did not end with it.
        self._noted: set[int] = set()
        #: The highest stream sequence known to be settled when this consumer was found.
        self.floor = 0

    async def ensure(self, resume: int | None = None, unsettled: int | None = None) -> bool:
        """Make the consumer be there.

        Args:
            resume: the stream sequence that a new one starts at.
            unsettled: the first one that may not be settled, as far as this process knows.

        Returns whether one that was there before had to be made again.

        Raises:
            SetupError: the server refuses it, or there is one that cannot be used.
        """
        if self.spec.watch is not None:
            stream = await self.driver.stores.ensure(self.spec)
        else:
            stream = await self.driver.streams.ensure(self.stream)
        known, created = self._stream_created, str(stream.get("created", ""))
        self.emptied = bool(known) and known != created
        self._stream_created = created
        if not self.name:
            self._choose_name(stream["config"].get("retention", ""))
        found = await self._find()
        if found is None:
            if self.emptied:
                resume = None  # another stream of the same name: its numbers begin anew
            found = await self._create(resume)
        elif not known:
            self.bound = bool(found.get("push_bound"))
            found = await self._update(found)
        elif not self.emptied and unsettled is not None and self._skips(found, unsettled):
            await self.driver.forget(self.stream, self.name)
            found = await self._create(resume)
        self._learn(found)
        return bool(known) and found.get("made", False)

    def _choose_name(self, retention: str) -> None:
        config = self.spec.config or ConsumerConfig()
        durable = durable_name(self.spec, retention)
        self.durable = durable is not None
        self.name = durable or config.name or self.driver.ephemeral_name(self.spec)
        if durable is None and self.spec.acknowledged and not config.name:
            log.warning(
                "%r reads stream %s without a durable name: each process gets every message, and "
                "starts over when it restarts; give durable= (or queue=) to continue and to share",
                self.spec.destination,
                self.stream,
            )

    async def info(self) -> dict[str, Any]:
        """What the server says about the consumer; raises if there is none."""
        return dict(await self.driver.outbox.api(f"CONSUMER.INFO.{self.stream}.{self.name}"))

    async def _find(self) -> dict[str, Any] | None:
        try:
            found = await self.info()
        except NotFoundError:
            return None
        pushed = bool(found["config"].get("deliver_subject"))
        if pushed is not self.spec.push:
            have, want = ("push", "pull") if pushed else ("pull", "push")
            raise SetupError(
                f"consumer {self.name!r} of stream {self.stream!r} exists as a {have} consumer, "
                f"and is wanted as a {want} consumer",
                fix=f"give another durable=, set push={pushed}, or delete the old one "
                f"(`nats consumer rm {self.stream} {self.name}`)",
            )
        return found

    def _skips(self, found: dict[str, Any], unsettled: int) -> bool:
        """Whether another process made the consumer again, behind what this one has not settled.

        Each knows its own messages only. The start only ever moves back, so that all agree.
        """
        start = found["config"].get("opt_start_seq") or 0
        return not self.same(found) and start > unsettled

    def same(self, info: dict[str, Any]) -> bool:
        """Whether the consumer is the one that was found or made here."""
        return info.get("created") == self._created

    def wanted(self) -> dict[str, Any]:
        """The settings that the declaration asks for, in the words of the JetStream API."""
        spec = self.spec
        config = (spec.config or ConsumerConfig()).evolve(name=self.name)
        if self.durable:
            config.durable_name = self.name
        elif config.inactive_threshold is None:
            kv = spec.kv
            config.inactive_threshold = (kv and kv.inactive_threshold) or INACTIVE
        if spec.deliver_policy is not None:
            config.deliver_policy = spec.deliver_policy
        if spec.headers_only is not None:
            config.headers_only = spec.headers_only
        if not spec.acknowledged:
            config.ack_policy = AckPolicy.NONE
        if spec.watch is not None or spec.ordered_consumer:
            config.mem_storage, config.num_replicas = True, 1
        if spec.watch is not None:
            history = spec.watch.include_history
            config.deliver_policy = DeliverPolicy.ALL if history else DeliverPolicy.LAST_PER_SUBJECT
            # An object's message is its description; without it there is nothing to tell.
            kv = spec.kv
            config.headers_only = (kv.meta_only or kv.headers_only) if kv is not None else None
        filters = spec.filters
        config.filter_subject = filters[0] if len(filters) == 1 else None
        config.filter_subjects = filters if len(filters) > 1 else None
        if spec.push:
            config.deliver_subject = config.deliver_subject or self.driver.inbox(spec.inbox_prefix)
            config.deliver_group = spec.queue or config.deliver_group
            if spec.idle_heartbeat is not None:
                config.idle_heartbeat = spec.idle_heartbeat
            if spec.flow_control is not None:
                config.flow_control = spec.flow_control
            if not config.deliver_group and config.idle_heartbeat is None:
                # Members of a group could not tell whose heartbeat is missing.
                config.idle_heartbeat = HEARTBEAT
                config.flow_control = spec.flow_control is not False
        return config.as_dict()

    async def _create(self, resume: int | None) -> dict[str, Any]:
        config = self.wanted()
        if resume is not None and resume > 1:
            config.pop("opt_start_time", None)
            config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": resume}
        return {**await self._put(config, "create"), "made": True}

    async def _update(self, found: dict[str, Any]) -> dict[str, Any]:
        """Bring a consumer that was there to what was asked for; what was not stays."""
        have, want, default = found["config"], self.wanted(), ConsumerConfig().as_dict()
        if want.get("metadata"):
            want["metadata"] = {**(have.get("metadata") or {}), **want["metadata"]}
        ours = {key for key, value in want.items() if default.get(key) != value} - _START
        ours -= {"name", "deliver_subject"}
        changed = {key: want[key] for key in ours if have.get(key) != want[key]}
        if "filter_subject" in changed:
            have.pop("filter_subjects", None)
        elif "filter_subjects" in changed:
            have.pop("filter_subject", None)
        if not changed:
            return found
        return await self._put({**have, **changed}, "update")

    async def _put(self, config: dict[str, Any], action: str) -> dict[str, Any]:
        path = f"CONSUMER.CREATE.{self.stream}.{self.name}"
        if config.get("filter_subject"):
            path += f".{config['filter_subject']}"
        request = {"stream_name": self.stream, "config": config, "action": ""}
        try:
            return dict(await self.driver.outbox.api(path, request))
        except NotFoundError:
            raise
        except APIError as error:
            if (error.code or 0) >= 500:
                raise
            raise SetupError(
                f"the server refuses to {action} consumer {self.name!r} of stream "
                f"{self.stream!r}: {error.description}",
                fix="change the setting it names, or give another durable=",
            ) from error

    def _learn(self, info: dict[str, Any]) -> None:
        config = info["config"]
        self._created = info.get("created")
        waits = config.get("backoff") or [config.get("ack_wait") or ACK_WAIT * 1e9]
        self.ack_wait = min(waits) / 1e9
        self.max_ack_pending = max(config.get("max_ack_pending") or 0, 0)
        self.max_batch = config.get("max_batch") or 0
        if config.get("max_expires"):
            self.expires = min(self.expires, config["max_expires"] / 1e9)
        self.heartbeat = (config.get("idle_heartbeat") or 0) / 1e9
        self.deliver_subject = config.get("deliver_subject")
        self.deliver_group = config.get("deliver_group") or ""
        self.floor = (info.get("ack_floor") or {}).get("stream_seq", 0)

    async def begun(self, sequence: int) -> bool:
        """Note in the consumer's metadata that the last attempt at a message begins.

        Returns whether another process wrote that. The metadata is the one place of a consumer
        where a client can leave something (ADR-33); two that write at once may lose a note.
        """
        async with self._noting:
            found = await self.info()
            config, floor = found["config"], (found.get("ack_floor") or {}).get("stream_seq", 0)
            metadata = config.get("metadata") or {}
            notes = [int(note) for note in metadata.get(BEGUN, "").split()]
            if sequence in notes:
                return sequence not in self._noted
            self._noted = {n for n in self._noted if n > floor} | {sequence}
            notes = [note for note in notes if note > floor][1 - NOTES :]
            config["metadata"] = {**metadata, BEGUN: " ".join(map(str, [*notes, sequence]))}
            await self._put(config, "update")
            return False

    def renew(self) -> None:
        """Take a new name, for a reader that starts over (ordered consumers)."""
        self.driver.spawn(self.driver.forget(self.stream, self.name))
        self.name = f"{self.name.split('~')[0]}~{secrets.token_hex(3)}"
