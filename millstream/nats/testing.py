"""NATS in memory, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy, PubAck, RetentionPolicy
from nats.js.kv import KeyValue

from ..driver import Spec
from ..errors import CapabilityError, PublishError, SetupError
from ..memory import Delivery, MemoryDriver, Source
from ..message import Message
from ..testing import T, TestBroker
from .consumer import durable_name
from .driver import NatsDriver
from .message import NatsMessage
from .options import (
    SYNTAX,
    JStream,
    KvWatch,
    NatsPublication,
    NatsPublish,
    NatsSubscription,
    stream_name,
)
from .stores import entry_of
from .streams import default_dead_letters, literal

#: Where a new consumer begins when the policy leaves out what was there before.
_LATER = {DeliverPolicy.NEW, DeliverPolicy.LAST, DeliverPolicy.LAST_PER_SUBJECT}
