"""health: running processes are asked over their Unix sockets."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.harness import command, write
from tests.helpers import eventually_sync
from tests.servers import NatsServer

APP = """
import asyncio, os, time
from millstream import Millstream
from millstream.nats import ConsumerConfig, JStream, NatsBroker

broker = NatsBroker({url!r}, startup_timeout=20)
stream = JStream("{name}", subjects=["{name}.>"])
config = ConsumerConfig(ack_wait=2)


@broker.subscriber("{name}.work", stream=stream, durable="d", config=config)
async def work(body: int) -> None:
    print("begun", body, flush=True)
    if body == 2:
        if os.path.exists("healed"):
            return
        time.sleep(60)
    await asyncio.sleep(60)


@broker.subscriber("{name}.plain")
async def plain(body: int) -> None:
    await broker.publish(body, "{name}.work", stream=stream)


app = Millstream(broker)
"""


class Service:
    """An application in a folder, with sockets in a directory of the test's own."""

    def __init__(self, folder: Path, run: Run, url: str, name: str) -> None:
        self.folder, self.name = folder, name
        # A short path, whatever the test's name.
        self.runtime = folder / "r"
        self.runtime.mkdir()
        self.env = {"XDG_RUNTIME_DIR": str(self.runtime)}
        self._run = run
        write(folder, main=APP.format(url=url, name=name))

    def run(self, *arguments: str) -> Any:
        return self._run("run", "main:app", *arguments, env=self.env)

    def health(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command("health", *arguments, folder=self.folder, env=self.env)

    def told(self, *arguments: str) -> Any:
        return json.loads(self.health("--json", *arguments).stdout)

    def publish(self, *bodies: int) -> None:
        for body in bodies:
            arguments = ("publish", "main:app", str(body), "--to", f"{self.name}.plain")
            done = command(*arguments, folder=self.folder)
            assert done.returncode == 0, done.stderr

    @property
    def sockets(self) -> list[Path]:
        return sorted(self.runtime.glob("millstream/*"))


@pytest.fixture
def service(tmp_path: Path, run: Run, nats: Any, subject: str) -> Service:
    return Service(tmp_path, run, nats.url, subject)


def test_a_running_application_answers(service: Service) -> None:
    done = service.health()
    assert done.returncode == 2 and done.stderr.startswith("Error: nobody answers under ")
    with service.run() as process:
        process.expect("Millstream runs")
        [path] = service.sockets
        assert path.name.startswith("ma") and path.name.endswith(f"-{process.pid}.sock")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        done = service.health()
        assert (done.returncode, done.stderr) == (0, "")
        assert f"main:app ready (pid {process.pid})" in done.stdout
        assert f"{service.name}.work" in done.stdout and "running" in done.stdout

        [told] = service.told()
        assert (told["target"], told["pid"], told["worker"]) == ("main:app", process.pid, None)
        assert told["ready"] and told["live"]
        [broker] = told["brokers"]
        work, plain = broker["subscriptions"]
        assert (work["handler"], work["lag"], work["oldest_unsettled"]) == ("work", 0, None)
        assert (plain["handler"], plain["lag"]) == ("plain", None)
        assert process.stop() == 0
    assert service.sockets == []
    assert service.health().returncode == 2


def test_progress_is_told(service: Service) -> None:
    with service.run() as process:
        process.expect("Millstream runs")
        service.publish(1, 3, 5)
        process.expect("begun 1")

        def work() -> dict[str, Any]:
            [told] = service.told()
            return dict(told["brokers"][0]["subscriptions"][0])

        first = eventually_sync(lambda: (w := work())["lag"] == 2 and w, 10)
        assert first["in_flight"] == 1 and first["handled"] == 0
        later = eventually_sync(lambda: (w := work())["oldest_unsettled"] > 1.5 and w, 10)
        assert later["seconds_since_last_message"] is None
        process.send(signal.SIGKILL)


def test_a_blocked_process_is_not_ready(service: Service) -> None:
    with service.run() as process:
        process.expect("Millstream runs")
        service.publish(2)
        process.expect("begun 2")
        done = service.health("--timeout", "0.5")
        assert done.returncode == 1
        assert "not ready: no answer within 0.5 s" in done.stdout
        [told] = service.told("--timeout", "0.5")
        assert told["ready"] is False and str(process.pid) in told["socket"]
        process.send(signal.SIGKILL)
    [left] = service.sockets  # nobody could remove it
    assert service.health().returncode == 2
    (service.folder / "healed").touch()
    with service.run() as process:
        process.expect("Millstream runs")
        assert left not in service.sockets and len(service.sockets) == 1


def test_a_broker_that_goes_away_is_not_ready(tmp_path: Path, run: Run, subject: str) -> None:
    with NatsServer() as server:
        service = Service(tmp_path, run, server.url, subject)
        with service.run() as process:
            process.expect("Millstream runs")
            assert service.health().returncode == 0
            server.stop()
            process.expect("connection lost")
            done = service.health()
            assert done.returncode == 1 and "not connected" in done.stdout
            server.start()
            process.expect("connected again")
            assert service.health().returncode == 0
            process.stop()


def test_a_start_that_takes_long_is_not_ready(tmp_path: Path, run: Run, subject: str) -> None:
    service = Service(tmp_path, run, "nats://127.0.0.1:1", subject)
    with service.run() as process:
        process.expect("next try in")
        assert service.health().returncode == 1


def test_a_socket_of_ones_own(service: Service) -> None:
    path = str(service.folder / "h")
    with service.run("--health-socket", path) as process:
        process.expect("Millstream runs")
        assert service.sockets == []
        assert service.health("--socket", path).returncode == 0
        assert service.told("--socket", path)["pid"] == process.pid
        second = service.run("--health-socket", path)
        assert second.wait() == 1
        assert f"--health-socket {path}: is in use" in second.output
        assert "Traceback" not in second.output
        process.stop()
    assert not os.path.exists(path)
    done = service.health("--socket", path)
    assert done.returncode == 2 and done.stderr == f"Error: nobody answers at {path}\n"


def test_workers_have_a_socket_each(service: Service) -> None:
    path = str(service.folder / "h")
    with service.run("--workers", "2", "--health-socket", path) as process:
        process.expect("worker 1 is up")
        found = eventually_sync(lambda: len(f := service.told("--socket", path)) == 2 and f, 10)
        assert [one["worker"] for one in found] == [0, 1]
        assert service.health("--socket", path).returncode == 0
        assert process.stop() == 0


def test_it_can_be_left_out(service: Service) -> None:
    with service.run("--no-health-socket") as process:
        process.expect("Millstream runs")
        assert service.sockets == [] and service.health().returncode == 2


def test_a_directory_of_somebody_else_is_not_used(service: Service) -> None:
    (service.runtime / "millstream").mkdir()
    (service.runtime / "millstream").chmod(0o777)
    with service.run() as process:
        process.expect("will not see this process: .*open to them")
        process.expect("Millstream runs")
        assert service.sockets == []
        assert process.stop() == 0
