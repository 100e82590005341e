"""``millstream show`` and ``millstream health`` for a service on RabbitMQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Run, run  # noqa: F401
from tests.cli.harness import command, write
from tests.helpers import eventually_sync, unique

APP = """
import asyncio
from millstream import Millstream
from millstream.rabbit import (
    Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue
)

broker = RabbitBroker({url!r}, startup_timeout=20, graceful_timeout=0.5)
events = RabbitExchange("{name}.events", ExchangeType.TOPIC)


@broker.subscriber("{name}.work", channel=Channel(prefetch_count=1))
async def work(body: int) -> None:
    print("begun", body, flush=True)
    await asyncio.sleep(60)


@broker.subscriber(RabbitQueue("{name}.eu", routing_key="orders.{{region}}"), events)
async def order(body: dict, region: str) -> None: ...


@broker.subscriber(RabbitQueue("{name}.log", QueueType.STREAM))
async def read(body: bytes) -> None: ...


app = Millstream(broker)


@app.after_startup
async def fill() -> None:
    for n in range(5):
        await broker.publish(n, "{name}.work")
"""


def test_show_and_health(
    rabbit: Any,
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    name, runtime = unique(), tmp_path / "r"
    runtime.mkdir()
    env = {"XDG_RUNTIME_DIR": str(runtime)}
    write(tmp_path, main=APP.format(url=rabbit.url, name=name))

    shown = command("show", "main:app", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"{name}.work" in shown.stdout and "orders.{region}" in shown.stdout
    assert shown.stdout.count("at-least-once") == 2, shown.stdout

    def health() -> dict[str, Any]:
        done = command("health", "--json", folder=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        [process] = json.loads(done.stdout)
        [broker] = process["brokers"]
        return dict(broker)

    with run("run", "main:app", env=env) as service:
        service.expect("begun 0")

        def waiting() -> bool:
            lags = {s["handler"]: s["lag"] for s in health()["subscriptions"]}
            return lags["work"] == 4 and lags["order"] == 0

        eventually_sync(waiting, 10)
        assert health()["connected"] is True
        service.stop()
