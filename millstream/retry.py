"""What an error leads to: a bounded, delayed retry, then the dead letter."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import msgspec

from .ack import Settlement
from .errors import EncodeError, SetupError

#: Delay in seconds before the retry that follows attempt n (counted from 1).
Backoff = Callable[[int], float]


class Exponential(msgspec.Struct, frozen=True):
    """``base * factor ** (attempt - 1)`` seconds, at most ``cap``, lengthened by up to ``jitter``.

    The jitter only lengthens a delay, so that no retry comes earlier than asked for.
    """

    base: float = 1.0
    cap: float = 60.0
    factor: float = 2.0
    jitter: float = 0.1

    def __call__(self, attempt: int) -> float:
        delay = min(self.base * self.factor ** min(attempt - 1, 64), self.cap)
        return delay * (1.0 + random.random() * self.jitter)


class DeadLetter(msgspec.Struct, frozen=True):
    """Where messages go that cannot be handled.

    Fields:
        destination: an address; None means ``{source}.dlq``.
        headers: whether the cause is written into headers (``ms-error``, ``ms-error-type``,
            ``ms-traceback``, ``ms-origin``, ``ms-attempts``, ``ms-failed-at``, ``ms-handler``,
            ``ms-source``), without which a letter cannot be replayed.
    """

    destination: str | None = None
    headers: bool = True


class Retry(msgspec.Struct, frozen=True):
    """How often and when a failed message is tried again.

    Fields:
        attempts: handler runs in all, the first included; counted by the broker where it
            counts deliveries, so that a restart does not begin anew.
        delay: seconds, or a function of the attempt that just failed.
        on: the exceptions worth a retry; others, and what cannot be encoded, go to the dead letter
            at once.
        where: ``broker`` hands the message back with a delay, ``lane`` waits in this process
            and keeps the order, ``topic`` puts it into a topic beside its source until it is
            due; ``auto`` is the broker where it can delay and no order per key is asked for,
            and the lane elsewhere.
        then: what follows the last attempt; None means the subscription's dead letter.
    """

    attempts: int = 5
    delay: float | Backoff = Exponential()
    on: type[Exception] | tuple[type[Exception], ...] = (Exception,)
    where: Literal["auto", "broker", "lane", "topic"] = "auto"
    then: DeadLetter | Settlement | None = None

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise SetupError(
                f"Retry(attempts={self.attempts})",
                code="MS110",
                fix="attempts counts the first run too: 1 or more",
            )
        if isinstance(self.delay, int | float) and self.delay < 0:
            raise SetupError(
                f"Retry(delay={self.delay})", code="MS110", fix="a delay is in seconds, 0 or more"
            )

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after the given attempt failed."""
        return self.delay(attempt) if callable(self.delay) else float(self.delay)

    def again(self, error: BaseException, attempt: int) -> bool:
        """Whether a message is tried again after this error on this attempt."""
        if isinstance(error, EncodeError):  # the same value will not be written the next time
            return False
        return attempt < self.attempts and isinstance(error, self.on)


DEFAULT_RETRY = Retry()
