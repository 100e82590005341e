"""The service: three subscribers in a row, and a page.

    millstream dev examples.flights.main:app                 # with a NATS server of its own
    BROKER=redis millstream run examples.flights.main:app    # with the Redis at REDIS_URL

``flights.recorded`` → :func:`enrich` → ``flights.enriched`` → :func:`count`; what cannot be
enriched goes to ``flights.broken`` → :func:`collect`. Which broker that is makes no difference
here: brokers.py knows what each one calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from examples.flights import brokers
from examples.flights.data import names
from examples.flights.model import EnrichedFlight, Flight, Statistics
from millstream import Header

AIRLINES = names("airlines.csv", "carrier")
AIRPORTS = names("airports.csv", "faa")
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

flights = brokers.chosen()
router = flights.router()
statistics = Statistics()


# Each carrier's flights stay in order while those of others overtake them.
@router.subscriber(
    **flights.reads("recorded", "enrich"),
    concurrency=16,
    ordered_by="carrier",
    dead_letter=flights.address("broken"),
)
@router.publisher(**flights.writes("enriched"))
async def enrich(flight: Flight) -> EnrichedFlight:
    """Give the codes their names. A broken record never gets here: it fails to decode."""
    statistics.enriched += 1
    return EnrichedFlight(
        **msgspec.structs.asdict(flight),
        airline=AIRLINES.get(flight.carrier, flight.carrier),
        origin_name=AIRPORTS.get(flight.origin, flight.origin),
        dest_name=AIRPORTS.get(flight.dest, flight.dest),
    )


@router.subscriber(**flights.reads("enriched", "statistics"), concurrency=4, ordered_by="carrier")
async def count(flight: EnrichedFlight) -> None:
    """Keep the delay statistics of each carrier."""
    statistics.count(flight)


@router.subscriber(**flights.letters("broken", "broken"))
async def collect(cause: Annotated[str, Header("ms-error")]) -> None:
    """Count why records are broken."""
    statistics.broken += 1
    reason = cause.rpartition(": ")[2]
    statistics.causes[reason] = statistics.causes.get(reason, 0) + 1


@router.get("/", response_class=HTMLResponse)
async def page() -> str:
    """The statistics for people."""
    return PAGE


@router.get("/statistics")
async def show() -> dict[str, Any]:
    """The statistics for programs."""
    result: dict[str, Any] = msgspec.to_builtins(statistics)
    for code, carrier in statistics.carriers.items():
        result["carriers"][code]["mean_delay"] = round(carrier.mean_delay, 2)
    return result


app = FastAPI(title="Flights")
app.include_router(router)
