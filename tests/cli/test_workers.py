"""``millstream run --workers N``: one supervisor, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.harness import LINE, Process, alive, command, write
from tests.servers import free_port

UP = r"worker (\d) is up \(pid (\d+)\)"


def workers(process: Process, count: int = 2) -> dict[int, int]:
    """The latest process id of each worker, once ``count`` were started in all."""
    process.expect(UP, times=count)
    return {int(n): int(pid) for n, pid in re.findall(UP, process.output)}


def test_plain_workers_share_the_messages_and_drain_together(
    run: Run, plain: str, tmp_path: Path
) -> None:
    process = run("run", "main:app", "--workers", "2")
    pids = workers(process)
    process.expect(r"main:app \(Millstream\), 2 workers")
    assert process.count("shop  up: 0 ") == process.count("shop  up: 1 ") == 1
    for i in range(20):
        command(
            "publish", "main:app", f'{{"id": {i}}}', "--to", f"{plain}.orders.eu", folder=tmp_path
        )
        if all(process.count(f"seen .* by {pid}") for pid in pids.values()):
            break
    for pid in pids.values():
        process.expect(f"seen .* by {pid}")
    assert process.stop() == 0
    assert process.count("finished") == 2
    assert not any(map(alive, pids.values()))
    lines = process.output.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert any(line.endswith("worker_id=1") for line in lines)


def test_http_workers_share_one_port(run: Run, web: str) -> None:
    port = free_port()
    process = run("run", "web:app", "--workers", "2", "--port", str(port))
    pids = workers(process)
    process.expect(rf"web:app \(FastAPI\) on http://127.0.0.1:{port}, 2 workers")
    seen: set[int] = set()

    def both() -> bool:
        seen.add(json.loads(process.get(f"http://127.0.0.1:{port}/"))["pid"])
        return seen == set(pids.values())

    process.until(both)
    assert process.stop(signal.SIGINT) == 0
    assert not any(map(alive, pids.values()))


def test_a_killed_worker_comes_back(run: Run, web: str) -> None:
    port = free_port()
    process = run("run", "web:app", "--workers", "2", "--port", str(port))
    old = workers(process)
    os.kill(old[1], signal.SIGKILL)
    process.expect(r"worker 1 \(pid \d+\) was killed by SIGKILL; a new one starts")
    new = workers(process, 3)
    assert new[0] == old[0] and new[1] != old[1]
    assert json.loads(process.get(f"http://127.0.0.1:{port}/"))["answer"] == 1
    assert process.stop() == 0


def test_sighup_replaces_the_workers_one_by_one(run: Run, web: str) -> None:
    port = free_port()
    process = run("run", "web:app", "--workers", "2", "--port", str(port))
    old = workers(process)
    process.send(signal.SIGHUP)
    while not process.count("all workers are new"):
        # Somebody answers at any time.
        assert json.loads(process.get(f"http://127.0.0.1:{port}/"))["answer"] == 1
        assert process.process.poll() is None
    new = workers(process, 4)
    assert not set(new.values()) & set(old.values())
    text = process.output.partition("replacing 2 workers")[2]
    assert text.index(f"worker 0 is up (pid {new[0]})") < text.index(f"process [{old[1]}]")
    assert process.stop() == 0


CRASHING = """
import os
from millstream import Millstream
from millstream.memory import MemoryBroker

app = Millstream(MemoryBroker())


@app.on_startup
def crash(worker_id: int) -> None:
    if worker_id == 1 and os.path.exists("crash"):
        os._exit(7)
"""


def test_a_crash_loop_ends_everything(run: Run, tmp_path: Path) -> None:
    write(tmp_path, main=CRASHING)
    process = run("run", "main:app", "--workers", "2")
    pids = workers(process)
    (tmp_path / "crash").write_text("")
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(30) == 1
    process.expect(r"ERROR .*worker 1 \(pid \d+\) exited with code 7, 5 times in a row; giving up")
    delays = [float(d) for d in re.findall(r"starts in ([\d.]+) s", process.output)]
    assert delays == sorted(set(delays)) and len(delays) == 4
    assert not alive(pids[0])


def test_a_crash_before_anything_is_up_is_not_repeated(run: Run, tmp_path: Path) -> None:
    write(tmp_path, main=CRASHING.replace('worker_id == 1 and os.path.exists("crash")', "True"))
    process = run("run", "main:app", "--workers", "3")
    assert process.wait() == 1
    process.expect(r"worker 0 \(pid \d+\) exited with code 7 before it was up")
    assert "worker 1" not in process.output


ENDING = """
from millstream import Millstream
from millstream.memory import MemoryBroker

app = Millstream(MemoryBroker())


@app.after_startup
async def end(worker_id: int) -> None:
    if worker_id == 1:
        app.exit()
"""


def test_an_application_that_ends_by_itself_ends_all_workers(run: Run, tmp_path: Path) -> None:
    write(tmp_path, main=ENDING)
    process = run("run", "main:app", "--workers", "2")
    assert process.wait() == 0
    process.expect("worker 1 .* exited with code 0; stopping the others")


STUBBORN = """
import asyncio, logging, time
from millstream import Millstream
from millstream.memory import MemoryBroker

broker = MemoryBroker(graceful_timeout=0.5)
app = Millstream(broker)


@app.on_shutdown
def hang(**options) -> None:
    logging.getLogger("shop").info("hanging")
    time.sleep(60)
"""


def test_a_worker_that_does_not_stop_is_killed_at_the_common_deadline(
    run: Run, tmp_path: Path
) -> None:
    write(tmp_path, main=STUBBORN.replace("**options", ""))
    process = run("run", "main:app", "--workers", "2")
    pids = workers(process)
    begun = time.monotonic()
    assert process.stop(timeout=15) == 1
    assert 5 < time.monotonic() - begun < 10
    process.expect("2 of 2 workers had to be killed")
    assert not any(map(alive, pids.values()))


def test_a_second_signal_hurries_the_workers(run: Run, tmp_path: Path) -> None:
    write(tmp_path, main=STUBBORN.replace("**options", ""))
    process = run("run", "main:app", "--workers", "2")
    workers(process)
    process.send(signal.SIGTERM)
    process.expect("hanging", times=2)
    begun = time.monotonic()
    assert process.stop(timeout=10) == 1
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("mode", [["--workers", "2"], ["--reload"]])
def test_children_stop_when_their_parent_is_killed(
    run: Run, tmp_path: Path, nats: Any, plain: str, mode: list[str]
) -> None:
    process = run("run", "main:app", *mode)
    if mode == ["--reload"]:
        process.expect("reloading on changes")
        pids = [int(p) for p in children(process.pid)]
    else:
        pids = list(workers(process).values())
    assert pids
    process.send(signal.SIGKILL)
    process.wait()
    process.until(lambda: not any(map(alive, pids)))
    process.expect("finished", times=len(pids))


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
