"""Computes from the ledgers what a fault cost: the verdict on one history."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.faults.ledger import Record

#: Seconds that an acknowledgement may take to the broker once the process believes it sent.
ON_ITS_WAY = 0.1


@dataclass(frozen=True)
class Fault:
    """A fault: from when to when, and which processes it hit (none named: all)."""

    name: str
    begin: float
    end: float
    pids: frozenset[int] = frozenset()


@dataclass
class Run:
    """One attempt at one message."""

    id: str
    key: str
    pid: int
    start: float
    end: float | None = None
    effect: float | None = None
    failed: bool = False
    returned: bool = False


@dataclass
class Verdict:
    """What was found; ids unless said otherwise.

    Fields:
        sent: how many messages were confirmed (for sources that confirm nothing: sent).
        lost: confirmed, and neither an effect nor a dead letter.
        phantom: an effect, a start or a dead letter of something that was never sent.
        unbegun: a dead letter of what no handler ever began.
        misburied: a dead letter of what had its effect: nothing was wrong with it.
        abandoned: lost, and sent at a time when no fault accounts for it.
        duplicates: effects beyond the first, counted per id.
        uncaused: duplicates for which no fault, no failure and no second sending accounts.
        reordered: keys whose first effects are not in the order of sending.
        overlaps: ids, or keys, of which two attempts ran at the same time.
        unsettled: how many messages the broker still holds.
        stall: the longest time in seconds without progress, outside the faults, while there
            was work.
        recovery: for each fault the seconds from its end to the first progress, and until what
            was in flight at its begin had its effect, whichever is later; without what was
            published anew since then.
        in_flight: for each fault the number of messages begun and not settled at its begin.
    """

    sent: int = 0
    lost: set[str] = field(default_factory=set)
    phantom: set[str] = field(default_factory=set)
    unbegun: set[str] = field(default_factory=set)
    misburied: set[str] = field(default_factory=set)
    abandoned: set[str] = field(default_factory=set)
    duplicates: Counter[str] = field(default_factory=Counter)
    uncaused: set[str] = field(default_factory=set)
    reordered: set[str] = field(default_factory=set)
    overlaps: set[str] = field(default_factory=set)
    unsettled: int = 0
    stall: float = 0.0
    recovery: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)

    @property
    def duplicated(self) -> int:
        """How many effects there were too many."""
        return self.duplicates.total()


def check(
    records: Sequence[Record],
    faults: Sequence[Fault] = (),
    *,
    held: int | None = None,
    confirms: bool = True,
    ordered: bool = False,
    repeats: bool = True,
    resends: bool = False,
    linger: float = 0.0,
    away: tuple[float, float] = (0.0, 0.0),
) -> Verdict:
    """Judge a history.

    Args:
        records: of all processes.
        faults: what was done to them.
        held: messages that the broker still holds; None to ask the ledger instead, which may
            miss a settlement that was sent in a process's last moment.
        confirms: whether a message counts from its confirmation on, or from its sending.
        ordered: whether order and overlaps per key are judged; those per id always are.
        repeats: whether sending an id again excuses a second effect.
        resends: whether clients do so by themselves, with what a fault kept from being confirmed.
        linger: seconds that a message fetched during a fault may wait in its process before
            it is begun; its deadline may have passed meanwhile.
        away: seconds before and after a fault whose losses it accounts for: what a process
            held, and what was sent until it had connected again.
    """
    before, after = away
    by: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by[record.event].append(record)
    runs = _runs(records)
    due = {r.id: r.at for r in reversed(by["confirmed" if confirms else "sent"])}
    sent = {r.id for r in by["sent"]}
    effects = [run for run in runs if run.effect is not None]
    first = _first((run.id, run.effect or 0.0) for run in effects)
    dead = _first((r.id, r.at) for r in by["dead"])
    settled = _first((r.id, r.at) for r in by["settled"] if r.more.get("how") != "NACK")
    verdict = Verdict(sent=len(due))
    verdict.lost = due.keys() - first.keys() - dead.keys()
    verdict.phantom = ({run.id for run in runs} | dead.keys()) - sent
    verdict.unbegun = (dead.keys() & sent) - {run.id for run in runs}
    verdict.misburied = dead.keys() & first.keys()
    verdict.abandoned = {
        id
        for id in verdict.lost
        if not any(f.begin - before <= due[id] <= f.end + after for f in faults)
    }
    times = Counter(run.id for run in effects)
    verdict.duplicates = Counter({id: n - 1 for id, n in times.items() if n > 1})
    again = {id for id, n in Counter(r.id for r in by["sent"]).items() if n > 1 and repeats}
    if resends:
        again |= _interrupted(by["sent"], by["confirmed"], faults)
    moves = _moves(by["moves"], by["moved"])
    verdict.uncaused = _uncaused(runs, moves, faults, again, linger)
    verdict.overlaps = _overlaps(runs, lambda run: run.id)
    if ordered:
        verdict.overlaps |= _overlaps(runs, lambda run: run.key)
        verdict.reordered = _reordered(by["sent"], first)
    verdict.unsettled = (
        len((due.keys() | first.keys()) - settled.keys() - dead.keys()) if held is None else held
    )
    done = _first([*first.items(), *dead.items()])
    verdict.stall = _stall(due, done, faults)
    for fault in faults:
        hit = [
            run
            for run in runs
            if run.start <= fault.begin
            and settled.get(run.id, float("inf")) >= fault.begin
            and (not fault.pids or run.pid in fault.pids)
            and not (run.failed or run.returned)
        ]
        ids = {run.id for run in hit}
        verdict.in_flight.append(len(ids))
        # What was published anew stands behind all that waits, however much that is: what comes
        # before it is the progress then.
        ids -= {id for id in ids if any(move.start >= fault.begin for move in moves[id])}
        verdict.recovery.append(_recovery(fault, faults, runs, ids, due, done))
    return verdict


def _runs(records: Iterable[Record]) -> list[Run]:
    """All attempts; one that never ended ends with its process."""
    runs: dict[str, Run] = {}
    last: dict[int, float] = {}
    for record in records:
        if record.event == "died":
            last[record.more["pid"]] = record.at
            continue
        last[record.pid] = record.at
        name = record.more.get("run")
        if record.event == "start":
            runs[name] = Run(record.id, record.more.get("key", ""), record.pid, record.at)
        elif name in runs:
            run = runs[name]
            if record.event == "effect":
                run.effect = record.at
            elif record.event == "end":
                run.end = record.at
                run.failed = record.more.get("how") == "error"
                run.returned = record.more.get("how") == "cancelled"
    for run in runs.values():
        if run.end is None:
            run.end = max(last[run.pid], run.start)
    return list(runs.values())


def _first(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The earliest time of each id."""
    found: dict[str, float] = {}
    for id, at in pairs:
        found[id] = min(at, found.get(id, at))
    return found


def _moves(begun: list[Record], done: list[Record]) -> defaultdict[str, list[Run]]:
    """By id the times in which it was there twice, since a process published it anew."""
    found: defaultdict[str, list[Run]] = defaultdict(list)
    for one in begun:
        ends = (r.at + ON_ITS_WAY for r in done if (r.id, r.pid) == (one.id, one.pid))
        end = min((at for at in ends if at > one.at), default=float("inf"))
        found[one.id].append(Run(one.id, "", one.pid, one.at, end))
    return found


def _uncaused(
    runs: list[Run],
    moves: defaultdict[str, list[Run]],
    faults: Sequence[Fault],
    again: set[str],
    linger: float,
) -> set[str]:
    of: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        of[run.id].append(run)
    found = set()
    for id, tries in of.items():
        done = [run for run in tries if run.effect is not None]
        for one, two in pairwise(sorted(done, key=lambda run: run.effect or 0.0)):
            hit = any(
                fault.begin <= max(one.effect or 0.0, two.start) and one.start <= fault.end + linger
                for fault in faults
                if not fault.pids or {one.pid, two.pid} & fault.pids
            )
            # There are two of it then, for as long as both wait in the queue.
            hit = hit or any(
                fault.begin <= min(two.start, move.end or 0.0) and move.start <= fault.end
                for fault in faults
                for move in moves[id]
                if not fault.pids or move.pid in fault.pids
            )
            if not (hit or one.failed or id in again):
                found.add(id)
    return found


def _interrupted(sent: list[Record], confirmed: list[Record], faults: Sequence[Fault]) -> set[str]:
    """Ids that were sent before a fault of the broker was over, and confirmed after it began."""
    known = _first((r.id, r.at) for r in confirmed)
    return {
        r.id
        for r in sent
        for fault in faults
        if not fault.pids and r.at <= fault.end and known.get(r.id, r.at) >= fault.begin
    }


def _overlaps(runs: list[Run], of: object) -> set[str]:
    by: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by[of(run)].append(run)  # type: ignore[operator]
    found = set()
    for name, some in by.items():
        until = -1.0
        for run in sorted(some, key=lambda run: run.start):
            if run.start < until:
                found.add(name)
            until = max(until, run.end or run.start)
    return found


def _reordered(sent: list[Record], first: dict[str, float]) -> set[str]:
    keys: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for record in sent:
        keys[record.more.get("key", "")].setdefault(record.id, record.more.get("seq", 0))
    found = set()
    for key, of in keys.items():
        order = sorted((first[id], seq) for id, seq in of.items() if id in first)
        if any(later < earlier for (_, earlier), (_, later) in pairwise(order)):
            found.add(key)
    return found


def _stall(due: dict[str, float], done: dict[str, float], faults: Sequence[Fault]) -> float:
    """The longest gap between two steps of progress while something was due."""
    steps = sorted(
        [(at, 1) for at in due.values()]
        + [(max(done[id], at), -1) for id, at in due.items() if id in done]
        # Stored without a confirmation: nobody waits for it, and it takes its time.
        + [(at, 0) for id, at in done.items() if id not in due]
    )
    worst, backlog, since = 0.0, 0, 0.0
    for at, change in steps:
        if backlog > 0 and change <= 0:
            # The time that faults took away does not count.
            lost = sum(max(min(f.end, at) - max(f.begin, since), 0.0) for f in faults)
            worst = max(worst, at - since - lost)
        if change <= 0 or backlog == 0:
            since = at
        backlog += change
    return worst


def _recovery(
    fault: Fault,
    faults: Sequence[Fault],
    runs: list[Run],
    hit: set[str],
    due: dict[str, float],
    done: dict[str, float],
) -> float:
    waiting = [id for id, at in due.items() if at <= fault.end and done.get(id, at) > fault.begin]
    ends = sorted(at for at in done.values() if at > fault.end)[:1] if waiting else []
    again = _first((r.id, r.effect) for r in runs if r.effect is not None and r.effect > fault.end)
    # What came again came late; the time that later faults took away does not count.
    ends += [again[id] for id in hit if id in again]
    end = max(ends, default=fault.end)
    others = sum(max(min(f.end, end) - max(f.begin, fault.end), 0.0) for f in faults)
    return end - fault.end - others
