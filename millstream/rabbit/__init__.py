"""RabbitMQ: queues, streams and exchanges."""

# No `from __future__ import annotations`: it would hide the submodule of that name.
from typing import TYPE_CHECKING

try:
    import pika as _client  # noqa: F401
except ImportError as _error:
    from ..errors import MissingExtra

    raise MissingExtra("pika", "rabbit", purpose="millstream.rabbit") from _error

from .broker import RabbitBroker, RabbitPublisher, RabbitRoute, RabbitRouter
from .driver import RabbitDriver
from .message import RabbitBatchMessage, RabbitMessage, RabbitStreamMessage
from .options import Channel, ExchangeType, QueueType, RabbitExchange, RabbitQueue
from .outbox import Unroutable
from .response import RabbitResponse
from .security import RabbitExternalAuth

if TYPE_CHECKING:
    from ..testing import TestApp
    from .testing import TestRabbitBroker

__all__ = [
    "Channel",
    "ExchangeType",
    "QueueType",
    "RabbitBatchMessage",
    "RabbitBroker",
    "RabbitDriver",
    "RabbitExchange",
    "RabbitExternalAuth",
    "RabbitMessage",
    "RabbitPublisher",
    "RabbitQueue",
    "RabbitResponse",
    "RabbitRoute",
    "RabbitRouter",
    "RabbitStreamMessage",
    "TestApp",
    "TestRabbitBroker",
    "Unroutable",
]


def __getattr__(name: str) -> object:
    # The test tools are loaded only by those who ask for them.
    if name == "TestRabbitBroker":
        from .testing import TestRabbitBroker

        return TestRabbitBroker
    if name == "TestApp":
        from ..testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
