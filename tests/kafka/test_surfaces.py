"""The command line on Kafka: show, dead letters, health with lag."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import Process, command, write
from tests.helpers import eventually_sync, unique

SHOP = """
import pathlib
from millstream import Logger, Millstream, Retry
from millstream.kafka import KafkaBroker, KafkaMessage, Topic

broker = KafkaBroker({url!r}, retry=Retry(attempts=2, delay=0.01))
healed = pathlib.Path("healed").exists()


@broker.subscriber(Topic("{name}.orders", 2), group_id="{name}", auto_commit_interval_ms=100)
async def order(body: dict, message: KafkaMessage, logger: Logger) -> None:
    if body["id"] % 2 and not healed:
        raise ValueError(f"no stock for {{body['id']}}")
    logger.info("order %s %s", body["id"], message.key)


@broker.subscriber("{name}.watched")
async def watch(body: int) -> None: ...


app = Millstream(broker)


@app.after_startup
async def fill(count: int = 0) -> None:
    for n in range(count):
        await broker.publish({{"id": n}}, "{name}.orders", key=f"k{{n}}")
"""
STUCK = """
import asyncio
from millstream import Millstream
from millstream.kafka import KafkaBroker

broker = KafkaBroker({url!r}, graceful_timeout=0.5)


@broker.subscriber("{name}.work", group_id="{name}", auto_commit_interval_ms=100)
async def work(body: int) -> None:
    if body >= 2:
        await asyncio.sleep(60)


app = Millstream(broker)


@app.after_startup
async def fill() -> None:
    for n in range(5):
        await broker.publish(n, "{name}.work")
"""


class Place:
    """A folder with an application, where commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"XDG_RUNTIME_DIR": str(folder / "r")}
        (folder / "r").mkdir()
        self.running: list[Process] = []

    def start(self, *arguments: str) -> Process:
        process = Process("run", "main:app", *arguments, folder=self.folder, env=self.env)
        self.running.append(process)
        process.expect("Millstream runs")
        return process

    def __call__(self, *arguments: str) -> str:
        done = command(*arguments, folder=self.folder, env=self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def letters(self) -> dict[int, Any]:
        """The dead letters, by the numbers of their orders."""
        found = json.loads(self("dlq", "show", "main:app", "--json"))
        return {letter["body"]["id"]: letter for letter in found}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    for process in found.running:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()


def stop(process: Process) -> None:
    process.process.terminate()
    assert process.process.wait(15) == 0, process.output


def test_dead_letters_from_the_command_line(kafka: Any, place: Place) -> None:
    name = unique()
    write(place.folder, main=SHOP.format(url=kafka.url, name=name))
    where = f"{name}.orders.dlq"
    assert place("dlq", "ls", "main:app") == f"no dead letters at {where}\n"
    shop = place.start("--count", "6")
    shop.expect("order 4 b'k4'")
    eventually_sync(lambda: place.letters().keys() == {1, 3, 5}, 15)
    stop(shop)

    rows = [line.split() for line in place("dlq", "ls", "main:app").splitlines()]
    assert rows[0] == ["address", "handler", "error", "count", "oldest", "newest"]
    assert [row[:4] for row in rows[1:]] == [[where, f"order@{name}.orders", "ValueError", "3"]]
    letters = place.letters()
    three = letters[3]
    assert (three["error"], three["attempts"]) == ("no stock for 3", 2)
    assert three["origin"] == f"{name}.orders"
    text = place("dlq", "show", "main:app", "--id", three["id"])
    assert f"sent to {name}.orders, 2 attempts, failed " in text and '"id": 3' in text

    (place.folder / "healed").touch()
    healed = place.start()
    done = place("dlq", "replay", "main:app", "--id", three["id"])
    assert done == "replayed: 1 dead letter\n"
    healed.expect("order 3 b'k3'")  # with its key
    done = place("dlq", "drop", "main:app", "--id", letters[5]["id"], "--yes")
    assert "1 dead letter" in done
    assert place.letters().keys() == {1}
    assert place("dlq", "replay", "main:app") == "replayed: 1 dead letter\n"
    healed.expect("order 1 b'k1'")
    assert place("dlq", "ls", "main:app") == f"no dead letters at {where}\n"
    stop(healed)
    assert healed.count("order 5") == 0


def test_show_says_what_each_subscription_can_do(kafka: Any, place: Place) -> None:
    name = unique()
    write(place.folder, main=SHOP.format(url=kafka.url, name=name))
    said = place("show", "main:app")
    assert f"{name}.orders" in said and "at-least-once" in said
    assert f"{name}.watched" in said and "at-most-once" in said
    told = json.loads(place("show", "main:app", "--json"))
    assert f"{name}.orders.dlq" in json.dumps(told)


def test_health_tells_the_lag(kafka: Any, place: Place) -> None:
    name = unique()
    write(place.folder, main=STUCK.format(url=kafka.url, name=name))
    process = place.start()

    def lag() -> Any:
        [told] = json.loads(place("health", "--json"))
        [work] = told["brokers"][0]["subscriptions"]
        return work["lag"]

    eventually_sync(lambda: lag() == 3, 15)
    stop(process)
