"""The documentation's application under real servers, as real processes."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import LINE, Process, alive, environment, listening
from tests.helpers import unique
from tests.servers import free_port

pytestmark = pytest.mark.slow

MAIN = """
from fastapi import FastAPI
from pydantic import BaseModel
from millstream import Logger
from millstream.nats.fastapi import NatsRouter

class Order(BaseModel):
    id: int
    amount: float

router = NatsRouter("{url}")

@router.subscriber("{name}.orders.{{region}}")
@router.publisher("{name}.invoices")
async def invoice(order: Order, region: str, logger: Logger) -> dict:
    logger.info("order %s from %s", order.id, region)
    return {{"order": order.id, "total": order.amount * 1.2}}

@router.post("/orders/{{region}}")
async def place(region: str, order: Order, logger: Logger) -> dict:
    logger.info("accepted")
    await router.broker.publish(order, f"{name}.orders.{{region}}")
    return {{"accepted": order.id}}

app = FastAPI(lifespan=router.lifespan_context)
app.include_router(router)
"""
#: A handler that is still running when the signal comes.
SLOW = """
import asyncio
from fastapi import FastAPI
from millstream import Logger
from millstream.nats import JStream
from millstream.nats.fastapi import NatsRouter

router = NatsRouter("{url}", graceful_timeout=10)

@router.subscriber("{name}.slow", stream=JStream("{name}"), durable="d")
async def slow(body: int, logger: Logger) -> None:
    logger.info("begin %s", body)
    await asyncio.sleep(0.5)
    logger.info("end %s", body)

@router.get("/")
async def page(n: int) -> None:
    for i in range(n):
        await router.broker.publish(i, "{name}.slow", stream="{name}")

app = FastAPI()
app.include_router(router)
"""
GUNICORN_WORKER = "uvicorn.workers.UvicornWorker"
try:
    import uvicorn_worker  # noqa: F401

    GUNICORN_WORKER = "uvicorn_worker.UvicornWorker"
except ImportError:
    pass

Serve = Callable[..., Process]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts ``python -m program ...`` in the test's folder."""
    with ExitStack() as stack:

        def start(program: str, *arguments: str, **options: Any) -> Process:
            process = Process(
                *arguments, folder=tmp_path, program=("-m", *program.split()), **options
            )
            return stack.enter_context(process)

        yield start


def write(folder: Path, text: str, **values: str) -> None:
    (folder / "main.py").write_text(text.format(**values))


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)


def order(process: Process, port: int, number: int) -> None:
    """Place an order by HTTP and wait until its message was handled."""
    process.until(lambda: listening(port))
    assert post(port, "/orders/eu", {"id": number, "amount": 1}) == {"accepted": number}
    process.expect(rf"order {number} from eu")


SERVERS = {
    "uvicorn": ("uvicorn", "main:app --port {port}"),
    "gunicorn": ("gunicorn", f"main:app -w 2 -b 127.0.0.1:{{port}} -k {GUNICORN_WORKER}"),
    "millstream run": ("millstream run", "main:app --port {port}"),
    "millstream run, workers": ("millstream run", "main:app --port {port} --workers 2"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_the_story(name: str, serve: Serve, nats: Any, tmp_path: Path) -> None:
    write(tmp_path, MAIN, url=nats.url, name=unique())
    port = free_port()
    program, arguments = SERVERS[name]
    process = serve(program, *arguments.format(port=port).split())
    order(process, port, 7)
    process.expect("accepted")
    if "workers" in name:
        process.expect("worker . is up", times=2)
    code = process.stop()
    assert code in (0, -signal.SIGTERM), process.output
    process.expect(r"finished \d+, returned 0")
    assert "Traceback" not in process.output
    assert "ERROR" not in process.output


def test_both_worlds_look_alike_under_uvicorn(serve: Serve, nats: Any, tmp_path: Path) -> None:
    """Nobody set logging up: our lines are in the server's own format."""
    write(tmp_path, MAIN, url=nats.url, name=unique())
    port = free_port()
    process = serve("uvicorn", "main:app", "--port", str(port))
    order(process, port, 1)
    process.stop()
    own = re.compile(r"(DEBUG|INFO|WARNING|ERROR): +\S.*")
    strange = [line for line in process.output.splitlines() if not own.fullmatch(line)]
    assert not strange, process.output
    assert re.search(r"^INFO: +order 1 from eu$", process.output, re.MULTILINE)


def test_logging_of_ones_own_is_left_alone(serve: Serve, nats: Any, tmp_path: Path) -> None:
    setup = "import millstream.logging\nmillstream.logging.setup()\n"
    write(tmp_path, setup + MAIN, url=nats.url, name=unique())
    port = free_port()
    process = serve("uvicorn", "main:app", "--port", str(port))
    order(process, port, 1)
    process.stop()
    lines = process.output.splitlines()
    ours = [line for line in lines if "order 1 from eu" in line]
    assert len(ours) == 1, process.output
    assert LINE.fullmatch(ours[0]), process.output
    assert [line for line in lines if "POST /orders/eu" in line and LINE.fullmatch(line)]


@pytest.mark.parametrize("program", ["uvicorn", "millstream run"])
def test_reload_with_a_syntax_error_in_between(
    program: str, serve: Serve, nats: Any, tmp_path: Path
) -> None:
    write(tmp_path, MAIN, url=nats.url, name=unique())
    port = free_port()
    process = serve(program, "main:app", "--port", str(port), "--reload")
    order(process, port, 1)
    text = (tmp_path / "main.py").read_text()

    def change(new: str) -> None:
        time.sleep(1.1)  # watchers that compare times of modification see whole seconds
        (tmp_path / "main.py").write_text(new)

    change(text + "\nthis is no python\n")
    process.expect("SyntaxError|invalid syntax")
    change(text.replace("accepted", "taken over"))
    process.until(lambda: answers(port, 2))
    process.expect("order 2 from eu")
    process.expect("taken over")
    assert process.stop() in (0, -signal.SIGTERM)


def answers(port: int, number: int) -> bool:
    try:
        return bool(post(port, "/orders/eu", {"id": number, "amount": 1}) == {"taken over": number})
    except OSError:
        return False


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn", "millstream run"])
def test_sigterm_finishes_what_runs_and_hands_back_the_rest(
    name: str, serve: Serve, nats: Any, tmp_path: Path
) -> None:
    write(tmp_path, SLOW, url=nats.url, name=unique())
    port = free_port()
    program, arguments = SERVERS[name]
    process = serve(program, *arguments.format(port=port).replace("-w 2", "-w 1").split())
    process.until(lambda: listening(port))
    urllib.request.urlopen(f"http://127.0.0.1:{port}/?n=3", timeout=5).close()
    process.expect("begin 0")
    assert process.stop() in (0, -signal.SIGTERM), process.output
    assert process.count(r"begin \d") == process.count(r"end \d") == 1, process.output
    process.expect(r"finished 1, returned 2")
    # Another process gets what was handed back, at once.
    second = serve(program, *arguments.format(port=free_port()).replace("-w 2", "-w 1").split())
    second.expect("end 2", timeout=10)


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn", "millstream run"])
def test_a_broker_that_is_not_there(name: str, serve: Serve, tmp_path: Path) -> None:
    closed = free_port()
    text = MAIN.replace('("{url}")', '("{url}", startup_timeout=1)')
    write(tmp_path, text, url=f"nats://user:secret@127.0.0.1:{closed}", name="x")
    program, arguments = SERVERS[name]
    process = serve(program, *arguments.format(port=free_port()).split())
    assert process.wait(30) not in (0, None), process.output
    assert f"nats://127.0.0.1:{closed}" in process.output
    assert "next try in" in process.output
    assert "secret" not in process.output


@pytest.mark.parametrize("name", ["uvicorn", "millstream run"])
def test_a_handler_that_ends_the_application(
    name: str, serve: Serve, nats: Any, tmp_path: Path
) -> None:
    text = MAIN.replace("import Logger", "import Logger, StopApplication")
    text = text.replace(
        '    logger.info("order', '    raise StopApplication\n    logger.info("order'
    )
    write(tmp_path, text, url=nats.url, name=unique())
    port = free_port()
    program, arguments = SERVERS[name]
    process = serve(program, *arguments.format(port=port).split())
    process.until(lambda: listening(port))
    post(port, "/orders/eu", {"id": 1, "amount": 1})
    assert process.wait() in (0, -signal.SIGTERM)
    process.expect(r"Application shutdown complete")


def test_dev_offers_messages_in_docs(serve: Serve, nats: Any, tmp_path: Path) -> None:
    write(tmp_path, MAIN, url=nats.url, name="dev")
    port = free_port()
    process = serve("millstream dev", "main:app", "--port", str(port))
    process.until(lambda: listening(port))
    document = json.loads(process.get(f"http://127.0.0.1:{port}/openapi.json"))
    operation = document["paths"]["/messages/dev.orders.{region}"]["post"]
    assert operation["tags"] == ["messages"]
    answer = post(port, "/messages/dev.orders.eu?reply=true", {"id": 5, "amount": 10})
    assert answer == {"published": "dev.orders.eu", "reply": {"order": 5, "total": 12.0}}
    process.stop()


def test_a_worker_that_is_killed_comes_back(serve: Serve, nats: Any, tmp_path: Path) -> None:
    write(tmp_path, MAIN, url=nats.url, name=unique())
    port = free_port()
    process = serve("gunicorn", *f"main:app -w 1 -b 127.0.0.1:{port} -k {GUNICORN_WORKER}".split())
    order(process, port, 1)
    pid = int(process.expect(r"Booting worker with pid: (\d+)")[1])
    subprocess.run(["kill", "-9", str(pid)], check=True)
    process.expect(r"Booting worker with pid: (\d+)", times=2)
    process.until(lambda: not alive(pid))
    process.until(lambda: placed(port, 2))
    process.expect("order 2 from eu")
    process.stop()


def placed(port: int, number: int) -> bool:
    try:
        return bool(post(port, "/orders/eu", {"id": number, "amount": 1}))
    except OSError:
        return False


def test_markers_that_were_made_before_fastapi_was_imported() -> None:
    code = """
        import asyncio
        from typing import Annotated
        from millstream import Context, Depends, Logger

        def number() -> int:
            return 7

        early, dependency = Context("early", default=1), Depends(number, scope="message")

        import httpx
        from fastapi import FastAPI
        import millstream.fastapi

        app = FastAPI()

        @app.get("/")
        async def page(
            logger: Logger, a: Annotated[int, early], b: Annotated[int, dependency]
        ) -> list[int]:
            return [a, b]

        async def main() -> None:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                print((await client.get("/")).json())

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[1, 7]", done.stderr


def test_the_imports_of_a_plain_service_do_not_load_fastapi() -> None:
    code = """
        import sys
        import millstream.nats
        print([m for m in ("fastapi", "starlette", "pydantic") if m in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
