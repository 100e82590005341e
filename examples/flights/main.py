"""The service: three subscribers on one stream, and a page.

    millstream dev examples.flights.main:app      # with a NATS server of its own
    millstream run examples.flights.main:app      # with the one at NATS_URL

``flights.recorded`` → :func:`enrich` → ``flights.enriched`` → :func:`count`; what cannot be
enriched goes to ``flights.broken`` → :func:`collect`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from examples.flights.data import names
from examples.flights.model import EnrichedFlight, Flight, Statistics
from millstream import Header
from millstream.nats import JStream
from millstream.nats.fastapi import NatsRouter

AIRLINES = names("airlines.csv", "carrier")
AIRPORTS = names("airports.csv", "faa")
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

router = NatsRouter(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"))
stream = JStream("FLIGHTS", subjects=["flights.>"])
statistics = Statistics()


# Each carrier's flights stay in order while those of others overtake them.
@router.subscriber(
    "flights.recorded",
    stream=stream,
    durable="enrich",
    concurrency=16,
    ordered_by="carrier",
    dead_letter="flights.broken",
)
@router.publisher("flights.enriched", stream="FLIGHTS")
async def enrich(flight: Flight) -> EnrichedFlight:
    """Give the codes their names. A broken record never gets here: it fails to decode."""
    statistics.enriched += 1
    return EnrichedFlight(
        **msgspec.structs.asdict(flight),
        airline=AIRLINES.get(flight.carrier, flight.carrier),
        origin_name=AIRPORTS.get(flight.origin, flight.origin),
        dest_name=AIRPORTS.get(flight.dest, flight.dest),
    )


@router.subscriber(
    "flights.enriched", stream=stream, durable="statistics", concurrency=4, ordered_by="carrier"
)
async def count(flight: EnrichedFlight) -> None:
    """Keep the delay statistics of each carrier."""
    statistics.count(flight)


@router.subscriber("flights.broken", stream=stream, durable="broken")
async def collect(cause: Annotated[str, Header("ms-error")]) -> None:
    """Count why records are broken; the records themselves stay in the stream."""
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
