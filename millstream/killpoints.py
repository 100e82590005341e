"""Named points at which a test can kill this process: for fault tests only.

``MILLSTREAM_TEST_KILL_AT=after_handler:3`` kills the process with SIGKILL when the named point
is passed for the third time. Without the variable nothing of this is installed. The points are
``before_`` and ``after_`` with ``handler``, ``publish``, ``settle`` and ``dead_letter``, and those
of a broker with transactions.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

VARIABLE = "MILLSTREAM_TEST_KILL_AT"


def kill_point(name: str) -> Callable[[], None] | None:
    """The function to call at a point, or None if nothing happens there."""
    wanted, _, number = os.environ.get(VARIABLE, "").partition(":")
    if wanted != name:
        return None
    left = itertools.count(1)
    at = int(number or 1)

    def passed() -> None:
        if next(left) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return passed


def armed() -> bool:
    """Whether any point is to kill."""
    return bool(os.environ.get(VARIABLE))


def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """An async function with the points ``before_name`` and ``after_name``."""
    before, after = kill_point(f"before_{name}"), kill_point(f"after_{name}")
    if before is None and after is None:
        return call

    async def killing(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = await call(*args, **kwargs)
        if after is not None:
            after()
        return result

    return killing
