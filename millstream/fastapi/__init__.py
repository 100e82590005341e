"""Millstream inside FastAPI and Starlette applications.

Two ways in. A router that owns a broker, for messages and HTTP side by side::

    router = NatsRouter("nats://localhost:4222")   # from millstream.nats.fastapi
    app = FastAPI()
    app.include_router(router)

and any brokers on an existing application: ``attach(app, broker)``. Either way the broker
connects before the application's own lifespan begins, takes messages while the application
takes requests, and disconnects after that lifespan ended.

Only documented names of FastAPI are used. One of its methods is wrapped,
``APIRouter.include_router`` (see :mod:`millstream.fastapi.streams`).
"""

from ..params import Context, Depends, Header, Logger, Path
from . import markers as markers  # the markers are FastAPI's dependencies from here on
from .messages import FastAPISource
from .router import RouterOptions, StreamRouter
from .streams import Lifespan, Part, Streams, attach

__all__ = [
    "Context",
    "Depends",
    "FastAPISource",
    "Header",
    "Lifespan",
    "Logger",
    "Part",
    "Path",
    "RouterOptions",
    "StreamRouter",
    "Streams",
    "attach",
]
