"""A connected driver, and a sink that keeps what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from millstream.ack import Settlement
from millstream.nats.driver import NatsDriver
from millstream.nats.options import NatsPublish, NatsSubscription
from tests.helpers import eventually


class Taken:
    """Messages that a subscription gave; each is settled by ``settle`` if that is set."""

    def __init__(self, settle: Settlement | None = Settlement.ACK) -> None:
        self.raws: list[Any] = []
        self.lost: list[Exception] = []
        self.intake: Any = None
        self.how = settle
        #: Awaited for each message before it is settled.
        self.work: Callable[[Any], Awaitable[Any]] | None = None

    async def sink(self, raw: Any) -> None:
        self.raws.append(raw)
        if self.work is not None:
            await self.work(raw)
        if self.how is not None:
            while self.intake is None:
                await asyncio.sleep(0)
            await self.intake.settle(raw, self.how, None)

    @property
    def bodies(self) -> list[bytes]:
        return [raw.data for raw in self.raws]

    async def count(self, number: int, timeout: float = 5.0) -> list[Any]:
        await eventually(lambda: len(self.raws) >= number, timeout)
        return self.raws


class Bench:
    """A driver and what the tests do with it all the time."""

    def __init__(self, driver: NatsDriver) -> None:
        self.driver = driver
        self.events: list[tuple[str, str]] = []
        driver.notify = lambda event, reason: self.events.append((event, reason))

    async def subscribe(self, *args: Any, settle: Any = Settlement.ACK, **options: Any) -> Taken:
        """Declare and subscribe; options with ``work`` and ``settle`` are the sink's."""
        taken = Taken(settle)
        taken.work = options.pop("work", None)
        spec = NatsSubscription(*args, **options)
        spec.check()
        await self.driver.declare([spec])
        taken.intake = await self.driver.subscribe(spec, taken.sink, taken.lost.append)
        return taken

    async def publish(self, subject: str, data: bytes = b"", **options: Any) -> Any:
        headers = options.pop("headers", None)
        return await self.driver.publish(NatsPublish(subject=subject, **options), data, headers)

    async def request(self, subject: str, data: bytes = b"", timeout: float = 2.0) -> Any:
        return await self.driver.request(NatsPublish(subject=subject), data, None, timeout)

    def heard(self, event: str) -> bool:
        return any(name == event for name, _ in self.events)


@pytest.fixture
async def bench(nats: Any) -> AsyncIterator[Bench]:
    """On the session's server."""
    driver = NatsDriver(nats.url)
    await driver.connect()
    yield Bench(driver)
    await driver.close()


@pytest.fixture
async def own(nats_server: Any) -> AsyncIterator[Bench]:
    """On a server of the test's own (fixture ``nats_server``)."""
    driver = NatsDriver(nats_server.url, reconnect_time_wait=0.2)
    await driver.connect()
    yield Bench(driver)
    await driver.close()
