"""The application: order of hooks, command-line extras, failures, stopping."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream import (
    Context,
    ContextRepo,
    Depends,
    FastStream,
    Message,
    Millstream,
    SetupError,
    State,
    StopApplication,
    StopConsume,
    VirtualClock,
)
from millstream.errors import ConnectError, StateError
from millstream.memory import MemoryBroker, MemoryDriver
from millstream.testing import TestApp, TestBroker
from tests.helpers import eventually


async def test_the_order_of_everything() -> None:
    order: list[str] = []
    broker = MemoryBroker()
    other = MemoryBroker()

    @asynccontextmanager
    async def lifespan(context: ContextRepo) -> AsyncIterator[None]:
        order.append("lifespan in")
        context.set_global("made", 1)
        yield
        order.append("lifespan out")

    app = Millstream(broker, other, lifespan=lifespan)

    @app.on_startup
    async def starting(made: int = Context()) -> None:
        order.append(f"on_startup {made} {broker.state.value}")

    @app.after_startup
    def started(running: MemoryBroker) -> None:
        order.append(f"after_startup {broker.state.value} {other.state.value} {running is broker}")

    @app.on_shutdown
    async def stopping() -> None:
        order.append(f"on_shutdown {broker.state.value}")

    @app.after_shutdown
    async def stopped() -> None:
        order.append(f"after_shutdown {broker.state.value}")

    await app.start()
    await app.stop()
    await app.stop()
    assert order == [
        "lifespan in",
        "on_startup 1 new",
        "after_startup running running True",
        "on_shutdown running",
        "after_shutdown stopped",
        "lifespan out",
    ]
    assert FastStream is Millstream


async def test_extras_of_the_command_line_are_cast() -> None:
    got: list[Any] = []

    @asynccontextmanager
    async def lifespan(port: int, name: str = "none") -> AsyncIterator[None]:
        got.append((port, name))
        yield

    app = Millstream(MemoryBroker(), lifespan=lifespan)

    @app.on_startup
    async def hook(debug: bool, port: int) -> None:
        got.append((debug, port))

    await app.start(port="5000", debug="true", unused="x")
    await app.stop()
    assert got == [(5000, "none"), (True, 5000)]
    with pytest.raises(SetupError, match="'port' of lifespan"):
        await app.start(port="many", debug="1")
    with pytest.raises(SetupError, match="'port'"):
        await app.start()


async def test_a_failure_undoes_what_was_done() -> None:
    order: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        try:
            yield
        finally:
            order.append("left")

    broker = MemoryBroker()
    app = Millstream(broker, lifespan=lifespan)

    @app.after_startup
    async def boom() -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await app.start()
    assert broker.state is State.STOPPED
    assert order == ["left"]


async def test_an_unreachable_broker_is_tried_until_the_time_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Away(MemoryDriver):
        tries = 0

        async def connect(self) -> None:
            self.tries += 1
            if self.tries < 3:
                raise ConnectError("memory://away: refused")

    class Never(MemoryDriver):
        async def connect(self) -> None:
            raise ConnectError("memory://never: bad password", permanent=True)

    broker = MemoryBroker()
    broker.driver = away = Away()
    await broker.connect()
    assert away.tries == 3
    lines = [r.getMessage() for r in caplog.records if "next try" in r.getMessage()]
    assert len(lines) == 2
    await broker.stop()

    broker = MemoryBroker(startup_timeout=0.1)
    broker.driver = Away()
    with pytest.raises(ConnectError, match="refused"):
        await Millstream(broker).start()
    assert broker.state is State.FAILED

    broker = MemoryBroker()
    broker.driver = Never()
    with pytest.raises(ConnectError, match="bad password"):
        await broker.connect()


async def test_a_broker_that_is_stopped_while_it_connects_gives_up() -> None:
    class Away(MemoryDriver):
        async def connect(self) -> None:
            raise ConnectError("away")

    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    broker.driver = Away()
    connecting = asyncio.create_task(broker.start())
    await clock.advance(1)
    assert broker.state is State.CONNECTING
    await broker.stop()
    await clock.advance(5)
    with pytest.raises(ConnectError, match="stopped before it was reached"):
        await connecting
    assert broker.state is State.STOPPED


async def test_a_broker_is_stopped_though_the_end_of_a_dependency_fails() -> None:
    async def pool() -> AsyncIterator[str]:
        yield "pool"
        raise OSError("cannot be closed")

    broker = MemoryBroker()

    @broker.subscriber("in")
    async def handler(value: int, pool: str = Depends(pool, scope="app")) -> None: ...

    await broker.start()
    with pytest.raises(OSError, match="cannot be closed"):
        await broker.stop()
    assert broker.state is State.STOPPED
    await broker.stop()


async def test_run_until_exit() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)
    running = asyncio.create_task(app.run())
    await eventually(lambda: broker.state is State.RUNNING)
    assert app.health()["ready"]
    app.exit()
    await running
    assert broker.state is State.STOPPED
    assert not app.health()["ready"]


async def test_a_run_that_is_cancelled_while_it_starts_leaves_nothing_behind() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)
    told: list[str] = []
    asked = asyncio.Event()

    @app.on_startup
    async def slow() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            told.append("cut off")

    app.after_shutdown(lambda: told.append("ended"))
    before = asyncio.all_tasks()
    running = asyncio.create_task(app.run())
    await asked.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert told == ["cut off", "ended"]
    assert asyncio.all_tasks() == before and broker.state is State.NEW


async def test_a_run_whose_start_fails_leaves_no_task_behind() -> None:
    app = Millstream(MemoryBroker())

    @app.on_startup
    async def fails() -> None:
        raise ValueError("no")

    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="no"):
        await app.run()
    assert asyncio.all_tasks() == before


async def test_run_until_a_signal_and_a_second_one_hurries() -> None:
    broker = MemoryBroker(graceful_timeout=60)
    app = Millstream(broker)
    started = asyncio.Event()
    cancelled: list[bool] = []

    @broker.subscriber("in", durable="d")
    async def handler() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    running = asyncio.create_task(app.run())
    await eventually(lambda: broker.state is State.RUNNING)
    await broker.publish(b"", "in")
    await started.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: broker.state is State.DRAINING)
    assert not cancelled
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 5)
    assert cancelled == [True]


async def test_stop_application_from_a_handler() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)

    @broker.subscriber("in")
    async def handler() -> None:
        raise StopApplication

    running = asyncio.create_task(app.run())
    await eventually(lambda: broker.state is State.RUNNING)
    await broker.publish(b"", "in")
    await asyncio.wait_for(running, 5)


async def test_stop_consume_stops_one_subscription_and_hands_the_message_back() -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in", durable="d")
    async def handler(value: int) -> None:
        got.append(value)
        raise StopConsume

    @broker.subscriber("other")
    async def other(value: int) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        await running.publish(1, "in")
        await eventually(lambda: broker.subscriptions[0].state.value == "stopped")
        await running.publish(2, "other")
    assert got == [1, 2]


async def test_a_broker_that_is_lost_for_good_fails_the_run() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)
    running = asyncio.create_task(app.run())
    await eventually(lambda: broker.state is State.RUNNING)
    broker.driver.notify("closed", "gone")
    with pytest.raises(StateError, match="lost for good"):
        await running


def test_mistakes_with_brokers() -> None:
    broker = MemoryBroker()
    with pytest.raises(SetupError, match="not a broker"):
        Millstream(object())  # type: ignore[arg-type]
    with pytest.raises(SetupError, match="before"):
        Millstream(broker, broker)


async def test_an_application_needs_a_broker_and_starts_once() -> None:
    with pytest.raises(StateError, match="no broker"):
        await Millstream().start()
    app = Millstream(MemoryBroker())
    await app.start()
    with pytest.raises(StateError, match="runs already"):
        await app.start()
    await app.stop()


async def test_a_bridge_between_two_brokers() -> None:
    source, target = MemoryBroker(), MemoryBroker()
    got: list[Any] = []

    @source.subscriber("in", durable="d")
    @target.publisher("out")
    async def bridge(value: int) -> int:
        return value + 1

    @target.subscriber("out")
    async def out(value: int) -> None:
        got.append(value)

    app = Millstream(source, target)
    await app.start()
    await source.publish(1, "in")
    await eventually(lambda: got == [2])
    await app.stop()


async def test_a_silent_application_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker()
    app = Millstream(broker, logger=None)

    @broker.subscriber("in")
    async def handler() -> None:
        raise ValueError

    await app.start()
    await broker.publish(b"", "in")
    await eventually(lambda: broker.subscriptions[0].failing.count == 1)
    await app.stop()
    assert [r for r in caplog.records if r.name.startswith("millstream")] == []


async def test_test_app_runs_hooks_with_options() -> None:
    got: list[Any] = []
    broker = MemoryBroker()
    app = Millstream(broker)

    @app.on_startup
    async def hook(port: int) -> None:
        got.append(port)

    async with TestApp(app, run_extra_options={"port": "1"}):
        pass
    assert got == [1]


async def test_the_health_of_each_subscription() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)

    @broker.subscriber("in")
    async def handler(value: int, message: Message[Any]) -> None: ...

    await app.start()
    await broker.publish(1, "in")
    await broker.publish("x", "in")
    await eventually(lambda: broker.subscriptions[0].failing.count == 1)
    (health,) = app.health()["brokers"]
    (subscription,) = health["subscriptions"]
    assert health["state"] == "running"
    assert (subscription["handled"], subscription["failed"]) == (1, 1)
    assert subscription["seconds_since_last_message"] >= 0
    await app.stop()
