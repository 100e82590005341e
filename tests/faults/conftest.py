"""Which scenarios run on which sources when nothing else is said: the rule is here alone.

``make faults`` (``FAULTS=1``, or ``-m faults``) runs everything. Otherwise the fast scenarios run,
those without the mark ``faults``: on the sources of ``EVERYTHING`` all of them, on those of
``OTHERS`` the ones of ``ESSENTIAL``, and on those of ``CLIENTS`` the ones of ``ENDS``. A scenario
for other sources only runs on the first of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import remove_spare

HERE = Path(__file__).parent
EVERYTHING = frozenset({"jetstream", "nats-core", "memory"})
#: One source of each other way to keep messages.
OTHERS = frozenset({"redis-stream", "redis-list", "rabbit-quorum", "kafka", "mqtt-session"})
ESSENTIAL = frozenset(
    {
        "test_f01_a_worker_is_killed_in_the_middle",
        "test_f03_killed_between_publish_and_ack",
        "test_f05_a_message_that_kills_its_process",
        "test_f06_sigterm_under_load",
        "test_f13_f14_the_broker_goes_and_comes_back",
        "test_f24_a_handler_that_always_fails",
        "test_f24_poison_goes_to_the_dead_letters_as_it_was",
    }
)
#: Another client library for one of them, and how it comes to an end, in order or not.
CLIENTS = frozenset({"kafka-aiokafka"})
ENDS = frozenset({"test_f03_killed_between_publish_and_ack", "test_f06_sigterm_under_load"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FAULTS") or "faults" in config.getoption("-m"):
        return
    ours = [item for item in items if item.path.parent == HERE]
    homes: dict[str, set[str]] = {}
    for item in ours:
        homes.setdefault(_function(item), set()).add(_source(item))
    left = {item for item in ours if not _by_default(item, homes[_function(item)])}
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def _function(item: pytest.Item) -> str:
    return getattr(item, "originalname", None) or item.name


def _source(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    return str(call.params.get("source", "")) if call is not None else ""


def _by_default(item: pytest.Item, homes: set[str]) -> bool:
    source = _source(item)
    if item.get_closest_marker("faults"):
        return False
    if not source or source in EVERYTHING:
        return True
    if source in OTHERS and _function(item) in ESSENTIAL:
        return True
    if source in CLIENTS and _function(item) in ENDS:
        return True
    return not homes & EVERYTHING and source == min(homes)


@pytest.fixture(autouse=True, scope="session")
def _servers() -> Iterator[None]:
    yield
    remove_spare()
