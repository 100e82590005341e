"""Log lines of the engine, on whatever logger the application gave."""

from __future__ import annotations

import logging
import os
from typing import Any

from .errors import MillstreamError
from .types import LoggerLike

#: Where ``millstream run --workers`` tells a worker its number.
WORKER_VARIABLE = "MILLSTREAM_WORKER_ID"
#: What the command line was told to run, for names that have to be the same after a restart.
TARGET_VARIABLE = "MILLSTREAM_TARGET"

_PACKAGE = os.path.dirname(__file__) + os.sep


def default_logger(name: str) -> logging.Logger:
    """The package's logger of an area; it has no handler and propagates."""
    return logging.getLogger(f"millstream.{name}")


def silent_logger() -> logging.Logger:
    """What ``logger=None`` means."""
    logger = logging.getLogger("millstream.silent")
    logger.disabled = True
    return logger


def log_line(logger: LoggerLike, level: str, text: str) -> None:
    """One line; braces and percent signs in it mean nothing, whatever the library."""
    opt: Any = getattr(logger, "opt", None)
    if opt is not None:  # loguru
        getattr(opt(), level)("{}", text)
    else:
        getattr(logger, level)("%s", text)


def log_error(logger: LoggerLike, text: str, error: BaseException) -> None:
    """One ERROR line with the exception's traceback, which begins in the user's code.

    An error of our own that none of the user's code led to says all by itself.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        traceback = traceback.tb_next
    if traceback is not None:
        error = error.with_traceback(traceback)
    elif isinstance(error, MillstreamError):
        log_line(logger, "error", text)
        return
    opt: Any = getattr(logger, "opt", None)
    if opt is not None:  # loguru
        opt(exception=error).error("{}", text)
    else:
        logger.error("%s", text, exc_info=error)


class Rate:
    """Lets ten lines through, then one a second that counts those it stands for."""

    BURST = 10

    def __init__(self) -> None:
        self._allowed, self._last, self._unsaid = float(self.BURST), 0.0, 0

    def admit(self, now: float) -> str | None:
        """What to add to a line at clock time ``now``; None if it is not to be written."""
        self._allowed = min(self.BURST, self._allowed + (now - self._last))
        self._last = now
        if self._allowed < 1:
            self._unsaid += 1
            return None
        self._allowed -= 1
        unsaid, self._unsaid = self._unsaid, 0
        return f" (and {unsaid} more)" if unsaid else ""
