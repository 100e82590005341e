"""Sources of the applications that the tests run."""

from __future__ import annotations

PLAIN = """
import asyncio
import logging
import os

from millstream import Logger, Millstream
from millstream.nats import NatsBroker, NatsRouter

broker = NatsBroker({url!r}, startup_timeout=5)
router = NatsRouter(prefix="{subject}.")


@router.subscriber("orders.{{region}}", queue="workers")
async def order(body: dict, region: str, logger: Logger) -> None:
    logger.info("order %s from %s", body["id"], region)
    logging.getLogger("shop").info("seen %s by %s", body["id"], os.getpid())


broker.include_router(router)
app = Millstream(broker)


@app.on_startup
async def up(worker_id: int | None, env: str = "dev", debug: bool = False, port: int = 0) -> None:
    logging.getLogger("shop").info("up: %s %s %s %s", worker_id, env, debug, port)


def create():
    return app


async def create_async():
    await asyncio.sleep(0)
    return Millstream(NatsBroker({url!r}))


def needs(something):
    return app


asgi = Millstream(NatsBroker({url!r}, startup_timeout=5)).as_asgi()
"""

WEB = """
import logging
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI
from millstream.nats import NatsBroker

broker = NatsBroker({url!r}, startup_timeout=5)


@broker.subscriber("{subject}.in")
async def handle(body: dict) -> None:
    logging.getLogger("shop").info("message %s", body["id"])


@asynccontextmanager
async def lifespan(app):
    await broker.start()
    yield
    await broker.stop()


app = FastAPI(lifespan=lifespan)
app.state.broker = broker


@app.get("/")
async def root() -> dict:
    logging.getLogger("shop").info("asked")
    return {{"pid": os.getpid(), "answer": 1}}
"""
