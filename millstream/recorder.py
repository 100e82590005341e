"""What a test asks about the calls of a handler or a publisher."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from unittest.mock import MagicMock

import msgspec

from .codec import JSON, Codec, any_decoder


class Called(msgspec.Struct, frozen=True):
    """One message that a handler got or a publisher sent."""

    body: Any
    details: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.body!r} with {dict(self.details)!r}"


class Recorder:
    """The calls of one handler or publisher."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: list[Called] = []
        self._mock: MagicMock | None = None
        self._waiting: list[asyncio.Future[None]] = []

    def record(self, body: Any, **details: Any) -> None:
        self._calls.append(Called(body, details))
        if self._mock is not None:
            self._mock(body)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    @property
    def mock(self) -> MagicMock:
        """Called with each decoded body; made on first access, with the calls so far."""
        if self._mock is None:
            self._mock = MagicMock(name=self.name)
            for call in self._calls:
                self._mock(call.body)
        return self._mock

    @property
    def calls(self) -> list[Called]:
        """The calls since the mock was last reset."""
        if self._mock is None:
            return self._calls
        return self._calls[max(len(self._calls) - self._mock.call_count, 0) :]

    def assert_called_once_with(self, body: Any, /, **details: Any) -> None:
        if len(self.calls) != 1:
            raise AssertionError(f"{self.name} was called {len(self.calls)} times{self._list()}")
        self.assert_called_with(body, **details)

    def assert_called_with(self, body: Any, /, **details: Any) -> None:
        wrong = self._difference(self.calls[-1], body, details) if self.calls else "no call"
        if wrong:
            raise AssertionError(f"the last call of {self.name}: {wrong}{self._list()}")

    def assert_any_call(self, body: Any, /, **details: Any) -> None:
        if all(self._difference(call, body, details) for call in self.calls):
            raise AssertionError(
                f"no call of {self.name} had {body!r} {details or ''}{self._list()}"
            )

    async def wait_call(self, timeout: float = 3.0) -> None:
        async with asyncio.timeout(timeout):
            while not self.calls:
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]

    def _list(self) -> str:
        return "".join(f"\n  call: {call}" for call in self.calls)

    def _difference(self, call: Called, body: Any, details: Mapping[str, Any]) -> str:
        """What of a call is not as expected; mappings need to hold at least what is given."""
        if call.body != body and call.body != decoded(JSON(), body):
            return f"the body is {call.body!r}, not {body!r}"
        for name, wanted in details.items():
            if name not in call.details:
                raise TypeError(f"{name!r} is not recorded; known are {', '.join(call.details)}")
            got = call.details[name]
            if isinstance(wanted, Mapping) and isinstance(got, Mapping):
                got = {key: got[key] for key in wanted if key in got}
            if got != wanted:
                return f"{name} is {got!r}, not {wanted!r}"
        return ""


def decoded(codec: Codec, value: Any) -> Any:
    """A value as the receiver decodes it without knowing its type."""
    data, content_type = codec.encode(value)
    return any_decoder(codec)(data, content_type)
