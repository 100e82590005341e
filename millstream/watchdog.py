"""A watchdog that names whoever blocks the event loop.

Nothing else runs while a handler computes or calls something that blocks: no heartbeat, no
acknowledgement, no health check. A thread notices, says where, once per block.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType

from .log import default_logger

_logger = default_logger("watchdog")


class Watchdog:
    """Watches the running event loop from a thread of its own.

    Args:
        limit: seconds without a turn of the loop after which it counts as blocked.
        name_of: gives a handler's name for a code object, or None for other code.
    """

    def __init__(self, limit: float, name_of: Callable[[CodeType], str | None]) -> None:
        self._limit = limit
        self._name_of = name_of
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._timer = self._loop.call_soon(self._tick)
        self._thread = threading.Thread(target=self._watch, name="millstream-watchdog", daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        self._beat = time.monotonic()
        self._timer = self._loop.call_later(self._limit / 4, self._tick)

    def stop(self) -> None:
        """End the thread."""
        self._timer.cancel()
        self._stop.set()

    def _watch(self) -> None:
        told = 0.0
        while not self._stop.wait(self._limit / 2):
            beat = self._beat
            blocked = time.monotonic() - beat
            if blocked > self._limit and beat != told:
                told = beat
                _logger.warning("the event loop is blocked for %.1f s %s", blocked, self._culprit())

    def _culprit(self) -> str:
        """The handler that runs, and the line of user code it stands at."""
        frame: FrameType | None = sys._current_frames().get(self._thread_id)
        line, handler = "", ""
        while frame is not None:
            code = frame.f_code
            if not line and not _is_library(code.co_filename):
                line = f"{code.co_filename}:{frame.f_lineno}"
            name = self._name_of(code)
            if name is not None:
                handler = name
                break
            frame = frame.f_back
        if not handler:
            return f"at {line}" if line else "by code outside any handler"
        return f"by the handler {handler} at {line}; run what blocks in asyncio.to_thread()"


def _is_library(filename: str) -> bool:
    return filename.startswith((sys.prefix, sys.base_prefix, "<")) or "site-packages" in filename
