"""dlq: list, show, replay and drop dead letters of a running service."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from millstream.errors import NoLetters
from millstream.nats import NatsBroker
from tests.cli.conftest import Run
from tests.cli.harness import command, environment, write
from tests.servers import NatsServer, free_port

SHOP = """
import asyncio, pathlib
from millstream import Logger, Millstream, Retry
from millstream.nats import JStream, NatsBroker

broker = NatsBroker({url!r}, startup_timeout=5, retry=Retry(attempts=1), dead_letter="{name}_dlq")
stream = JStream("{name}", subjects=["{name}.>"])
healed = pathlib.Path("healed").exists()


@broker.subscriber("{name}.orders.{{region}}", stream=stream, durable="orders")
async def order(body: dict, region: str, logger: Logger) -> None:
    if not healed and body["id"] % 2:
        raise ValueError(f"no stock\\nfor {{body['id']}}")
    logger.info("order %s from %s", body["id"], region)


@broker.subscriber("{name}.orders.*", stream=stream, durable="audit")
async def audit(body: dict, logger: Logger) -> None:
    if not healed and body["id"] == 4:
        raise KeyError("four")
    logger.info("audit %s", body["id"])


@broker.subscriber("{name}.plain")
async def plain(body: int) -> None: ...


app = Millstream(broker)


@app.after_startup
async def fill(count: int = 0) -> None:
    for n in range(count):
        await broker.publish({{"id": n}}, "{name}.orders.eu", stream=stream)
"""


class Shop:
    """A service with dead letters: three of `order` (1, 3, 5), one of `audit` (4)."""

    def __init__(self, folder: Path, run: Run, url: str, name: str) -> None:
        self.folder, self.run, self.url, self.name = folder, run, url, name
        self.letters = f"{name}_dlq"
        write(folder, main=SHOP.format(url=url, name=name))

    def fill(self, count: int = 6, dead: int = 4) -> None:
        with self.run("run", "main:app", "--count", str(count)) as service:
            service.until(lambda: len(self.left()) == dead)
            service.expect(f"audit {count - 1}")
            service.stop()

    def left(self) -> list[int]:
        """The numbers of the orders among the dead letters."""

        async def read() -> list[int]:
            broker = NatsBroker(self.url)
            async with broker:
                letters = broker.driver.letters(self.letters)
                try:
                    return [json.loads(one.message.body)["id"] async for one in letters.read()]
                except NoLetters:
                    return []

        return asyncio.run(read())

    def dlq(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        name, *rest = arguments
        return command("dlq", name, "main:app", *rest, folder=self.folder)

    def found(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.dlq("show", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    def ids(self, *arguments: str) -> list[int]:
        return [letter["body"]["id"] for letter in self.found(*arguments)]


@pytest.fixture
def shop(tmp_path: Path, run: Run, nats: Any, subject: str) -> Shop:
    return Shop(tmp_path, run, nats.url, subject)


def test_list_and_show(shop: Shop) -> None:
    empty = shop.dlq("ls")
    assert (empty.returncode, empty.stderr) == (0, "")
    assert empty.stdout == f"no dead letters at {shop.letters}\n"
    shop.fill()

    done = shop.dlq("ls")
    assert done.returncode == 0, done.stderr
    order, audit = f"order@{shop.name}.orders.{{region}}", f"audit@{shop.name}.orders.*"
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["address", "handler", "error", "count", "oldest", "newest"]
    assert sorted(row[:4] for row in rows[1:]) == [
        [shop.letters, audit, "KeyError", "1"],
        [shop.letters, order, "ValueError", "3"],
    ]
    listed = json.loads(shop.dlq("ls", "--json").stdout)
    assert (listed["target"], listed["total"]) == ("main:app", 4)
    assert sum(group["count"] for group in listed["groups"]) == 4
    assert all(group["oldest"] <= group["newest"] for group in listed["groups"])

    [letter] = [letter for letter in shop.found() if letter["body"] == {"id": 3}]
    assert letter["handler"] == order and letter["origin"] == f"{shop.name}.orders.eu"
    assert (letter["error_type"], letter["error"]) == ("ValueError", "no stock\nfor 3")
    assert (letter["attempts"], letter["replays"]) == (1, 0)
    assert letter["traceback"].endswith("ValueError: no stock\nfor 3\n")
    assert letter["headers"]["ms-handler"] == "order"

    text = shop.dlq("show", "--id", letter["id"]).stdout
    assert text.startswith(f"\n{letter['id']}  {order}\nValueError: no stock\nfor 3\n")
    assert f"sent to {shop.name}.orders.eu, 1 attempt, failed " in text
    assert "  Traceback (most recent call last):\n" in text and "main.py" in text
    assert text.endswith('body, 8 bytes\n  {\n    "id": 3\n  }\n')


def test_filters(shop: Shop) -> None:
    shop.fill()
    assert shop.ids("--handler", "order") == [1, 3, 5]
    assert shop.ids("--handler", f"audit@{shop.name}.orders.*") == [4]
    assert shop.ids("--handler", "nobody") == []
    assert shop.ids("--error", "ValueError", "--limit", "2") == [1, 3]
    assert sorted(shop.ids("--newer", "1h")) == [1, 3, 4, 5]
    assert shop.ids("--older", "1h") == shop.ids("--newer", "0s") == []
    three = next(one["id"] for one in shop.found() if one["body"] == {"id": 3})
    number = three.rpartition(":")[2]
    assert shop.ids("--id", three) == shop.ids("--id", number) == [3]
    assert sorted(shop.ids("--address", shop.letters)) == [1, 3, 4, 5]
    done = shop.dlq("show", "--handler", "nobody")
    assert done.returncode == 0 and done.stdout == f"no such dead letters at {shop.letters}\n"
    done = shop.dlq("show", "--id", number, "--id", "999")
    assert done.returncode == 1 and "no such dead letter 999" in done.stderr
    assert "no stock" in done.stdout


def test_a_replay_reaches_the_handler_that_failed(shop: Shop, run: Run) -> None:
    shop.fill()
    dry = shop.dlq("replay", "--handler", "order", "--dry-run")
    assert dry.returncode == 0 and "would be replayed: 3 dead letters" in dry.stdout
    assert len(shop.left()) == 4
    (shop.folder / "healed").touch()
    with run("run", "main:app") as service:
        service.expect("Millstream runs")
        done = shop.dlq("replay", "--handler", "order")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "replayed: 3 dead letters\n"
        for n in (1, 3, 5):
            service.expect(f"order {n} from eu")
        done = shop.dlq("replay", "--json")
        service.expect("audit 4")
        told = json.loads(done.stdout)
        assert (told["replayed"], told["failed"], told["dry_run"]) == (1, 0, False)
        assert len(told["ids"]) == 1 and told["problems"] == {}
        service.stop()
        assert "audit 1" not in service.output and "order 4" not in service.output
    assert shop.left() == []
    assert shop.dlq("replay").stdout == f"no dead letters at {shop.letters}\n"


def test_what_fails_again_comes_back_with_its_history(shop: Shop, run: Run) -> None:
    shop.fill()
    before = {one["body"]["id"]: one for one in shop.found()}
    with run("run", "main:app") as service:
        service.expect("Millstream runs")
        assert shop.dlq("replay", "--error", "ValueError").stdout == "replayed: 3 dead letters\n"
        service.expect("failed for good", times=3)
        service.stop()
        assert service.count("failed for good") == 3
    after = {one["body"]["id"]: one for one in shop.found()}
    assert after.keys() == before.keys()
    for n in (1, 3, 5):
        assert (after[n]["replays"], after[n]["attempts"]) == (1, 1)
        assert after[n]["failed_at"] > before[n]["failed_at"]
    assert after[4] == before[4]


def test_a_handler_that_is_not_there_any_more(shop: Shop, run: Run) -> None:
    shop.fill()
    source = (shop.folder / "main.py").read_text().replace("def order(", "def orders(")
    write(shop.folder, main=source)
    done = shop.dlq("replay")
    assert done.returncode == 1
    assert done.stdout == "replayed 1 of 4 dead letters; 3 stay\n"
    assert f"3 dead letters: main:app has no subscription 'order@{shop.name}" in done.stderr
    assert "--to-all" in done.stderr and len(done.stderr.splitlines()) == 1
    (shop.folder / "healed").touch()
    with run("run", "main:app") as service:
        service.expect("audit 4")
        assert shop.dlq("replay", "--to-all").returncode == 0
        for n in (1, 3, 5):
            service.expect(f"order {n} from eu")
            service.expect(f"audit {n}")


def test_drop_asks_first(shop: Shop) -> None:
    shop.fill()
    done = shop.dlq("drop")
    assert done.returncode == 2 and "--yes" in done.stderr
    assert shop.dlq("drop", "--json").returncode == 2
    dry = shop.dlq("drop", "--dry-run", "--handler", "order")
    assert dry.returncode == 0 and "would be dropped: 3 dead letters" in dry.stdout
    assert len(shop.left()) == 4

    code, text = at_a_terminal(shop.folder, "n\n", "dlq", "drop", "main:app")
    assert code == 1 and "Drop 4 dead letters for good? [y/N]" in text
    assert "nothing was dropped" in text and len(shop.left()) == 4
    code, text = at_a_terminal(shop.folder, "y\n", "dlq", "drop", "main:app", "--error", "KeyError")
    assert code == 0 and "Drop 1 dead letter for good?" in text
    assert "dropped: 1 dead letter\r\n" in text
    assert shop.left() == [1, 3, 5]

    done = shop.dlq("drop", "--yes", "--limit", "1", "--json")
    assert json.loads(done.stdout)["dropped"] == 1 and shop.left() == [3, 5]
    assert shop.dlq("drop", "-y").stdout == "dropped: 2 dead letters\n"
    assert shop.left() == []


def at_a_terminal(folder: Path, types: str, *arguments: str) -> tuple[int, str]:
    """Run a command at a terminal where somebody types: its exit code and what is shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "millstream", *arguments],
        cwd=folder,
        env=environment({"COLUMNS": "200"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while True:
            shown += os.read(ours, 65536)
            if types and b"[y/N]" in shown:
                os.write(ours, types.encode())
                types = ""
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(20), shown.decode()


def test_the_rate_is_kept(shop: Shop) -> None:
    shop.fill()
    begin = time.monotonic()
    assert shop.dlq("drop", "--yes", "--rate", "4/s").returncode == 0
    assert time.monotonic() - begin >= 0.75


def test_wrong_usage_is_told_in_one_line(shop: Shop) -> None:
    def says(*arguments: str, code: int) -> str:
        done = shop.dlq(*arguments)
        assert done.returncode == code and done.stdout == "", done.stdout + done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "--older 3: write an age" in says("ls", "--older", "3", code=2)
    assert "--rate fast" in says("replay", "--rate", "fast", code=2)
    assert "--rate 0" in says("replay", "--rate", "0/s", code=2)
    assert "nothing keeps nowhere.else" in says("ls", "--address", "nowhere.else", code=1)
    assert "'a.*' is not one subject" in says("ls", "--address", "a.*", code=1)
    two = ("--address", shop.letters, "--address", f"{shop.name}.other")
    assert "write ADDRESS:1" in says("show", *two, "--id", "1", code=2)
    write(shop.folder, none="from millstream.nats import NatsBroker\nbroker = NatsBroker(%r)\n")
    assert "no 'ap'" in command("dlq", "ls", "main:ap", folder=shop.folder).stderr


def test_targets_without_dead_letters(tmp_path: Path, nats: Any) -> None:
    write(tmp_path, bare=f"from millstream.nats import NatsBroker\nb = NatsBroker({nats.url!r})\n")
    done = command("dlq", "ls", "bare:b", folder=tmp_path)
    assert done.returncode == 1 and "no subscription of bare:b (NatsBroker)" in done.stderr
    write(tmp_path, web="from fastapi import FastAPI\napp = FastAPI()\n")
    done = command("dlq", "ls", "web:app", folder=tmp_path)
    assert done.returncode == 2 and "web:app (FastAPI) has no broker" in done.stderr


def test_a_broker_that_is_away(tmp_path: Path, run: Run, subject: str) -> None:
    shop = Shop(tmp_path, run, f"nats://127.0.0.1:{free_port()}", subject)
    done = shop.dlq("ls", "--timeout", "0.5")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: nats://127.0.0.1:") and done.stderr.count("\n") == 1


def test_a_broker_without_streams(tmp_path: Path, run: Run, subject: str) -> None:
    with NatsServer(jetstream=False) as server:
        shop = Shop(tmp_path, run, server.url, subject)
        done = shop.dlq("ls")
    assert done.returncode == 1 and "has no JetStream" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_goes_away_meanwhile(tmp_path: Path, run: Run, subject: str) -> None:
    with NatsServer() as server:
        shop = Shop(tmp_path, run, server.url, subject)
        shop.fill(20, dead=11)
        replaying = run("dlq", "replay", "main:app", "--rate", "5/s")
        replaying.until(lambda: len(shop.left()) < 11)
        server.kill()
        assert replaying.wait() == 1
        assert re.fullmatch(
            r"Error: .* is not connected .*\nreplayed: \d dead letters?\n", replaying.output
        )
        done = int(replaying.output.split("replayed: ")[1][0])
        server.start()
        assert len(shop.left()) in (11 - done, 11 - done - 1)


def test_no_letter_is_lost_when_a_replay_is_killed(shop: Shop, run: Run) -> None:
    shop.fill(40, dead=21)
    (shop.folder / "healed").touch()
    replaying = run("dlq", "replay", "main:app", "--rate", "10/s")
    replaying.until(lambda: len(shop.left()) < 18)
    replaying.process.kill()
    replaying.wait()
    assert shop.left()
    with run("run", "main:app") as service:
        shop.dlq("replay")
        for n in range(1, 40, 2):
            service.expect(f"order {n} from eu")
        service.expect("audit 4 ")
        assert all(service.count(f"order {n} from eu") == 1 for n in range(1, 40, 2))
    assert shop.left() == []
