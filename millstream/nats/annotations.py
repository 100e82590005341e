"""Ready-made annotations for handler parameters."""

from __future__ import annotations

from typing import Annotated

from nats.aio.client import Client as _Client
from nats.js import JetStreamContext as _JetStreamContext
from nats.js.object_store import ObjectStore as _ObjectStore

from ..context import ContextRepo as _ContextRepo
from ..params import Context, Logger
from .broker import NatsBroker as _NatsBroker
from .message import NatsMessage as _NatsMessage

NatsMessage = Annotated[_NatsMessage, Context("message")]
NatsBroker = Annotated[_NatsBroker, Context("broker")]
#: nats-py's client.
Client = Annotated[_Client, Context("broker.connection")]
#: nats-py's JetStream context.
JsClient = Annotated[_JetStreamContext, Context("broker.js")]
#: The object store whose change a watcher handles.
ObjectStorage = Annotated[_ObjectStore, Context("message.storage")]
ContextRepo = Annotated[_ContextRepo, Context("context")]

__all__ = [
    "Client",
    "ContextRepo",
    "JsClient",
    "Logger",
    "NatsBroker",
    "NatsMessage",
    "ObjectStorage",
]
