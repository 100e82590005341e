"""``millstream run --reload``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from millstream.cli.reload import Watcher
from tests.cli.conftest import Run
from tests.cli.harness import LINE, Process, command, listening, write
from tests.cli.test_run import _with
from tests.servers import free_port

NO_WATCHFILES = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "watchfiles" else find(name, *rest)
"""


def save(path: Path, old: str, new: str) -> None:
    """As editors do: a new file in the place of the old one."""
    text = path.read_text()
    assert old in text
    draft = path.with_suffix(".tmp")
    draft.write_text(text.replace(old, new))
    draft.replace(path)


def answer(process: Process, port: int) -> int:
    return int(json.loads(process.get(f"http://127.0.0.1:{port}/"))["answer"])


@pytest.mark.parametrize("polling", [False, True])
def test_an_http_target_reloads_and_survives_a_syntax_error(
    run: Run, web: str, tmp_path: Path, polling: bool
) -> None:
    port, env = free_port(), {}
    if polling:
        write(tmp_path, sitecustomize=NO_WATCHFILES)
        env = {"PYTHONPATH": _with(tmp_path)}
    process = run("run", "web:app", "--reload", "--port", str(port), env=env)
    process.expect(rf"web:app \(FastAPI\) on http://127.0.0.1:{port}, reloading on changes")
    assert answer(process, port) == 1

    save(tmp_path / "web.py", '"answer": 1', '"answer": 2')
    process.expect("web.py changed, reloading")
    process.expect(r"reloaded in \d")
    assert answer(process, port) == 2

    save(tmp_path / "web.py", "async def root", "async def (root")
    process.expect("SyntaxError: invalid syntax")
    process.expect("exited with code 1; waiting for a change")
    assert listening(port)  # requests wait for the next version

    save(tmp_path / "web.py", '"answer": 2', '"answer": 3')
    process.expect("SyntaxError: invalid syntax", times=2)
    save(tmp_path / "web.py", "async def (root", "async def root")
    process.expect(r"reloaded in \d", times=2)
    assert answer(process, port) == 3
    assert process.stop() == 0
    assert process.output.count("Error: web:app failed") == 2
    assert "Traceback" not in process.output


def test_a_plain_target_reloads_by_the_message(run: Run, plain: str, tmp_path: Path) -> None:
    process = run("run", "main:app", "--reload", "--env", "prod")
    process.expect(r"main:app \(Millstream\), reloading on changes")
    save(tmp_path / "main.py", '"order %s', '"new order %s')
    process.expect(r"reloaded in \d")
    process.expect("up: None prod", times=2)
    command("publish", "main:app", '{"id": 1}', "--to", f"{plain}.orders.eu", folder=tmp_path)
    process.expect("new order 1 from eu")
    assert process.stop() == 0
    lines = process.output.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []


def test_a_broken_module_at_the_start_waits_for_its_repair(
    run: Run, plain: str, tmp_path: Path
) -> None:
    save(tmp_path / "main.py", "import asyncio", "import asyncio_")
    process = run("run", "main:app", "--reload")
    process.expect("No module named 'asyncio_'")
    process.expect("waiting for a change")
    save(tmp_path / "main.py", "import asyncio_", "import asyncio")
    process.expect("reloading on changes")
    assert process.stop() == 0


def test_a_name_that_disappears_for_a_while(run: Run, plain: str, tmp_path: Path) -> None:
    process = run("run", "main:app", "--reload")
    process.expect("reloading on changes")
    text = (tmp_path / "main.py").read_text()
    (tmp_path / "main.py").write_text("")
    process.expect("module main has no 'app'")
    process.expect("exited with code 2; waiting for a change")
    (tmp_path / "main.py").write_text(text)
    process.expect(r"reloaded in \d")
    assert process.stop() == 0


def test_other_directories_and_extensions(run: Run, plain: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    process = run("run", "main:app", "--reload", "--reload-dir", "other", "--ext", "toml")
    process.expect("reloading on changes")
    (tmp_path / "main.py").touch()
    (other / "note.txt").write_text("x")
    (other / "settings.toml").write_text("x = 1")
    process.expect(r"other/settings\.toml changed, reloading")
    process.expect(r"reloaded in \d")
    assert process.count("changed, reloading") == 1
    assert process.stop() == 0
    done = command("run", "main:app", "--reload", "--reload-dir", "nowhere", folder=tmp_path)
    assert done.returncode == 2 and "--reload-dir nowhere: no such directory" in done.stderr


def test_the_parent_does_not_import_the_target(run: Run, tmp_path: Path) -> None:
    source = "import os\nprint('imported by', os.getpid(), 'of', os.getppid(), flush=True)\n"
    write(tmp_path, main=source + MEMORY)
    for mode in (["--reload"], ["--workers", "2"]):
        process = run("run", "main:app", *mode)
        process.expect("imported by", times=len(mode))
        process.expect("reloading on changes" if "--reload" in mode else "worker 1 is up")
        assert process.count(f"imported by {process.pid} ") == 0
        assert process.count(f"of {process.pid}$") == len(mode)
        assert process.stop() == 0


MEMORY = """
from millstream import Millstream
from millstream.memory import MemoryBroker
app = Millstream(MemoryBroker())
"""


def test_what_counts_as_a_change(tmp_path: Path) -> None:
    watcher = Watcher([str(tmp_path)], ["py", ".toml"], [str(tmp_path / "log.json")])
    counted = ["a.py", "deep/er/b.py", "c.toml", "log.json"]
    ignored = ["a.txt", ".git/a.py", "x/__pycache__/a.py", "node_modules/a.py", "other.json"]
    assert all(watcher.counts(tmp_path / name) for name in counted)
    assert not any(watcher.counts(tmp_path / name) for name in ignored)
    assert not watcher.counts(tmp_path.parent / "a.py")


def test_a_second_signal_ends_a_child_that_hangs(run: Run, tmp_path: Path) -> None:
    from tests.cli.test_workers import STUBBORN

    write(tmp_path, main=STUBBORN.replace("**options", ""))
    process = run("run", "main:app", "--reload")
    process.expect("reloading on changes")
    save(tmp_path / "main.py", "time.sleep(60)", "time.sleep(61)")
    process.expect("hanging")
    process.expect("did not stop in time; killing it")
    process.expect("reloaded in")
    process.send(signal.SIGTERM)
    process.expect("hanging", times=2)
    assert process.stop(timeout=5) == 1
