"""The fixture ``bench``, once for each kind of source that can do what a behaviour needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from millstream.driver import Capability
from tests.conformance.bench import Bench
from tests.conformance.kinds import KINDS


def needs(
    capability: Capability = Capability.NOTHING, *kinds: str, requests: bool = False
) -> Callable[[Any], Any]:
    """Try a behaviour only where the source has all of these capabilities.

    ``kinds`` leaves out sources that lack one of them (``Kind.cannot``), ``requests`` those whose
    server answers requests by itself.
    """

    def mark(function: Any) -> Any:
        function.needs = capability, frozenset(kinds), requests
        return function

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames:
        nothing = Capability.NOTHING, frozenset[str](), False
        needed, able, requests = getattr(metafunc.function, "needs", nothing)
        kinds = [
            pytest.param(kind, id=kind.name, marks=[pytest.mark.server] if kind.server else [])
            for kind in KINDS
            if needed in kind.capabilities
            and not able & kind.cannot
            and not (requests and kind.stored is not None)
        ]
        metafunc.parametrize("bench", kinds, indirect=True)


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    kind = request.param
    url = request.getfixturevalue(kind.server).url if kind.server else "nats://127.0.0.1:1"
    bench = Bench(kind, url)
    yield bench
    await bench.stop()
