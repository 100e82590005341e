"""Ready-made annotations for handler parameters."""

from __future__ import annotations

from typing import Annotated

from pika.adapters.asyncio_connection import AsyncioConnection as _Connection
from pika.channel import Channel as _Channel

from ..context import ContextRepo as _ContextRepo
from ..params import Context, Logger
from .broker import RabbitBroker as _RabbitBroker
from .message import RabbitMessage as _RabbitMessage

RabbitMessage = Annotated[_RabbitMessage, Context("message")]
RabbitBroker = Annotated[_RabbitBroker, Context("broker")]
#: pika's channel that the message came by.
Channel = Annotated[_Channel, Context("message.raw.channel")]
#: pika's connection that publishes.
Connection = Annotated[_Connection, Context("broker.connection")]
ContextRepo = Annotated[_ContextRepo, Context("context")]

__all__ = ["Channel", "Connection", "ContextRepo", "Logger", "RabbitBroker", "RabbitMessage"]
