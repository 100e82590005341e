"""A circuit breaker: stop taking messages while what the handler needs is down.

Without it an outage of a database turns a whole queue into retries and dead letters. With it
the subscription pauses, the broker keeps the backlog, and one message at a time is tried until
one succeeds. Who resumes the subscription before its time has that message tried at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import DecodeError, IgnoredException, NackMessage, SetupError
from .message import Message
from .middleware import Call

if TYPE_CHECKING:
    from .subscription import Subscription


class Breaker(msgspec.Struct, frozen=True):
    """When to pause a subscription.

    Fields:
        share: the share of failed attempts in the window that opens the circuit, 0 to 1.
        window: seconds that count.
        minimum: attempts in the window before their share means anything.
        pause: seconds before the first probe; doubled after each probe that fails.
        longest: the longest pause, in seconds.
    """

    share: float = 0.5
    window: float = 30.0
    minimum: int = 10
    pause: float = 5.0
    longest: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SetupError(f"Breaker(share={self.share})", code="MS141", fix="above 0, up to 1")
        if self.minimum < 1 or self.window <= 0 or self.pause <= 0:
            raise SetupError(
                f"{self!r}", code="MS141", fix="minimum, window and pause are above zero"
            )


class Circuit:
    """One subscription's circuit: closed, open (paused), or half open (probing)."""

    def __init__(self, breaker: Breaker, subscription: Subscription) -> None:
        self.breaker, self.subscription = breaker, subscription
        self.state = "closed"
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._pause = breaker.pause
        self._probing = False
        #: How often it opened, and whether it has paused the subscription since.
        self._openings, self._paused = 0, False
        self._decided = asyncio.Event()

    def guard(self, call: Call) -> Call:
        """Wrap the handling of a message."""

        async def guarded(message: Message[Any]) -> Any:
            probe = self.state != "closed" and await self._wait_for_turn()
            try:
                result = await call(message)
            except (IgnoredException, DecodeError, asyncio.CancelledError):
                if probe:
                    self._free()  # for the next one
                raise  # the handler's word, or the sender's fault: says nothing of an outage
            except Exception:
                self._note(False, probe)
                raise
            self._note(True, probe)
            return result

        return guarded

    async def _wait_for_turn(self) -> bool:
        """While probing, one message runs; the others wait for what becomes of it.

        Returns whether the message is the probe.
        """
        while self.state == "half open" and self._probing:
            await self._decided.wait()
        if self.state == "open":
            if not self._paused or self.subscription.paused:
                raise NackMessage(delay=self._pause)
            self.state = "half open"
        if self.state == "half open":
            self._probing = True
            self._decided.clear()
        return self._probing

    def _free(self) -> None:
        self._probing = False
        self._decided.set()

    def _note(self, success: bool, probe: bool) -> None:
        if probe:
            self._free()
            if success:
                self._close()
            else:
                self._pause = min(self._pause * 2, self.breaker.longest)
                self._open("the probe failed")
            return
        if self.state != "closed":
            return  # begun before the circuit opened: it is no news
        now = self.subscription.broker.clock.now()
        outcomes = self._outcomes
        outcomes.append((now, success))
        self._failures += not success
        while outcomes[0][0] < now - self.breaker.window:
            self._failures -= not outcomes.popleft()[1]
        count = len(outcomes)
        if not success and count >= self.breaker.minimum:
            share = self._failures / count
            if share >= self.breaker.share:
                self._open(f"{self._failures} of {count} attempts failed")

    def _open(self, reason: str) -> None:
        self.state, self._paused = "open", False
        self._openings += 1
        self._outcomes.clear()
        self._failures = 0
        self.subscription.say("warning", f"circuit open ({reason}); paused for {self._pause:g} s")
        self.subscription.broker.spawn(self._rest())

    async def _rest(self) -> None:
        opening = self._openings
        await self.subscription.halt(f"circuit open for {self._pause:g} s")
        self._paused = True
        await self.subscription.broker.clock.sleep(self._pause)
        if self.state == "open" and opening == self._openings:
            self.state = "half open"
            self._free()
            await self.subscription.go_on()

    def _close(self) -> None:
        self.state = "closed"
        self._pause = self.breaker.pause
        self.subscription.say("info", "circuit closed")
