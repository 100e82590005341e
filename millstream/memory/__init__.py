"""The broker inside the process: an embedded bus, and what all other brokers are in tests.

A subscription is *plain* (it gets what is published while it listens, at most once) or
*durable* (its messages are stored until they are acknowledged, at least once).
"""

from .broker import MemoryBroker, MemoryEndpoints, MemoryRouter
from .bus import MemoryBus
from .driver import MemoryDriver, MemoryLetters
from .options import (
    MemoryMessage,
    MemoryPublication,
    MemoryPublish,
    MemoryRequest,
    MemorySubscription,
    MemorySubscriptionOptions,
)

__all__ = [
    "MemoryBroker",
    "MemoryBus",
    "MemoryDriver",
    "MemoryEndpoints",
    "MemoryLetters",
    "MemoryMessage",
    "MemoryPublication",
    "MemoryPublish",
    "MemoryRequest",
    "MemoryRouter",
    "MemorySubscription",
    "MemorySubscriptionOptions",
]
