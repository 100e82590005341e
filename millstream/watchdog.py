"""A watchdog that names whoever blocks the event loop.

Nothing else runs while a handler computes or calls something that blocks: no heartbeat, no
acknowledgement, no health check. A thread notices, says where, once per block.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

from .log import default_logger

_logger = default_logger("watchdog")
#: The names of all handlers, by their code.
handlers: weakref.WeakKeyDictionary[CodeType, str] = weakref.WeakKeyDictionary()
#: One watchdog per loop, and how many brokers want it.
_watching: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Watchdog, int]] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def watch(limit: float) -> Iterator[None]:
    """Watch the running loop for the length of a block; ``limit`` as for :class:`Watchdog`."""
    loop = asyncio.get_running_loop()
    watchdog, users = _watching.get(loop, (None, 0))
    watchdog = watchdog or Watchdog(limit)
    _watching[loop] = watchdog, users + 1
    try:
        yield
    finally:
        watchdog, users = _watching[loop]
        if users > 1:
            _watching[loop] = watchdog, users - 1
        else:
            del _watching[loop]
            watchdog.stop()


class Watchdog:
    """Watches the running event loop from a thread of its own.

    Args:
        limit: seconds without a turn of the loop after which it counts as blocked.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._timer: asyncio.Handle = self._loop.call_soon(self._tick)
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
            handler = handlers.get(code, "")
            if handler:
                break
            frame = frame.f_back
        if not handler:
            return f"at {line}" if line else "by code outside any handler"
        return f"by the handler {handler} at {line}; run what blocks in asyncio.to_thread()"


def _is_library(filename: str) -> bool:
    return filename.startswith((sys.prefix, sys.base_prefix, "<")) or "site-packages" in filename
