"""What happened, and what must never happen: the model that a run is held against.

The names I1 to I8 are those of the fault suite: I1 nothing confirmed is lost; I2 every
duplicate has a cause; I3 order and no overlap per key; I4 recovery; I5 exit in time;
I7 nothing is left behind; I8 nothing fails in silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from millstream.memory.bus import Delivery
from tests.simulation.plan import Plan


@dataclass(eq=False)
class Attempt:
    """One run of the handler for one message."""

    id: int
    key: int
    process: Any
    delivery: Delivery
    number: int
    begin: float
    end: float | None = None
    outcome: str = ""


@dataclass(eq=False)
class Book:
    """All about one message."""

    confirmed: bool = False
    deliveries: list[Delivery] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    effects: int = 0
    results: int = 0
    buried: int = 0
    #: Faults that may lead to another effect; to another delivery; the time of the last.
    excuses: int = 0
    faults: int = 0
    excused_at: float = -1.0


class Ledger:
    """Notes what happens and checks what can be checked at once."""

    def __init__(self, plan: Plan, now: Callable[[], float]) -> None:
        self.plan, self.now = plan, now
        self.books: dict[int, Book] = defaultdict(Book)
        self.trace: list[str] = []
        self.violations: list[str] = []
        #: Deliveries that the server waits for: delivery → process, in order.
        self.open: dict[Delivery, Any] = {}
        #: Deliveries that something was said about, whether or not the server heard it.
        self._told: set[Delivery] = set()
        self._given: dict[tuple[Any, int], list[Delivery]] = defaultdict(list)
        self._since: dict[Delivery, float] = {}
        self._keys = {item.id: item.key for item in plan.items}

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now():8.3f} {text}")

    def wrong(self, what: str) -> None:
        self.note(f"VIOLATION {what}")
        self.violations.append(what)

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.wrong(what)

    @staticmethod
    def id_of(delivery: Delivery) -> int:
        return int(delivery.record.headers["id"])

    # What the server sees

    def given(self, process: Any, delivery: Delivery) -> None:
        id = self.id_of(delivery)
        book = self.books[id]
        self.note(f"{process} gets {id}, delivery {delivery.count}")
        self.expect(not process.quiet, f"{process} gets {id} though it is paused")
        for last in [d for d in self.open if d.entry is delivery.entry]:
            owner = self.open.pop(last)
            healthy = owner.alive and last not in self._told and not owner.touched
            self.expect(not healthy, f"I2 deadline of {id} passed while {owner} had it")
            self.excuse(id, "deadline", settling=True)
        book.deliveries.append(delivery)
        self.open[delivery] = process
        self._since[delivery] = self.now()
        self._given[process, self._keys[id]].append(delivery)

    def settling(self, delivery: Delivery) -> None:
        self._told.add(delivery)

    def settled(self, process: Any, delivery: Delivery, how: str) -> None:
        id, open_ = self.id_of(delivery), self.open.pop(delivery, None) is not None
        self.note(f"{process} settles {id}: {how}" + ("" if open_ else " (late)"))
        if delivery.entry.current is not delivery:
            self.books[id].excused_at = self.now()  # the server waits for it no longer
        if how != "nack" and not delivery.entry.done:
            book = self.books[id]
            done = book.effects and (book.results or not self.plan.publishes)
            self.expect(bool(done or book.buried), f"I1 {id} settled ({how}) before it was done")

    def excuse(self, id: int, why: str, *, settling: bool = False) -> None:
        """A fault touched a message; with a shared Dedup, those of settling excuse nothing."""
        self.note(f"  ({id} may come twice: {why})")
        book = self.books[id]
        book.faults += 1
        book.excuses += not (settling and self.plan.dedup == "shared")
        book.excused_at = self.now()

    def excuse_open(self, process: Any, why: str) -> None:
        for delivery, owner in self.open.items():
            if owner is process:
                self.excuse(self.id_of(delivery), why)

    def forget_open(self, process: Any) -> None:
        """Nobody has to keep up the deadlines of what a process has now."""
        self._told.update(d for d, owner in self.open.items() if owner is process)

    # What the handler sees

    def begin(self, process: Any, delivery: Delivery) -> Attempt:
        id = self.id_of(delivery)
        book, key, plan = self.books[id], self._keys[id], self.plan
        here = [a for a in book.attempts if a.delivery is delivery]
        number = delivery.count + len(here)
        self.note(f"{process} begins {id} (key {key}), attempt {number}")
        attempt = Attempt(id, key, process, delivery, number, self.now())
        self._check_attempts(book, attempt)
        self._check_backoff(book, attempt)
        if plan.ordered:
            self._check_order(attempt)
        book.attempts.append(attempt)
        return attempt

    def _check_attempts(self, book: Book, attempt: Attempt) -> None:
        """No more than allowed; a delivery that led to no attempt does not count."""
        if self.plan.batch:
            return
        delivered = attempt.delivery.count - 1
        begun = {a.delivery.count for a in book.attempts if a.delivery is not attempt.delivery}
        number = attempt.number - (delivered - len(begun))
        # The first attempt is never noted, so a message of one attempt has a second one.
        allowed = max(self.plan.attempts, 2)
        self.expect(number <= allowed, f"attempt {number} of {attempt.id}, allowed are {allowed}")

    def _check_backoff(self, book: Book, attempt: Attempt) -> None:
        last = book.attempts[-1] if book.attempts else None
        if last is None or last.end is None or last.outcome not in ("raise", "nack"):
            return
        if attempt.delivery is not last.delivery and (
            attempt.delivery.count != last.delivery.count + 1
            or self._since[attempt.delivery] < last.end
            or last.process.stopping
        ):
            return  # the server did not wait for the outcome, or got the message handed back
        wanted = self.plan.base * 2 ** (last.number - 1)
        waited = attempt.begin - last.end
        if book.excused_at < last.begin and waited < min(wanted, 4.0) - 1e-6:
            self.wrong(f"backoff of {attempt.id}: {waited:.3f} s after attempt {last.number}")

    def _check_order(self, attempt: Attempt) -> None:
        given = self._given[attempt.process, attempt.key]
        place = given.index(attempt.delivery)
        for book in self.books.values():
            for other in book.attempts:
                if other.process is attempt.process and other.key == attempt.key:
                    if other.end is None:
                        self.wrong(f"I3 {other.id} and {attempt.id} of one key overlap")
                    if given.index(other.delivery) > place:
                        self.wrong(f"I3 {attempt.id} begins after {other.id} of the same key")

    def end(self, attempt: Attempt, outcome: str) -> None:
        attempt.end, attempt.outcome = self.now(), outcome
        self.note(f"{attempt.process} ends {attempt.id}: {outcome}")

    def effect(self, attempt: Attempt) -> None:
        book = self.books[attempt.id]
        book.effects += 1
        self.note(f"{attempt.process} effect of {attempt.id}")
        self.expect(
            book.effects <= 1 + book.excuses, f"I2 effect {book.effects} of {attempt.id}, no cause"
        )

    def published(self, id: int, *, letter: bool) -> None:
        book = self.books[id]
        self.note(f"{'dead letter' if letter else 'result'} of {id}")
        if letter:
            book.buried += 1
            self.expect(
                book.buried <= 1 + book.faults, f"I2 dead letter {book.buried} of {id}, no cause"
            )
        else:
            book.results += 1

    # At the end

    def close(self) -> None:
        for id, book in self.books.items():
            done = book.effects and (book.results or not self.plan.publishes)
            if book.confirmed and not done and not book.buried:
                self.wrong(f"I1 {id} is lost")
            if book.effects and book.buried and not book.faults:
                self.wrong(f"I2 {id} had its effect and is a dead letter")
