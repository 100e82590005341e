"""All kinds of sources that the behaviours are tried on, one module a broker."""

from tests.conformance.bench import Kind
from tests.conformance.kinds import kafka, memory, mqtt, nats, rabbit, redis

KINDS: list[Kind] = [
    *memory.KINDS,
    *nats.KINDS,
    *redis.KINDS,
    *rabbit.KINDS,
    *kafka.KINDS,
    *mqtt.KINDS,
]

__all__ = ["KINDS"]
