"""Ready-made annotations for handler parameters."""

from __future__ import annotations

from typing import Annotated

from ..context import ContextRepo as _ContextRepo
from ..message import BatchMessage as _BatchMessage
from ..params import Context, Logger
from .broker import KafkaBroker as _KafkaBroker
from .message import KafkaMessage as _KafkaMessage

KafkaMessage = Annotated[_KafkaMessage, Context("message")]
KafkaBatchMessage = Annotated[_BatchMessage, Context("message")]
KafkaBroker = Annotated[_KafkaBroker, Context("broker")]
ContextRepo = Annotated[_ContextRepo, Context("context")]

__all__ = ["ContextRepo", "KafkaBatchMessage", "KafkaBroker", "KafkaMessage", "Logger"]
