"""Streams: what the application declares, and where its dead letters are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nats.js.errors import APIError, NotFoundError

from ..driver import Spec
from ..errors import SetupError
from .connection import NoJetStream
from .flow import log
from .options import SYNTAX, JStream, NatsPublication, NatsSubscription, stream_name

if TYPE_CHECKING:
    from .driver import NatsDriver


def covers(pattern: str, subject: str) -> bool:
    """Whether ``pattern`` matches everything that ``subject``, itself a pattern, can match."""
    wide, narrow = pattern.split("."), subject.split(".")
    for i, token in enumerate(wide):
        if token == ">":
            return len(narrow) > i
        if i >= len(narrow) or narrow[i] == ">":
            return False
        if token not in ("*", narrow[i]):
            return False
    return len(wide) == len(narrow)


def overlap(one: str, other: str) -> bool:
    """Whether some subject matches both patterns."""
    a, b = one.split("."), other.split(".")
    for x, y in zip(a, b, strict=False):
        if ">" in (x, y):
            return True
        if x != y and "*" not in (x, y):
            return False
    return len(a) == len(b)


def union(subjects: Iterable[str]) -> list[str]:
    """The subjects without those that others cover."""
    kept: list[str] = []
    for subject in dict.fromkeys(subjects):
        if any(covers(other, subject) for other in kept):
            continue
        kept = [other for other in kept if not covers(subject, other)]
        kept.append(subject)
    return kept


def letter_addresses(spec: NatsSubscription, name: str | None) -> list[str]:
    """Where a subscription's dead letters may go, the best first.

    ``name`` is what the user said. The default is ``{stream}.dlq``, or the subject with ``.dlq``
    behind it on core NATS; where the subscription would take that in again, the next of
    ``dlq.{source}`` and ``_dlq.{source}`` is taken.

    Raises:
        SetupError: all of them would come back.
    """
    own = spec.filters or ([">"] if spec.stream_name else [])
    source = spec.stream_name or SYNTAX.literal(spec.subject)
    choices = [f"{source}.dlq", f"dlq.{source}", f"_dlq.{source}"] if name is None else [name]
    free = [c for c in choices if not any(overlap(subject, c) for subject in own)]
    if not free and name is not None:
        raise SetupError(
            f"dead letters sent to {name!r} would come back to {spec.destination!r}",
            fix="name a subject that the subscription does not read",
        )
    if not free:
        raise SetupError(
            f"{spec.destination!r} reads every subject, its own dead letters included",
            fix="set dead_letter= to None, or read fewer subjects",
        )
    return free


def stream_of_letters(address: str) -> str:
    """The stream that is made to keep dead letters: the address, its dots as underscores."""
    return re.sub(r"[\s.*>/\\]+", "_", address)


def nowhere_else(stream: str | None) -> SetupError:
    """The error of a stream that would store the dead letters of its own messages."""
    return SetupError(
        f"stream {stream!r} takes in every subject that its dead letters could have",
        fix="set dead_letter= to a subject of another stream, or to None",
    )


class Wanted:
    """One stream as all declarations together want it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.declare = True
        self.settings: dict[str, Any] = {}
        self.subjects: list[str] = []

    def add(self, stream: str | JStream, subjects: Iterable[str]) -> None:
        if isinstance(stream, JStream):
            self.declare = self.declare and stream.declare
            self.settings |= stream.settings()
            self.subjects += stream.subjects or []
        self.subjects += subjects


class Streams:
    """Creates, updates and recreates the streams of one application."""

    def __init__(self, driver: NatsDriver) -> None:
        self.driver = driver
        self.wanted: dict[str, Wanted] = {}
        #: Dead-letter addresses that a stream keeps; publishing there is confirmed.
        self.kept: set[str] = set()

    async def declare(self, specs: Sequence[Spec]) -> None:
        """Create or update every stream that ``specs`` name; nothing is ever taken away.

        Raises:
            SetupError: a stream must exist and does not, or the server refuses the settings.
        """
        touched: dict[str, Wanted] = {}
        for spec in specs:
            if isinstance(spec, NatsSubscription) and spec.stream is not None:
                self._want(touched, spec.stream, spec.filters)
            elif isinstance(spec, NatsPublication) and spec.stream is not None:
                self._want(touched, spec.stream, [SYNTAX.compile(spec.subject).pattern])
        for wanted in touched.values():
            await self._realise(wanted)

    def _want(
        self, touched: dict[str, Wanted], stream: str | JStream, subjects: Iterable[str]
    ) -> None:
        name = stream_name(stream)
        wanted = touched[name] = self.wanted.setdefault(name, Wanted(name))
        wanted.add(stream, subjects)

    async def ensure(self, name: str) -> dict[str, Any]:
        """The stream's description; a declared stream that vanished is created again."""
        try:
            return await self.info(name)
        except NotFoundError:
            await self._realise(self.wanted.get(name) or Wanted(name))
            return await self.info(name)

    async def info(self, name: str) -> dict[str, Any]:
        """The stream's description, in the words of the JetStream API."""
        return await self.driver.outbox.api(f"STREAM.INFO.{name}")

    async def _realise(self, wanted: Wanted) -> None:
        name = wanted.name
        try:
            have = (await self.info(name))["config"]
        except NotFoundError:
            await self._create(wanted)
            return
        if not wanted.declare:
            return
        changed = {k: v for k, v in wanted.settings.items() if k != "subjects" and have.get(k) != v}
        subjects = have.get("subjects") or []
        merged = union([*subjects, *wanted.subjects])
        if not (have.get("mirror") or have.get("sources")) and set(merged) != set(subjects):
            changed["subjects"] = merged
        changed.pop("name", None)
        if changed:
            await self._put("update", {**have, **changed})
            log.info("stream %s updated: %s", name, ", ".join(sorted(changed)))

    async def _create(self, wanted: Wanted) -> None:
        name, settings = wanted.name, wanted.settings
        if not wanted.declare:
            raise SetupError(
                f"stream {name!r} does not exist",
                fix=f"create it (`nats stream add {name}`), or let it be created: stream={name!r} "
                f"without declare=False",
            )
        subjects = union(wanted.subjects)
        if not subjects and not (settings.get("mirror") or settings.get("sources")):
            raise SetupError(
                f"stream {name!r} does not exist, and nothing says what it should hold",
                fix=f"give the subscriber a subject, or JStream({name!r}, subjects=[...])",
            )
        await self._put("create", {**settings, "name": name, "subjects": subjects})
        log.info("stream %s created for %s", name, ", ".join(subjects))

    async def _put(self, action: str, config: dict[str, Any]) -> None:
        name = config["name"]
        try:
            await self.driver.outbox.api(f"STREAM.{action.upper()}.{name}", config)
        except APIError as error:
            if error.err_code == 10058:  # somebody else was faster
                await self._realise(self.wanted[name])
                return
            if (error.code or 0) >= 500 and error.err_code != 10052:
                raise  # of the moment, not of the settings
            raise SetupError(
                f"the server refuses to {action} stream {name!r}: {error.description}",
                fix=await self._advice(name, config.get("subjects") or []),
            ) from error

    async def _advice(self, name: str, subjects: Iterable[str]) -> str:
        for subject in subjects:
            owner = await self.owner(subject)
            if owner is not None and owner != name:
                return f"{subject!r} belongs to stream {owner!r} already: use stream={owner!r}"
        return "change the setting it names, or use JStream(..., declare=False) to leave it alone"

    async def owner(self, subject: str) -> str | None:
        """The stream that stores messages of a subject."""
        names = (await self.driver.outbox.api("STREAM.NAMES", {"subject": subject})).get("streams")
        return names[0] if names else None

    # Dead letters

    async def dead_letter(
        self, spec: NatsSubscription, name: str | None, *, declare: bool = True
    ) -> str:
        """Find the address of a subscription's dead letters, and with ``declare`` prepare it.

        An address of its own choice that the subscription's stream would store is left out. A
        stream made for it keeps what is sent there, unless one does already.
        """
        choices = letter_addresses(spec, name)
        try:
            return await self._keep(
                choices, spec.stream_name, wanted=name is not None, declare=declare
            )
        except NoJetStream as error:
            if name is not None:
                raise
            log.warning("nothing keeps what is sent to %r: %s", choices[0], error.what)
            return choices[0]

    async def _keep(
        self, choices: Sequence[str], source: str | None, *, wanted: bool, declare: bool
    ) -> str:
        for address in choices:
            owner = await self.owner(address)
            if owner is None:
                if not declare:
                    return address
                name = stream_of_letters(address)
                self.wanted[name] = kept = Wanted(name)
                kept.subjects = [address]
                await self._realise(kept)
            elif owner == source and not wanted:
                continue
            self.kept.add(address)
            return address
        raise nowhere_else(source)
