"""What travels through the stream, and what is counted.

Which records are broken? Of the 336,776 lines 9,430 lack values, for three reasons:

- 8,255 flights have no departure: they were cancelled. That is a fact and no fault, also
  where no aircraft was assigned any more (2,512 of them have no tail number).
- 458 flights departed and have no arrival time.
- 717 flights departed and arrived, but nobody knows how late (most were diverted).

A record of the last two kinds says that a flight happened and not how it ended. Counting it
would make delays look better than they were, so those 1,175 are broken: they go to the dead
letters with their cause, where a person can look at them and send them again once mended.
"""

from __future__ import annotations

import msgspec


class Flight(msgspec.Struct):
    """One line of the file. Times of day are HHMM, delays are minutes."""

    number: int
    year: int
    month: int
    day: int
    carrier: str
    flight: int
    tailnum: str | None
    origin: str
    dest: str
    distance: int
    sched_dep_time: int
    dep_time: int | None
    dep_delay: int | None
    arr_time: int | None
    arr_delay: int | None

    def __post_init__(self) -> None:
        if self.cancelled:
            return
        if self.arr_time is None:
            raise ValueError("departed, but has no arrival time")
        if self.arr_delay is None:
            raise ValueError("arrived, but nobody knows how late")

    @property
    def cancelled(self) -> bool:
        return self.dep_time is None


class EnrichedFlight(Flight):
    """A flight whose codes have names."""

    airline: str = ""
    origin_name: str = ""
    dest_name: str = ""


class Carrier(msgspec.Struct):
    """The delays of one airline so far."""

    name: str
    flights: int = 0
    cancelled: int = 0
    #: Arrived more than a quarter of an hour after schedule.
    late: int = 0
    #: Sum of the arrival delays, in minutes.
    delay: int = 0
    worst: int = 0
    #: The number of the last flight that was counted.
    last: int = 0

    def add(self, flight: Flight) -> None:
        self.flights += 1
        self.last = flight.number
        if flight.arr_delay is None:
            self.cancelled += 1
            return
        self.delay += flight.arr_delay
        self.late += flight.arr_delay > 15
        self.worst = max(self.worst, flight.arr_delay)

    @property
    def mean_delay(self) -> float:
        return self.delay / max(self.flights - self.cancelled, 1)


class Statistics(msgspec.Struct):
    """Everything the page shows."""

    enriched: int = 0
    counted: int = 0
    broken: int = 0
    #: Flights that came again (a redelivery) or overtook another one of their carrier.
    repeated: int = 0
    causes: dict[str, int] = msgspec.field(default_factory=dict)
    carriers: dict[str, Carrier] = msgspec.field(default_factory=dict)

    def count(self, flight: EnrichedFlight) -> None:
        """Count a flight once; relies on each carrier's flights coming in order."""
        carrier = self.carriers.setdefault(flight.carrier, Carrier(flight.airline))
        if flight.number <= carrier.last:
            self.repeated += 1
            return
        carrier.add(flight)
        self.counted += 1
