"""Millstream: message-driven Python services.

A decorated function becomes a consumer and a producer on a broker, alone or inside a
FastAPI application.
"""

from __future__ import annotations

import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .ack import AckPolicy, Settlement
from .app import FastStream, Millstream
from .breaker import Breaker
from .broker import Broker, State
from .clock import Clock, VirtualClock
from .codec import JSON, Codec, MsgPack, Raw
from .context import ContextRepo
from .dedup import Dedup, MemoryDedup, SqliteDedup
from .driver import Batch, Capability, PublishCommand
from .endpoints import Route, Router
from .errors import (
    AckMessage,
    BatchFailed,
    MillstreamError,
    NackMessage,
    RejectMessage,
    SetupError,
    SkipMessage,
    StopApplication,
    StopConsume,
)
from .hooks import apply_types
from .message import Message, StreamMessage, current_message
from .middleware import BaseMiddleware, ExceptionMiddleware, Middleware
from .params import Context, Depends, Header, Logger, NoCast, Path
from .publisher import Publisher, Response
from .retry import DeadLetter, Exponential, Retry
from .subscriber import Handler, Subscriber

if _TYPE_CHECKING:
    from .testing import TestApp

__version__ = "0.1.0"

__all__ = [
    "JSON",
    "AckMessage",
    "AckPolicy",
    "BaseMiddleware",
    "Batch",
    "BatchFailed",
    "Breaker",
    "Broker",
    "Capability",
    "Clock",
    "Codec",
    "Context",
    "ContextRepo",
    "DeadLetter",
    "Dedup",
    "Depends",
    "ExceptionMiddleware",
    "Exponential",
    "FastStream",
    "Handler",
    "Header",
    "Logger",
    "MemoryDedup",
    "Message",
    "Middleware",
    "Millstream",
    "MillstreamError",
    "MsgPack",
    "NackMessage",
    "NoCast",
    "Path",
    "PublishCommand",
    "Publisher",
    "Raw",
    "RejectMessage",
    "Response",
    "Retry",
    "Route",
    "Router",
    "Settlement",
    "SetupError",
    "SkipMessage",
    "SqliteDedup",
    "State",
    "StopApplication",
    "StopConsume",
    "StreamMessage",
    "Subscriber",
    "TestApp",
    "VirtualClock",
    "apply_types",
    "current_message",
]


def __getattr__(name: str) -> object:
    # The test tools are loaded only by those who ask for them.
    if name == "TestApp":
        from .testing import TestApp

        return TestApp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "fastapi" in _sys.modules:
    # So that the markers above work in HTTP endpoints declared from here on.
    from . import fastapi as _fastapi  # noqa: F401
