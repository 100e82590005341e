"""NATS and JetStream."""

# No `from __future__ import annotations`: it would hide the submodule of that name.
from typing import TYPE_CHECKING

try:
    import nats as _client  # noqa: F401
except ImportError as _error:
    from ..errors import MissingExtra

    raise MissingExtra("nats-py", "nats", purpose="millstream.nats") from _error

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    ExternalStream,
    Placement,
    PubAck,
    ReplayPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamSource,
)

from .broker import NatsBroker, NatsPublisher, NatsRoute, NatsRouter
from .dedup import NatsKvDedup
from .driver import NatsDriver
from .message import NatsBatchMessage, NatsKvMessage, NatsMessage, NatsObjMessage
from .options import JStream, KvWatch, ObjWatch, PullSub, Schedule
from .response import NatsResponse
from .security import (
    NatsCredentials,
    NatsJWT,
    NatsNKey,
    NatsSecurity,
    NatsToken,
    NatsUserPassword,
)

if TYPE_CHECKING:
    from ..testing import TestApp
    from .testing import TestNatsBroker

__all__ = [
    "AckPolicy",
    "ConsumerConfig",
    "DeliverPolicy",
    "DiscardPolicy",
    "ExternalStream",
    "JStream",
    "KvWatch",
    "NatsBatchMessage",
    "NatsBroker",
    "NatsCredentials",
    "NatsDriver",
    "NatsJWT",
    "NatsKvDedup",
    "NatsKvMessage",
    "NatsMessage",
    "NatsNKey",
    "NatsObjMessage",
    "NatsPublisher",
    "NatsResponse",
    "NatsRoute",
    "NatsRouter",
    "NatsSecurity",
    "NatsToken",
    "NatsUserPassword",
    "ObjWatch",
    "Placement",
    "PubAck",
    "PullSub",
    "RePublish",
    "ReplayPolicy",
    "RetentionPolicy",
    "Schedule",
    "StorageType",
    "StreamConfig",
    "StreamSource",
    "TestApp",
    "TestNatsBroker",
]


def __getattr__(name: str) -> object:
    # The test tools are loaded only by those who ask for them.
    if name == "TestNatsBroker":
        from .testing import TestNatsBroker

        return TestNatsBroker
    if name == "TestApp":
        from ..testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
