"""What a message costs, in calls: a figure that does not depend on the machine or its load.

Python and C calls between a driver handing over a raw message and its settlement are
counted for eight shapes of handlers and for a publication, and compared with ``calls.json``.
The table is an upper bound and is kept exact: a change that makes a message dearer fails
here, and so does one that makes it cheaper without writing the new figure down. To write
the table anew: ``python -m tests.cost.test_calls``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import pytest

from millstream import Context, Depends, Logger
from millstream.message import Message
from tests.cost.fake import FakeBroker, Raw

TABLE = Path(__file__).with_name("calls.json")
BODY = b'{"id": 7, "amount": 12.5}'

#: Makes a broker with one subscriber.
Shape = Callable[[], FakeBroker]


class Order(msgspec.Struct):
    id: int
    amount: float


class OrderModel(pydantic.BaseModel):
    id: int
    amount: float


def tenant(message: Annotated[Message[Any], Context("message")]) -> str:
    return "t"


async def session() -> str:
    return "s"


async def transaction() -> AsyncIterator[str]:
    yield "x"


async def passing(call_next: Callable[[Any], Awaitable[Any]], message: Any) -> Any:
    return await call_next(message)


def dict_ack() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(order: dict[str, Any]) -> None: ...

    return broker


def struct_ack() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(order: Order) -> None: ...

    return broker


def pydantic_ack() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(order: OrderModel) -> None: ...

    return broker


def message_logger_depends() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(
        order: Order, message: Message[Any], logger: Logger, who: Annotated[str, Depends(tenant)]
    ) -> None: ...

    return broker


def async_depends() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(order: Order, s: Annotated[str, Depends(session)]) -> None: ...

    return broker


def yield_depends() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    async def handle(order: Order, x: Annotated[str, Depends(transaction)]) -> None: ...

    return broker


def three_middlewares() -> FakeBroker:
    broker = FakeBroker(middlewares=[passing, passing, passing])

    @broker.subscriber("in")
    async def handle(order: dict[str, Any]) -> None: ...

    return broker


def publisher() -> FakeBroker:
    broker = FakeBroker()

    @broker.subscriber("in")
    @broker.publisher("out")
    async def handle(order: dict[str, Any]) -> dict[str, Any]:
        return order

    return broker


SHAPES: list[Shape] = [
    dict_ack,
    struct_ack,
    pydantic_ack,
    message_logger_depends,
    async_depends,
    yield_depends,
    three_middlewares,
    publisher,
]


@asynccontextmanager
async def running(broker: FakeBroker) -> AsyncIterator[FakeBroker]:
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


def drive(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that never waits, without a task of its own."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the path of a message waits for something")


def count(work: Callable[[], Coroutine[Any, Any, Any]]) -> dict[str, int]:
    """Calls from making the coroutine to its end."""
    counts = {"python": 0, "c": 0}

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            counts["python"] += 1
        elif event == "c_call":
            counts["c"] += 1

    gc.disable()  # a collection would call the finalizers of what ran before
    sys.setprofile(profile)
    try:
        work().send(None)
    except StopIteration:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    # `send` itself and the `setprofile` that ends the counting.
    counts["c"] -= 2
    return counts


def deliver(broker: FakeBroker) -> Callable[[], Coroutine[Any, Any, Any]]:
    sink: Any = broker.driver.sinks[0]  # type: ignore[attr-defined]
    return partial(sink, Raw(BODY))


def publish(broker: FakeBroker) -> Callable[[], Coroutine[Any, Any, Any]]:
    return partial(broker.publish, {"id": 7}, "out")


async def measure(shape: Shape, work: Callable[..., Any] = deliver) -> dict[str, int]:
    async with running(shape()) as broker:
        once = work(broker)
        for _ in range(20):
            drive(once())
        return count(once)


async def measure_all() -> dict[str, dict[str, int]]:
    figures = {shape.__name__: await measure(shape) for shape in SHAPES}
    figures["broker_publish"] = await measure(dict_ack, publish)
    return figures


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Figures hold for a service whose log level is that of production."""
    logging.getLogger("millstream").setLevel(logging.INFO)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the table is of Python 3.11")
async def test_calls_per_message() -> None:
    assert await measure_all() == json.loads(TABLE.read_text())


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_task_per_message(shape: Shape) -> None:
    made = 0
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        nonlocal made
        made += 1
        return asyncio.Task(coro, loop=loop, **options)

    async with running(shape()) as broker:
        once = deliver(broker)
        loop.set_task_factory(factory)
        try:
            for _ in range(100):
                await once()
        finally:
            loop.set_task_factory(None)
        assert broker.driver.intakes[0].acks == 100  # type: ignore[attr-defined]
    assert made == 0


@pytest.mark.parametrize("shape", SHAPES)
async def test_messages_leave_nothing_behind(shape: Shape) -> None:
    """The objects alive after many messages are those alive after a few."""
    async with running(shape()) as broker:
        once = deliver(broker)

        def blocks(messages: int) -> int:
            for _ in range(messages):
                drive(once())
            gc.collect()
            return sys.getallocatedblocks()

        blocks(200)
        before = blocks(200)
        # Caches of the interpreter may still grow by a few; a message that left one object
        # behind would show as 5,000.
        assert blocks(5_000) - before < 100


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_message_costs_the_same(shape: Shape) -> None:
    async with running(shape()) as broker:
        once = deliver(broker)
        for _ in range(20):
            drive(once())
        early = count(once)
        for _ in range(2_000):
            drive(once())
        assert count(once) == early


if __name__ == "__main__":
    logging.getLogger("millstream").setLevel(logging.INFO)
    table = asyncio.run(measure_all())
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(TABLE.read_text())
