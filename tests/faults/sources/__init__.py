"""The sources that scenarios run on, one module a broker."""

from tests.faults.sources.base import Setup, Source, body_id
from tests.faults.sources.memory import Memory
from tests.faults.sources.nats import Core, JetStream

SOURCES: dict[str, type[Source]] = {kind.name: kind for kind in (JetStream, Core, Memory)}

__all__ = ["SOURCES", "Setup", "Source", "body_id"]
