"""A broker's connection: opened with patience, and what the log says of its changes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import ConnectError
from .log import Rate, log_line
from .retry import Exponential

if TYPE_CHECKING:
    from .broker import Broker


class Connection:
    """Opens and closes a broker's driver, and listens to what it tells."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        #: Whether it is away at the moment; it comes back by itself.
        self.lost = False
        self._errors = Rate()

    async def open(self) -> None:
        """Connect, and try again for ``startup_timeout`` seconds.

        Raises:
            ConnectError: the broker was not reached, did not let us in, or was stopped meanwhile.
        """
        broker = self.broker
        broker.driver.notify, broker.driver.clock = self._told, broker.clock
        backoff = Exponential(0.5, cap=5.0)
        deadline = broker.clock.now() + broker.startup_timeout
        attempt = 0
        while not broker.ending:
            attempt += 1
            try:
                await broker.driver.connect()
                self.lost = False
                if not broker.ending:
                    return
            except ConnectError as error:
                delay = backoff(attempt)
                left = deadline - broker.clock.now()
                if error.permanent or delay >= left:
                    raise
                log_line(
                    broker.logger,
                    "warning",
                    f"{error}; next try in {delay:.1f} s ({left:.0f} s left)",
                )
                await broker.clock.sleep(delay)
        raise ConnectError(f"{broker.driver.describe()}: stopped before it was reached")

    async def close(self) -> None:
        """Disconnect; that it fails is but told."""
        try:
            async with asyncio.timeout(5):
                await self.broker.driver.close()
        except Exception as error:
            log_line(
                self.broker.logger,
                "warning",
                f"{self.broker.driver.describe()}: closing: {type(error).__name__}: {error}",
            )

    def _told(self, event: str, reason: str) -> None:
        """One line for each change of the connection."""
        broker = self.broker
        where = broker.driver.describe()
        if event == "disconnected" and not self.lost:
            self.lost = True
            if not broker.ending:
                log_line(broker.logger, "warning", f"{where}: connection lost: {reason}")
        elif event == "reconnected":
            self.lost = False
            log_line(broker.logger, "info", f"{where}: connected again")
        elif event == "error":
            more = self._errors.admit(broker.clock.now())
            if more is not None:
                log_line(broker.logger, "warning", f"{where}: {reason}{more}")
        elif event == "closed":
            broker.closed(reason)
