"""What contenders share, each in a process of its own: handlers, and how frameworks are run.

A raw client calls `take` or `take_all` in a loop of its broker's module; frameworks get the
same handlers by `declare`. All count with `handled`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel

#: Makes n requests or publications: a round of a contender that drives itself.
Work = Callable[[int], Awaitable[None]]
#: Yields the work of a round, None where messages come.
Contender = AsyncIterator[Work | None]
#: The same, called.
Running = AbstractAsyncContextManager[Work | None]

#: Seconds that a handler takes, in the scenario where it waits.
WAIT = 0.01

#: For FastStream, whose access log (two lines a message by default) is off in it, so that work
#: is compared.
log = logging.getLogger("bench")
log.setLevel(logging.WARNING)


class Item(msgspec.Struct):
    name: str
    price: float


class Order(msgspec.Struct):
    id: int
    customer: str
    items: list[Item]


class ItemModel(BaseModel):
    name: str
    price: float


class OrderModel(BaseModel):
    id: int
    customer: str
    items: list[ItemModel]


class Counter:
    """Counts handled messages down; the one thing every handler does."""

    def __init__(self) -> None:
        self.left = 0
        self.done = asyncio.Event()

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()

    def expect(self, n: int) -> None:
        self.left = n
        self.done.clear()


handled = Counter()


def tenant() -> str:
    return "t"


# Raw clients: the decoders that frameworks use, and a coroutine to await

encode = msgspec.json.Encoder().encode
as_dict = msgspec.json.Decoder(dict[str, Any]).decode
as_struct = msgspec.json.Decoder(Order).decode
as_model = OrderModel.__pydantic_validator__.validate_json


async def take(order: Any) -> None:
    handled()


async def take_all(order: OrderModel, raw: Any, logger: logging.Logger, who: str) -> None:
    handled()


@asynccontextmanager
async def looping(loop: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """The loop of a raw client, as a task that ends with the contender."""
    task = asyncio.create_task(loop)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


# Frameworks: the same handlers for all


async def with_dict(order: dict[str, Any]) -> None:
    handled()


async def with_struct(order: Order) -> None:
    handled()


async def converting(order: dict[str, Any]) -> None:
    # FastStream decodes JSON by itself; the conversion is what a user would write.
    msgspec.convert(order, Order)
    handled()


async def with_model(order: OrderModel) -> None:
    handled()


async def publishing(order: dict[str, Any]) -> dict[str, Any]:
    handled()
    return {"ok": True}


async def replying(order: dict[str, Any]) -> dict[str, Any]:
    return {"id": order["id"]}


async def batches(orders: list[dict[str, Any]]) -> None:
    for _ in orders:
        handled()


async def waiting(order: dict[str, Any]) -> None:
    await asyncio.sleep(WAIT)
    handled()


def handlers(framework: str, message: Any) -> dict[str, Callable[..., Awaitable[Any]]]:
    """The handler of each scenario, with the framework's own annotations where it injects."""
    module = importlib.import_module(framework)

    async def injected(order: OrderModel, message: Any, logger: Any, who: str) -> None:
        handled()

    injected.__annotations__ |= {
        "message": message,
        "logger": module.Logger,
        "who": Annotated[str, module.Depends(tenant)],
    }
    return {
        **dict.fromkeys(("dict", "stream", "list", "session", "jetstream"), with_dict),
        **dict.fromkeys(("pydantic", "model"), with_model),
        "msgspec": converting if framework == "faststream" else with_struct,
        "injected": injected,
        "batch": batches,
        "keys": waiting,
        "publisher": publishing,
        "request": replying,
    }


def declare(
    framework: str,
    message: Any,
    scenario: str,
    subscriber: Callable[[], Any],
    publisher: Callable[[], Any],
) -> None:
    """Subscribe the handler of a scenario, if it has one.

    Args:
        framework: the name of the module that has ``Depends`` and ``Logger``.
        message: the annotation of the broker's message.
        scenario: of `handlers`.
        subscriber, publisher: make the decorators.
    """
    handler = handlers(framework, message).get(scenario)
    if handler is not None:
        subscriber()(publisher()(handler) if scenario == "publisher" else handler)


def driving(broker: Any, scenario: str, address: str, **options: Any) -> Work | None:
    """A framework's work of a round: requests, with these options, or none."""

    async def requests(n: int) -> None:
        for _ in range(n):
            answer = await broker.request({"id": 7}, address, timeout=5, **options)
            await answer.decode()

    return requests if scenario == "request" else None


@asynccontextmanager
async def alone(broker: Any, work: Work | None) -> Contender:
    """A framework's broker, without an application."""
    await broker.start()
    await broker.ping(5)
    try:
        yield work
    finally:
        await broker.stop()


@asynccontextmanager
async def in_fastapi(router: Any, work: Work | None) -> Contender:
    """Millstream's router in an application of FastAPI."""
    from fastapi import FastAPI

    app = FastAPI()
    app.include_router(router)
    async with app.router.lifespan_context(app):
        await router.broker.ping(5)
        yield work


def on_millstream(
    prefix: str,
    ours: Callable[[Any, str, str], tuple[Callable[[], Any], Callable[[], Any]]],
    drive: Callable[[Any, str, str], Work | None] = driving,
) -> dict[str, Callable[[str, str, str], Running]]:
    """Millstream, alone and inside FastAPI: the same declarations on two surfaces.

    Args:
        prefix: of its classes; in small letters, the name of their package.
        ours: what makes the decorators of a surface, for a scenario and an address.
        drive: the work of a round.
    """

    def found(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"millstream.{prefix.lower()}{module}"), name)

    def declared(surface: Any, scenario: str, address: str) -> Any:
        message = found(".annotations", f"{prefix}Message")
        declare("millstream", message, scenario, *ours(surface, scenario, address))
        return surface

    def millstream(url: str, scenario: str, address: str) -> Running:
        broker = declared(found("", f"{prefix}Broker")(url), scenario, address)
        return alone(broker, drive(broker, scenario, address))

    def fastapi(url: str, scenario: str, address: str) -> Running:
        router = declared(found(".fastapi", f"{prefix}Router")(url), scenario, address)
        return in_fastapi(router, drive(router.broker, scenario, address))

    return {"millstream": millstream, "fastapi": fastapi}
