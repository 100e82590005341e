"""The same as ``millstream.kafka.testing``."""

from ..kafka.testing import TestKafkaBroker

__all__ = ["TestKafkaBroker"]
