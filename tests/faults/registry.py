"""All sources by their names, and the choice of those that a scenario can run on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from millstream.driver import Capability
from tests.faults.sources.base import Source

#: Modules of tests/faults/sources; the table has its columns in this order.
MODULES = ("nats", "redis", "rabbit", "kafka", "mqtt", "memory")


def _kinds(module: str) -> list[type[Source]]:
    found = vars(import_module(f"tests.faults.sources.{module}")).values()
    return [k for k in found if isinstance(k, type) and issubclass(k, Source) and "name" in vars(k)]


SOURCES: dict[str, type[Source]] = {kind.name: kind for m in MODULES for kind in _kinds(m)}


def on(
    *, has: str = "", capabilities: Capability = Capability.NOTHING, **attributes: Any
) -> pytest.MarkDecorator:
    """Run a scenario on every source that it can run on; it takes the name as ``source``.

    Args:
        has: an attribute, or a method, that the source must have in a way of its own.
        capabilities: all of them.
        attributes: with these values: ``confirms=True``.
    """
    fitting = [name for name, kind in SOURCES.items() if _fits(kind, has, capabilities, attributes)]
    return pytest.mark.parametrize("source", fitting)


def _fits(kind: type[Source], has: str, needed: Capability, attributes: dict[str, Any]) -> bool:
    return (
        needed in kind.capabilities
        and not (has and getattr(kind, has) is getattr(Source, has))
        and all(getattr(kind, name) == value for name, value in attributes.items())
    )
