"""The memory broker and its router."""

from __future__ import annotations

from typing import Unpack

from ..broker import Broker, BrokerOptions
from ..endpoints import Endpoints, Router, asks, declares, produces, sends
from .bus import MemoryBus
from .driver import MemoryDriver
from .options import MemoryPublication, MemoryPublish, MemoryRequest, MemorySubscription


class MemoryEndpoints(Endpoints):
    """What a memory broker and its routers can declare."""

    subscriber = declares(MemorySubscription)
    publisher = produces(MemoryPublication)


class MemoryRouter(MemoryEndpoints, Router):
    """Declarations to be included in a :class:`MemoryBroker` or another router."""


class MemoryBroker(MemoryEndpoints, Broker):
    """A broker inside this process.

    Args:
        bus: the topics; brokers that are given the same bus talk to each other, others
            share nothing.
        options: the options of every broker.
    """

    publish = sends(MemoryPublish)
    request = asks(MemoryRequest)

    def __init__(self, bus: MemoryBus | None = None, **options: Unpack[BrokerOptions]) -> None:
        super().__init__(MemoryDriver(bus), **options)
