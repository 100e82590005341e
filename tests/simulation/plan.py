"""What happens in a run: the options of the service, its messages, and the faults, by a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

#: What an attempt does: fail, fail like all that follow, ask for a redelivery, run for three
#: ack deadlines, wait for ever, ignore a cancellation once or always, take its process down.
Fate = Literal["ok", "raise", "never", "nack", "slow", "hang", "stubborn", "deaf", "abort"]

#: Calls to the broker that fail, with or without having had an effect, or never return.
TROUBLES = ("settle", "touch", "publish", "dead_letter", "subscribe", "mute")
ACK_WAIT = 4.0


@dataclass(frozen=True)
class Item:
    """One message; its attempts meet ``fates`` in turn, and then all is well."""

    id: int
    key: int
    at: float
    work: float = 0.0
    fates: tuple[Fate, ...] = ()
    #: Its body cannot be decoded.
    poison: bool = False

    def fate(self, attempt: int) -> Fate:
        """What the attempt with a number, from 1, meets."""
        if self.fates[-1:] == ("never",):
            return "never"
        return self.fates[attempt - 1] if attempt <= len(self.fates) else "ok"


@dataclass(frozen=True)
class Event:
    """Something that happens at a time (and some callbacks later) to a process, or to all."""

    at: float
    what: str
    process: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Plan:
    """One run, apart from the choices of the scheduler."""

    items: tuple[Item, ...] = ()
    events: tuple[Event, ...] = ()
    processes: int = 1
    concurrency: int = 1
    ordered: bool = False
    batch: int = 0
    attempts: int = 5
    base: float = 0.5
    where: Literal["auto", "broker", "lane"] = "auto"
    dedup: Literal["", "local", "shared"] = ""
    breaker: bool = False
    timeout: float | None = None
    graceful: float = 2.0
    publishes: bool = False
    #: Seconds that calls to the broker take at most.
    latency: float = 0.0
    #: The share of the scheduler's choices that take what was ready first.
    fifo: float = 0.0

    def __str__(self) -> str:
        return _short(self)

    def without(self, index: int, kind: str) -> Plan:
        parts: Any = getattr(self, kind)
        return replace(self, **{kind: parts[:index] + parts[index + 1 :]})

    def simpler(self) -> list[Plan]:
        """Plans with one thing less, to find what a failure needs."""
        plain = Plan()
        some = [self.without(i, "events") for i in range(len(self.events))]
        some += [self.without(i, "items") for i in range(len(self.items))]
        for name in ("processes", "dedup", "breaker", "publishes", "latency", "batch", "ordered"):
            if getattr(self, name) != getattr(plain, name):
                some.append(replace(self, **{name: getattr(plain, name)}))
        for i, item in enumerate(self.items):
            for smaller in (
                replace(item, fates=()),
                replace(item, work=0.0),
                replace(item, poison=False),
            ):
                if smaller != item:
                    some.append(
                        replace(self, items=(*self.items[:i], smaller, *self.items[i + 1 :]))
                    )
        return some


def _short(value: Any) -> str:
    """A dataclass without what is as usual."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{_short(part)}, " for part in value).rstrip(" ") + ")"
    if not is_dataclass(value):
        return repr(value)
    said = (
        f"{f.name}={_short(getattr(value, f.name))}"
        for f in fields(value)
        if getattr(value, f.name) != f.default
    )
    return f"{type(value).__name__}({', '.join(said)})"


def make_plan(seed: int) -> Plan:
    """The plan of a seed; most seeds combine few faults, so that causes stay apart."""
    rng = random.Random(f"plan {seed}")
    choice = rng.choice

    def chance(share: float) -> bool:
        return rng.random() < share

    batch = choice((2, 3)) if chance(0.12) else 0
    timeout = 2.0 if chance(0.4) else None
    fates: list[Fate] = ["raise", "raise", "nack", "slow", "stubborn"]
    fates += ["hang"] if timeout else []
    faulty = choice((0.0, 0.15, 0.4, 0.9))
    span = choice((0.0, 1.0, 6.0))

    def item(id: int) -> Item:
        given: tuple[Fate, ...] = ()
        if chance(faulty):
            given = (
                ("never",)
                if chance(0.1)
                else tuple(choice(fates) for _ in range(choice((1, 1, 2, 4))))
            )
            if chance(0.06):
                given = (*given, "abort")
            elif chance(0.03):
                given = (*given, "deaf")
        return Item(
            id,
            rng.randrange(3),
            round(rng.random() * span, 3),
            choice((0.0, 0.0, 0.01, 0.3, 1.0)),
            given,
            chance(0.03),
        )

    processes = choice((1, 1, 1, 2, 2, 3))
    events: list[Event] = []
    for _ in range(choice((0, 1, 2, 3, 5))):
        at, on, steps = round(rng.random() * 8, 3), rng.randrange(processes), rng.randrange(40)
        what = choice(
            ("kill", "stop", "stop", "pause", "lost", "lost", "trouble", "trouble", "trouble")
        )
        later = round(at + rng.random() * choice((0.01, 1.0, 6.0)), 3)
        if what == "trouble":
            trouble = choice(TROUBLES)
            events += [Event(at, f"break {trouble}", on, steps), Event(later, f"heal {trouble}")]
            continue
        events.append(Event(at, what, on, steps))
        if what == "stop" and chance(0.3):
            events.append(Event(at, "hurry", on, steps + rng.randrange(20)))
        if what in ("kill", "stop"):
            events.append(Event(max(later, at + 0.1), "start", on))
        elif what == "pause":
            events.append(Event(later, "resume", on, rng.randrange(20)))
    return Plan(
        items=tuple(item(n) for n in range(1, choice((2, 4, 8, 12)) + 1)),
        events=tuple(sorted(events, key=lambda e: e.at)),
        processes=processes,
        concurrency=choice((1, 1, 2, 3, 4)),
        ordered=not batch and chance(0.4),
        batch=batch,
        attempts=choice((1, 2, 3, 5)),
        base=choice((0.1, 0.5, 1.0)),
        where=choice(("auto", "auto", "broker", "lane")),
        dedup=choice(("local", "shared")) if chance(0.3) and not batch else "",
        breaker=chance(0.25),
        timeout=timeout,
        graceful=choice((0.5, 2.0, 5.0)),
        publishes=not batch and chance(0.4),
        latency=choice((0.0, 0.001, 0.05)),
        fifo=choice((0.0, 0.5, 0.9)),
    )
