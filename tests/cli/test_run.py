"""``millstream run`` in one process."""

from __future__ import annotations

import gc
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli import apps
from tests.cli.conftest import Run
from tests.cli.harness import LINE, command, listening, write
from tests.helpers import eventually_sync
from tests.servers import free_port

UP = r"millstream.app  Millstream runs: nats://127.0.0.1:\d+ \(1 subscription\)"


def publish(folder: Path, target: str, message: str, to: str) -> None:
    done = command("publish", target, message, "--to", to, folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["main:app", "main:broker", "main:create", "main:asgi.app"])
def test_plain_targets_run_and_drain_on_sigterm(run: Run, plain: str, target: str) -> None:
    process = run("run", target)
    process.expect(r"Millstream runs: nats://")
    assert process.stop() == 0
    assert LINE.match(process.output)
    assert "Traceback" not in process.output


def test_messages_of_a_router_are_handled_and_every_line_has_one_format(
    run: Run, plain: str, tmp_path: Path
) -> None:
    process = run("run", "main:app")
    process.expect(UP)
    publish(tmp_path, "main:app", '{"id": 7}', f"{plain}.orders.eu")
    process.expect(f"order 7 from eu  subject={plain}.orders.eu message_id=.* handler=order")
    process.expect(f"shop  seen 7 by {process.pid}  subject=")
    assert process.stop() == 0
    lines = process.output.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert "finished" in lines[-1]


def test_an_async_factory(run: Run, plain: str) -> None:
    process = run("run", "main:create_async", "--factory", "--loop", "asyncio")
    process.expect(r"Millstream runs: nats://.*\(0 subscriptions\)")
    assert process.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("own", [(), (900, 9, 9)])
def test_collections_leave_out_what_was_imported(
    run: Run, tmp_path: Path, own: tuple[int, ...]
) -> None:
    write(
        tmp_path,
        main=f"""
import gc
from millstream import Millstream
from millstream.memory import MemoryBroker

if {own}:
    gc.set_threshold(*{own})
app = Millstream(MemoryBroker())


@app.after_startup
async def tell():
    few = len(gc.get_objects()) < 10_000
    print(gc.get_threshold(), gc.get_freeze_count() > 10_000, few, flush=True)
""",
    )
    process = run("run", "main:app")
    usual = own or gc.get_threshold()
    process.expect(re.escape(f"{usual} True True"))
    assert process.stop() == 0


def test_extra_options_reach_the_hooks(run: Run, plain: str) -> None:
    process = run("run", "main:app", "--env=prod", "--debug", "--port", "5000", "--typo", "x")
    process.expect("shop  up: None prod True 5000")
    process.expect("WARNING .*no start-up hook takes --typo")
    assert process.stop() == 0


def test_a_wrong_extra_option(plain: str, tmp_path: Path) -> None:
    done = command("run", "main:app", "--port", "5", "--debug", "maybe", folder=tmp_path)
    assert done.returncode == 1
    assert "the option 'debug' of up()" in done.stderr and "Traceback" not in done.stderr


def test_options_come_from_the_environment_too(run: Run, plain: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "main.py").rename(inner / "service.py")
    process = run(
        "run", "service:app", env={"MILLSTREAM_APP_DIR": "inner", "MILLSTREAM_LOG_JSON": "1"}
    )
    process.expect("Millstream runs")
    assert process.stop() == 0
    entries = [json.loads(line) for line in process.output.splitlines()]
    assert {entry["logger"] for entry in entries} >= {"shop", "millstream.app"}


def test_the_log_level(run: Run, plain: str) -> None:
    process = run("run", "main:app", "--log-level", "debug")
    process.expect("DEBUG .*subscriptions run")
    assert process.stop() == 0


def test_a_log_configuration_of_ones_own(run: Run, plain: str, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(
        json.dumps(
            {
                "formatters": {"f": {"format": "MINE %(name)s %(message)s"}},
                "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "f"}},
                "root": {"level": "INFO", "handlers": ["h"]},
            }
        )
    )
    process = run("run", "main:app", "--log-config", "log.json")
    process.expect("^MINE millstream.app Millstream runs")
    assert process.stop() == 0
    assert all(line.startswith("MINE ") for line in process.output.splitlines())


def test_an_application_that_configured_logging_keeps_its_format(
    run: Run, plain: str, tmp_path: Path
) -> None:
    source = (tmp_path / "main.py").read_text()
    setting = 'import logging\nlogging.basicConfig(level="INFO", format="THEIRS %(message)s")\n'
    write(tmp_path, main=setting + source)
    process = run("run", "main:app", "--log-level", "debug")
    process.expect("^THEIRS Millstream runs")
    process.expect("^THEIRS .*subscriptions run")  # a level that was asked for counts
    assert process.stop() == 0
    assert all(line.startswith("THEIRS ") for line in process.output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["main:ap"], "did you mean main:app?"),
        (["mian:app"], "no module 'mian'"),
        (["main.py"], "'main.py' is a file, a module is wanted: main"),
        (["main:needs"], "a function that needs something"),
        (["main:router"], "is a NatsRouter: include it into a broker"),
        (["main:app", "--app-dir", "nowhere"], "--app-dir nowhere: no such directory"),
        (["main:app", "--log-level", "loud"], "'loud' is no log level"),
        (["main:app", "--log-config", "none.json"], "--log-config: none.json: No such file"),
        (["main:app", "--reload", "--workers", "2"], "--reload watches one process"),
        (["main:app", "prod"], "'prod' belongs to no option"),
        (["main:app", "--loop", "fast"], "--loop fast: auto, uvloop or asyncio"),
        (["main:ap", "--workers", "2"], "did you mean main:app?"),
        (["main:needs", "--workers", "2"], "a function that needs something"),
        (["main:app", "--workers", "2", "--log-config", "none.json"], "No such file"),
        (["main:ap", "--reload"], "did you mean main:app?"),
        (["main:app", "--reload", "--log-config", "none.json"], "No such file"),
    ],
)
def test_usage_errors_are_one_message_and_exit_code_2(
    plain: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = command("run", *arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("Error:") == 1 and "Traceback" not in done.stderr


def test_an_error_in_the_module_shows_the_users_frames(tmp_path: Path) -> None:
    write(tmp_path, main="import helper\n", helper="def f():\n    return 1 / 0\n\nf()\n")
    done = command("run", "main:app", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: main:app failed\n")
    files = re.findall(r'File "(.+?)", line (\d+)', done.stderr)
    assert [(Path(file).name, line) for file, line in files] == [
        ("main.py", "1"), ("helper.py", "4"), ("helper.py", "2"),
    ]  # fmt: skip
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_an_error_in_a_hook_shows_the_users_frames(plain: str, tmp_path: Path) -> None:
    with (tmp_path / "main.py").open("a") as file:
        file.write("\n@app.on_startup\nasync def boom():\n    raise RuntimeError('no table')\n")
    done = command("run", "main:app", folder=tmp_path)
    assert done.returncode == 1
    assert "in boom" in done.stderr and "RuntimeError: no table" in done.stderr
    assert "millstream/" not in done.stderr.partition("failed")[2]


def test_a_wrong_declaration_names_its_place(plain: str, tmp_path: Path) -> None:
    with (tmp_path / "main.py").open("a") as file:
        file.write("\n@broker.subscriber('a.>.b')\nasync def wrong(body: dict): ...\n")
    done = command("run", "main:app", folder=tmp_path)
    assert done.returncode == 1
    assert "MS102" in done.stderr and "main.py:" in done.stderr and "fix:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", ["main:app", "main:broker", "web:app", "main:asgi"])
@pytest.mark.parametrize("mode", [[], ["--workers", "2"]])
def test_an_unreachable_broker_ends_it_with_its_address_and_without_the_password(
    tmp_path: Path, target: str, mode: list[str]
) -> None:
    url = f"nats://me:secret@127.0.0.1:{free_port()}"
    write(
        tmp_path,
        main=apps.PLAIN.format(url=url, subject="x").replace("timeout=5", "timeout=1"),
        web=apps.WEB.format(url=url, subject="x").replace("timeout=5", "timeout=1"),
    )
    port = [] if "main:app" in target or "broker" in target else ["--port", str(free_port())]
    begun = time.monotonic()
    done = command("run", target, *port, *mode, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begun < 15
    *lines, last = done.stderr.strip().splitlines()
    assert re.match(r"Error: .*127\.0\.0\.1:\d+", last), done.stderr
    assert "secret" not in done.stderr and "Traceback" not in done.stderr
    assert any("next try in" in line for line in lines)


def test_sigterm_while_the_broker_is_not_reached(run: Run, tmp_path: Path) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    write(tmp_path, main=apps.PLAIN.format(url=url, subject="x").replace("timeout=5", "timeout=60"))
    write(tmp_path, web=apps.WEB.format(url=url, subject="x").replace("timeout=5", "timeout=60"))
    for target in ("main:app", "web:app"):
        process = run("run", target, *(["--port", "0"] if "web" in target else []))
        process.expect("next try in")
        assert process.stop(timeout=5) == 0, process.output
        assert "Traceback" not in process.output


def test_fastapi_with_its_own_lifespan(run: Run, web: str, tmp_path: Path) -> None:
    port = free_port()
    process = run("run", "web:app", "--port", str(port))
    process.expect(rf"millstream.run  web:app \(FastAPI\) on http://127.0.0.1:{port}")
    assert json.loads(process.get(f"http://127.0.0.1:{port}/"))["answer"] == 1
    publish(tmp_path, "web:app", '{"id": 3}', f"{web}.in")
    process.expect(f"shop  message 3  subject={web}.in")
    assert process.stop() == 0
    lines = process.output.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    loggers = {line.split()[3] for line in lines}
    assert loggers >= {"uvicorn", "uvicorn.access", "shop", "millstream.run", "millstream.nats"}


def test_a_plain_application_as_asgi(run: Run, plain: str) -> None:
    process = run("run", "main:asgi", "--port", "0", "--timeout-keep-alive", "2")
    url = process.expect(r"main:asgi \(AsgiApp\) on (http://127\.0\.0\.1:\d+)")[1]
    assert json.loads(process.get(f"{url}/readyz")) == {"ready": True}
    assert json.loads(process.get(f"{url}/health"))["brokers"][0]["state"] == "running"
    assert process.stop() == 0


def test_a_unix_socket(run: Run, web: str, tmp_path: Path) -> None:
    process = run("run", "web:app", "--uds", "s.sock")
    process.expect(r"on unix:s\.sock")
    assert (tmp_path / "s.sock").is_socket()
    again = command("run", "web:app", "--uds", "s.sock", folder=tmp_path)
    assert again.returncode == 1 and "--uds s.sock: is in use" in again.stderr
    assert process.stop() == 0
    assert not (tmp_path / "s.sock").exists()
    (tmp_path / "file").write_text("")
    done = command("run", "web:app", "--uds", "file", folder=tmp_path)
    assert done.returncode == 1 and "exists and is no socket" in done.stderr


@pytest.mark.parametrize("mode", [[], ["--workers", "2"], ["--reload"]])
def test_a_port_in_use_is_one_line(run: Run, web: str, tmp_path: Path, mode: list[str]) -> None:
    port = free_port()
    process = run("run", "web:app", "--port", str(port))
    process.expect("web:app .* on http")
    done = command("run", "web:app", "--port", str(port), *mode, folder=tmp_path)
    assert done.returncode == 1
    assert f"Error: 127.0.0.1:{port} is in use; choose another with --port\n" == done.stderr
    assert process.process.poll() is None


def test_an_address_of_another_machine(web: str, tmp_path: Path) -> None:
    done = command("run", "web:app", "--host", "192.0.2.1", folder=tmp_path)
    assert (done.returncode, "is no address of this machine" in done.stderr) == (1, True)


def test_an_unknown_option_of_an_http_target(web: str, tmp_path: Path) -> None:
    done = command("run", "web:app", "--port", "0", "--env", "prod", folder=tmp_path)
    assert done.returncode == 2 and "knows --env" in done.stderr


NO_UVICORN = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "uvicorn":
            raise ImportError("No module named 'uvicorn'", name="uvicorn")

sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("mode", [[], ["--workers", "2"]])
def test_without_uvicorn_it_says_what_to_install(web: str, tmp_path: Path, mode: list[str]) -> None:
    write(tmp_path, sitecustomize=NO_UVICORN)
    done = command("run", "web:app", *mode, folder=tmp_path, env={"PYTHONPATH": _with(tmp_path)})
    assert done.returncode == 1
    assert "web:app (FastAPI) speaks HTTP and needs a server" in done.stderr
    assert "pip install uvicorn" in done.stderr and "Traceback" not in done.stderr


def _with(folder: Path) -> str:
    from tests.cli.harness import environment

    return f"{folder}:{environment()['PYTHONPATH']}"


def test_sigterm_under_load_loses_nothing(
    run: Run, nats: Any, subject: str, tmp_path: Path
) -> None:
    write(tmp_path, main=LOAD.format(url=nats.url, subject=subject))
    process = run("run", "main:app")
    process.expect("took [1-9]")
    assert process.stop() == 0
    returned = int(process.expect(r"finished \d+, returned (\d+)")[1])
    handled = process.count("shop  took")
    assert returned > 0
    # What was handed back is delivered at once to the next process.
    second = run("run", "main:app", "--consume-only")
    eventually_sync(lambda: handled + second.count("shop  took") >= 60, 20)
    took = process.output + second.output
    assert {int(n) for n in re.findall(r"shop  took (\d+)", took)} == set(range(60))
    assert second.stop() == 0


LOAD = """
import asyncio, logging
from millstream import Millstream
from millstream.nats import JStream, NatsBroker

broker = NatsBroker({url!r})
stream = JStream("{subject}", subjects=["{subject}.work"])
app = Millstream(broker)


@broker.subscriber("{subject}.work", stream=stream, durable="worker", concurrency=4)
async def work(body: int) -> None:
    await asyncio.sleep(0.2)
    logging.getLogger("shop").info("took %s", body)


@app.after_startup
async def fill(consume_only: bool = False) -> None:
    if not consume_only:
        for i in range(60):
            await broker.publish(i, "{subject}.work", stream="{subject}")
"""


def test_a_second_signal_means_now(run: Run, nats: Any, subject: str, tmp_path: Path) -> None:
    write(tmp_path, main=SLOW.format(url=nats.url, subject=subject))
    for target in ("main:app", "main:asgi"):
        process = run("run", target, *(["--port", "0"] if "asgi" in target else []))
        process.expect("shop  begun")
        process.send(signal.SIGTERM)
        process.expect("Shutting down" if "asgi" in target else "shop  stopping")
        begun = time.monotonic()
        process.send(signal.SIGINT)
        assert process.wait(8) == 0
        assert time.monotonic() - begun < 6, process.output
        process.expect("finished 0")


SLOW = """
import asyncio, logging
from millstream import Millstream
from millstream.nats import NatsBroker

broker = NatsBroker({url!r}, graceful_timeout=30)
app = Millstream(broker)
asgi = app.as_asgi()


@broker.subscriber("{subject}.slow")
async def slow(body: int) -> None:
    logging.getLogger("shop").info("begun")
    await asyncio.sleep(30)


@app.after_startup
async def fill() -> None:
    await broker.publish(1, "{subject}.slow")


@app.on_shutdown
async def stopping() -> None:
    logging.getLogger("shop").info("stopping")
"""


@pytest.mark.parametrize("target", ["main:app", "main:asgi", "main:fast"])
def test_a_handler_can_end_the_application(
    run: Run, nats: Any, subject: str, tmp_path: Path, target: str
) -> None:
    write(tmp_path, main=ENDING.format(url=nats.url, subject=subject))
    process = run("run", target, *([] if target == "main:app" else ["--port", "0"]))
    assert process.wait() == 0
    assert "last" in process.output and "Traceback" not in process.output


ENDING = """
import logging
from contextlib import asynccontextmanager
from fastapi import FastAPI
from millstream import Millstream, StopApplication
from millstream.nats import NatsBroker

broker = NatsBroker({url!r})
app = Millstream(broker)
asgi = app.as_asgi()


@broker.subscriber("{subject}.end")
async def end(body: int) -> None:
    logging.getLogger("shop").info("last")
    raise StopApplication()


@app.after_startup
async def fill() -> None:
    await broker.publish(1, "{subject}.end")


@asynccontextmanager
async def lifespan(fast):
    async with broker:
        await broker.start()
        import asyncio
        task = asyncio.create_task(later())
        yield
        await task


async def later():
    import asyncio
    await asyncio.sleep(0.3)
    await broker.publish(1, "{subject}.end")


fast = FastAPI(lifespan=lifespan)
"""


def test_python_m_millstream_and_the_version(tmp_path: Path) -> None:
    done = command("--version", folder=tmp_path)
    assert re.fullmatch(r"millstream \d+\.\d+\.\d+\n", done.stdout)
    assert done.returncode == 0
    helped = command("run", "--help", folder=tmp_path)
    assert "--workers" in helped.stdout and "MILLSTREAM_WORKERS" in helped.stdout


def test_the_import_of_the_package_loads_no_command_line(tmp_path: Path) -> None:
    import subprocess

    code = "import sys, millstream, millstream.logging; print({'typer', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert not listening(1)


LOST = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from millstream import Millstream
from millstream.nats import NatsBroker

broker = NatsBroker({url!r}, max_reconnect_attempts=1, reconnect_time_wait=0.1)
app = Millstream(broker)
asgi = app.as_asgi()


@broker.subscriber("x")
async def handle(body: dict) -> None: ...
"""


@pytest.mark.parametrize("target", ["main:app", "main:asgi"])
def test_a_broker_that_is_lost_for_good_ends_it_with_exit_code_1(
    run: Run, nats_server: Any, tmp_path: Path, target: str
) -> None:
    write(tmp_path, main=LOST.format(url=nats_server.url))
    process = run("run", target, *([] if target == "main:app" else ["--port", "0"]))
    process.expect("Millstream runs|main:asgi .* on http")
    nats_server.kill()
    assert process.wait() == 1
    process.expect(rf"^Error: .*lost for good: {nats_server.url}")
    assert "Traceback" not in process.output
