"""Small helpers that tests import: ``from tests.helpers import eventually``."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections.abc import Callable
from typing import Any


async def eventually(
    condition: Callable[[], Any], timeout: float = 5.0, *, every: float = 0.01
) -> Any:
    """Wait until ``condition()`` (sync or async) is true and return what it returned.

    An AssertionError inside the condition counts as "not yet".

    Raises:
        AssertionError: it was not true within ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        value: Any = None
        try:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not true within {timeout} s; last: {value!r}") from failure
        await asyncio.sleep(every)


def eventually_sync(
    condition: Callable[[], Any], timeout: float = 5.0, *, every: float = 0.01
) -> Any:
    """The same for tests without an event loop (processes, HTTP from outside)."""
    end = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        value: Any = None
        try:
            value = condition()
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not true within {timeout} s; last: {value!r}") from failure
        time.sleep(every)


def unique(prefix: str = "t") -> str:
    """A name nobody else uses, good as a subject, stream, queue or bucket."""
    return f"{prefix}_{secrets.token_hex(6)}"
