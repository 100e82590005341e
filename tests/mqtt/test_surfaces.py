"""The command line on MQTT: what is shown, health, dead letters; uvloop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, run  # noqa: F401
from tests.cli.harness import command, write

SHOP = """
import pathlib
from millstream import Logger, Millstream, Retry
from millstream.mqtt import MqttBroker

broker = MqttBroker("{url}", client_id="{name}", retry=Retry(attempts=3, delay=0.01))
healed = pathlib.Path("healed").exists()


@broker.subscriber("{name}/{{region}}")
async def order(body: dict, region: str, logger: Logger) -> None:
    if not healed and body["id"] % 2:
        raise ValueError(f"no stock for {{body['id']}}")
    logger.info("order %s from %s", body["id"], region)


@broker.subscriber("{name}-noise", qos=0)
async def noise(body: int) -> None: ...


app = Millstream(broker)


@app.after_startup
async def fill(count: int = 0) -> None:
    for n in range(count):
        await broker.publish({{"id": n}}, "{name}/eu")
"""


def test_the_command_line(
    mqtt: Any,
    name: str,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    write(tmp_path, main=SHOP.format(url=mqtt.url, name=name))

    def dlq(*arguments: str) -> subprocess.CompletedProcess[str]:
        verb, *rest = arguments
        done = command("dlq", verb, "main:app", *rest, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    assert "no dead letters" in dlq("ls").stdout
    with run("run", "main:app", "--count", "6", "--health-socket", "health") as service:
        service.expect("order 4 from eu")
        service.expect("failed for good", times=3)
        asked = command("health", "--socket", "health", "--json", folder=tmp_path)
        assert asked.returncode == 0, asked.stderr
        [broker] = json.loads(asked.stdout)["brokers"]
        assert broker["connected"]
        order, noise = broker["subscriptions"]
        assert (order["handled"], order["failed"], order["lag"]) == (3, 9, None)
        assert noise["state"] == "running"
        service.stop()
    rows = [line.split() for line in dlq("ls").stdout.splitlines()]
    assert rows[1][:4] == [f"{name}/region/dlq", f"order@{name}/{{region}}", "ValueError", "3"]
    shown = json.loads(dlq("show", "--json").stdout)
    assert [letter["body"]["id"] for letter in shown] == [1, 3, 5]
    dlq("drop", "--id", shown[0]["id"], "--yes")
    (tmp_path / "healed").touch()
    with run("run", "main:app") as service:
        dlq("replay")
        service.expect("order 3 from eu")
        service.expect("order 5 from eu")
        service.stop()
    assert "no dead letters" in dlq("ls").stdout

    shown_now = command("show", "main:app", folder=tmp_path)
    assert shown_now.returncode == 0, shown_now.stderr
    for line, guarantee in ((f"{name}/{{region}}", "at-least-once"), ("-noise", "at-most-once")):
        [row] = [row for row in shown_now.stdout.splitlines() if line in row]
        assert guarantee in row


UVLOOP = """
import asyncio, sys, uvloop
from millstream.mqtt import MqttBroker, MqttMessage
from millstream.retry import Retry

async def main(url, name):
    broker, got, done = MqttBroker(url), [], asyncio.Event()

    @broker.subscriber(name, qos=2, retry=Retry(delay=0.01))
    async def handler(body: int, message: MqttMessage) -> int:
        if body == 1 and message.attempt == 1:
            raise ValueError("once")
        got.append(body)
        if len(got) == 100:
            done.set()
        return body

    await broker.start()
    assert "uvloop" in type(asyncio.get_running_loop()).__module__
    [flow] = broker.driver.flows
    for n in range(99):
        await broker.publish(n, name, qos=1 + n % 2)
        if n == 50:
            flow.connection.close("cut")
    assert await broker.request(99, name, response_model=int) == 99
    await asyncio.wait_for(done.wait(), 10)
    assert sorted(got) == list(range(100)), got
    await broker.stop()
    print("all there")

uvloop.run(main(*sys.argv[1:]))
"""


def test_on_uvloop(mqtt: Any, name: str) -> None:
    pytest.importorskip("uvloop")
    ran = subprocess.run(
        [sys.executable, "-c", UVLOOP, mqtt.url, name], capture_output=True, text=True, timeout=50
    )
    assert ran.stdout == "all there\n", ran.stderr
