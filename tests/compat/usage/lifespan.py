"""Hooks and the lifespan of an application."""

from contextlib import asynccontextmanager

from faststream import Context, ContextRepo, FastStream, TestApp
from faststream.nats import NatsBroker, TestNatsBroker

log = []
broker = NatsBroker("nats://localhost:4222")


@asynccontextmanager
async def lifespan(context: ContextRepo):
    context.set_global("model", "ready")
    log.append("enter")
    yield
    log.append("leave")


app = FastStream(broker, lifespan=lifespan)


@app.on_startup
async def starting():
    log.append("on_startup")


@app.after_startup
async def started():
    await broker.publish(1, "in")
    log.append("after_startup")


@app.on_shutdown
def stopping():
    log.append("on_shutdown")


@app.after_shutdown
async def stopped():
    log.append("after_shutdown")


@broker.subscriber("in")
async def handle(n: int, model: str = Context()):
    log.append(f"handled {n} {model}")


async def check():
    async with TestNatsBroker(broker), TestApp(app):
        log.append("running")
    assert log == [
        "enter",
        "on_startup",
        "handled 1 ready",
        "after_startup",
        "running",
        "on_shutdown",
        "after_shutdown",
        "leave",
    ], log
