"""The application under test: run by ``millstream run --factory tests.faults.app:create``.

What happens to a message is written in the message, so that one application serves all
scenarios. Everything it does goes into the ledger.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from millstream import Millstream
from millstream.message import Message, current_message
from tests.faults.ledger import Ledger
from tests.faults.sources.base import Setup, Source

VARIABLE = "FAULTS_SETUP"
_runs = itertools.count()


class Order(msgspec.Struct):
    """A message.

    Fields:
        id: of the message.
        key: its order is kept among the messages of one key.
        seq: its place in that order.
        do: ``abort``, ``raise``, ``sleep``, ``block`` (the event loop), ``swallow`` (every
            cancellation), ``thread`` (a call in a thread that does not return).
        seconds: for how long.
        first: do it on the first attempt only.
    """

    id: str
    key: str = ""
    seq: int = 0
    do: str = ""
    seconds: float = 0.0
    first: bool = False


async def perform(order: Order, attempt: int, work: float) -> None:
    """Do what the message says."""
    if not order.do or (order.first and attempt > 1):
        await asyncio.sleep(work)
    elif order.do == "abort":
        os.abort()
    elif order.do == "raise":
        raise ValueError(f"{order.id} never works")
    elif order.do == "sleep":
        await asyncio.sleep(order.seconds)
    elif order.do == "block":
        time.sleep(order.seconds)
    elif order.do == "thread":
        await asyncio.to_thread(time.sleep, order.seconds)
    elif order.do == "swallow":
        end = time.monotonic() + order.seconds
        while (left := end - time.monotonic()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                continue
    else:
        raise AssertionError(f"nobody knows how to {order.do}")


def build(source: Source, setup: Setup, ledger: Ledger) -> Millstream:
    """The application."""
    broker: Any = source.broker(setup)
    _record_settlements(broker.driver, ledger, source)

    async def handle(order: Order, message: Message[Any]) -> Any:
        run, attempt = f"{os.getpid()}-{next(_runs)}", message.attempt
        ledger.write("start", order.id, run=run, key=order.key, attempt=attempt)
        how = "error"
        try:
            await perform(order, attempt, setup.work)
            ledger.write("effect", order.id, run=run)
            how = "ok"
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            ledger.write("end", order.id, run=run, how=how)
        return order if setup.results else None

    if setup.results:
        made = source.address(setup, "out")
        handle = broker.publisher(made, **source.results(setup))(handle)
    options = source.common(setup) | source.subscription(setup)
    broker.subscriber(options.pop("address", source.address(setup)), **options)(handle)
    app = Millstream(broker, title="faults")

    if setup.answers:

        @broker.subscriber(source.address(setup, "ask"), **source.answering(setup))
        async def answer(order: Order, message: Message[Any]) -> str:
            ledger.write("asked", order.id)
            await perform(order, message.attempt, setup.work)
            return order.id

    @app.after_startup
    def up() -> None:
        ledger.write("up")

    @app.on_shutdown
    def down() -> None:
        ledger.write("down")

    return app


def _record_settlements(driver: Any, ledger: Ledger, source: Source) -> None:
    """Let every intake of a driver write into the ledger what it told the broker, and moved."""
    subscribe = driver.subscribe

    async def recorded(*args: Any) -> Any:
        intake = await subscribe(*args)
        settle = intake.settle

        async def settling(raw: Any, how: Any, delay: float | None, /, **options: Any) -> None:
            await settle(raw, how, delay, **options)
            message = current_message()
            if message is not None and not isinstance(message.raw, list):
                id = _id_of(message.body)
                if id:
                    ledger.write("settled", id, how=how.name)

        intake.settle = settling
        move = getattr(intake, source.moves) if source.moves else None

        async def moving(raw: Any, /, *args: Any) -> None:
            id = _id_of(raw.body)
            ledger.write("moves", id)
            await move(raw, *args)
            ledger.write("moved", id)

        if move is not None:
            setattr(intake, source.moves, moving)
        return intake

    driver.subscribe = recorded


def _id_of(body: bytes) -> str:
    """The message's id; "" where the body is poison."""
    try:
        return msgspec.json.decode(body, type=Order).id
    except msgspec.MsgspecError:
        return ""


def create() -> Millstream:
    """The application that the environment describes."""
    setup = msgspec.json.decode(os.environ[VARIABLE], type=Setup)
    module, _, name = setup.kind.partition(":")
    source: Source = getattr(import_module(module), name)()
    return build(source, setup, Ledger(Path(setup.folder), "worker"))
