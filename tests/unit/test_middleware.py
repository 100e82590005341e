"""Middlewares: order, both sides, the four-hook form, exception handlers."""

from __future__ import annotations

import functools
from typing import Any

import pydantic
import pytest

from millstream import (
    AckMessage,
    BaseMiddleware,
    Context,
    ExceptionMiddleware,
    Logger,
    Message,
    Middleware,
    SetupError,
)
from millstream.errors import DecodeError, StateError
from millstream.memory import MemoryBroker, MemoryRouter
from millstream.testing import TestBroker


def tracing(name: str, order: list[str]) -> Middleware:
    class Tracing(Middleware):
        def consume(self, call_next: Any, site: Any) -> Any:
            async def call(message: Message[Any]) -> Any:
                order.append(f"{name} in")
                result = await call_next(message)
                order.append(f"{name} out")
                return result

            return call

        def publish(self, call_next: Any, site: Any) -> Any:
            async def send(command: Any) -> Any:
                order.append(f"{name} publish {command.destination} {command.body}")
                return await call_next(command)

            return send

    return Tracing()


async def test_the_order_is_broker_router_inclusion_subscriber() -> None:
    order: list[str] = []
    broker = MemoryBroker(middlewares=[tracing("broker", order)])
    router = MemoryRouter(middlewares=[tracing("router", order)])

    @router.subscriber("in", middlewares=[tracing("subscriber", order)])
    async def handler(value: int) -> None:
        order.append("handler")

    broker.include_router(router, middlewares=[tracing("inclusion", order)])
    async with TestBroker(broker) as running:
        await running.publish(1, "in")
    assert order == [
        "broker publish in 1",
        "broker in", "inclusion in", "router in", "subscriber in",
        "handler",
        "subscriber out", "router out", "inclusion out", "broker out",
    ]  # fmt: skip


async def test_publications_pass_the_middlewares_of_their_place() -> None:
    order: list[str] = []
    broker = MemoryBroker(middlewares=[tracing("broker", order)])
    router = MemoryRouter(prefix="r.", middlewares=[tracing("router", order)])

    @router.subscriber("in")
    @router.publisher("out", middlewares=[tracing("publisher", order)])
    async def handler(value: int) -> int:
        return value + 1

    broker.include_router(router)
    async with TestBroker(broker) as running:
        await running.publish(1, "r.in")
    assert [o for o in order if "r.out" in o] == [
        "broker publish r.out 2", "router publish r.out 2", "publisher publish r.out 2"
    ]  # fmt: skip


async def test_a_middleware_may_change_result_and_command() -> None:
    class Change(Middleware):
        def consume(self, call_next: Any, site: Any) -> Any:
            async def call(message: Message[Any]) -> Any:
                return await call_next(message) * 10

            return call

        def publish(self, call_next: Any, site: Any) -> Any:
            async def send(command: Any) -> Any:
                command.headers = {**(command.headers or {}), "stamp": "x"}
                return await call_next(command)

            return send

    broker = MemoryBroker(middlewares=[Change])
    got: list[Any] = []

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handler(value: int) -> int:
        return value

    @broker.subscriber("out")
    async def out(value: int, message: Message[Any]) -> int:
        got.append((value, message.headers["stamp"]))
        return 0

    async with TestBroker(broker) as running:
        await running.publish(2, "in")
    assert got == [(20, "x")]


async def test_a_function_is_a_middleware() -> None:
    seen: list[Any] = []

    async def middleware(call_next: Any, message: Message[Any]) -> Any:
        seen.append(message.destination)
        return await call_next(message)

    broker = MemoryBroker(middlewares=[middleware])
    broker.subscriber("in")(lambda: None)
    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
    assert seen == ["in"]


async def test_the_four_hooks() -> None:
    order: list[Any] = []

    class Hooks(BaseMiddleware):
        def __init__(self, msg: Any = None, /, *, context: Any = None, tag: str = "-") -> None:
            super().__init__(msg, context=context)
            self.tag = tag

        async def on_receive(self) -> None:
            order.append(("receive", self.tag))

        async def consume_scope(self, call_next: Any, msg: Message[Any]) -> Any:
            order.append("consume")
            return await call_next(msg)

        async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
            order.append(("publish", cmd.body))
            assert self.context.get("broker_name") == "shop"
            return await call_next(cmd)

        async def after_processed(
            self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None
        ) -> bool:
            order.append(("after", exc_type))
            return exc_type is KeyError

    broker = MemoryBroker(middlewares=[functools.partial(Hooks, tag="t")])
    broker.context.set_global("broker_name", "shop")

    @broker.subscriber("in")
    async def handler(value: int) -> None:
        if value == 0:
            raise KeyError("swallowed")
        if value < 0:
            raise ValueError("raised")

    async with TestBroker(broker) as running:
        await running.publish(1, "in")
        assert order == [("publish", 1), ("receive", "t"), "consume", ("after", None)]
        await running.publish(0, "in")
        assert order[-1] == ("after", KeyError)
        with pytest.raises(ValueError, match="raised"):
            await running.publish(-1, "in")
        assert order[-1] == ("after", ValueError)


async def test_exception_handlers_by_class_hierarchy() -> None:
    exceptions = ExceptionMiddleware()
    seen: list[Any] = []

    @exceptions.add_handler(LookupError)
    async def lookup(error: LookupError, logger: Logger, message: Message[Any]) -> None:
        seen.append((type(error), message.destination))

    @exceptions.add_handler(ZeroDivisionError, publish=True)
    def division(error: ZeroDivisionError, where: str = Context("message.destination")) -> str:
        return f"no division at {where}"

    broker = MemoryBroker(middlewares=[exceptions])

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handler(value: int) -> float:
        if value < 0:
            raise KeyError(value)
        if value > 100:
            raise AckMessage
        if value > 10:
            raise OSError(value)
        return 1 / value

    @broker.subscriber("out")
    async def out(value: Any) -> None:
        seen.append(value)

    async with TestBroker(broker) as running:
        await running.publish(-1, "in")
        await running.publish(0, "in")
        await running.publish(101, "in")
        with pytest.raises(OSError, match="11"):
            await running.publish(11, "in")
    assert seen == [(KeyError, "in"), "no division at in"]


async def test_an_exception_handler_may_know_a_validation_error_by_its_own_class() -> None:
    seen: list[Any] = []

    async def invalid(error: pydantic.ValidationError) -> None:
        seen.append(error.errors()[0]["loc"])

    class Model(pydantic.BaseModel):
        id: int

    broker = MemoryBroker(middlewares=[ExceptionMiddleware({pydantic.ValidationError: invalid})])

    @broker.subscriber("in")
    async def handler(model: Model) -> None: ...

    async with TestBroker(broker) as running:
        await running.publish({"id": "x"}, "in")
    assert seen == [("id",)]


async def test_decode_errors_pass_middlewares_without_a_handler_for_them() -> None:
    broker = MemoryBroker(middlewares=[ExceptionMiddleware({KeyError: lambda error: None})])

    @broker.subscriber("in")
    async def handler(value: int) -> None: ...

    async with TestBroker(broker) as running:
        with pytest.raises(DecodeError):
            await running.publish("x", "in")


async def test_middlewares_are_fixed_once_the_broker_runs() -> None:
    broker = MemoryBroker()
    broker.subscriber("in")(lambda: None)
    broker.add_middleware(Middleware())
    broker.insert_middleware(Middleware())
    async with TestBroker(broker):
        with pytest.raises(StateError, match="fixed"):
            broker.add_middleware(Middleware())


def test_something_else_is_no_middleware() -> None:
    broker = MemoryBroker(middlewares=[42])
    broker.subscriber("in")(lambda: None)
    with pytest.raises(SetupError, match="42 is not a middleware"):
        broker.compile()
