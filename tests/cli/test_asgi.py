"""A plain application under an ASGI server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest

from millstream import Context, Logger, Millstream
from millstream.asgi import (
    AsgiApp,
    AsgiFastStream,
    AsgiResponse,
    Header,
    Query,
    Request,
    get,
    make_ping_asgi,
    post,
)
from millstream.errors import SetupError
from millstream.memory import MemoryBroker
from millstream.nats import NatsBroker
from tests.cli.conftest import Run
from tests.cli.harness import write
from tests.helpers import eventually
from tests.servers import free_port


class Server:
    """What an ASGI server does with an application's lifespan, and a client for its HTTP."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sent: list[dict[str, Any]] = []
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def start(self) -> dict[str, Any]:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self.task = asyncio.ensure_future(self.app(scope, self._inbox.get, self._send))
        return await self._tell("lifespan.startup")

    async def stop(self) -> dict[str, Any]:
        answer = await self._tell("lifespan.shutdown")
        await self.task
        return answer

    async def _tell(self, event: str) -> dict[str, Any]:
        before = len(self.sent)
        await self._inbox.put({"type": event})
        await eventually(lambda: len(self.sent) > before)
        return self.sent[-1]

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


@asynccontextmanager
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@pytest.fixture
async def broker() -> MemoryBroker:
    return MemoryBroker()


async def test_the_lifespan_starts_and_stops_the_application(broker: MemoryBroker) -> None:
    app = Millstream(broker)
    calls: list[str] = []
    app.on_startup(lambda: calls.append("start"))
    app.after_shutdown(lambda: calls.append("stop"))
    hosted = app.as_asgi()
    server = Server(hosted)
    async with client(hosted) as http:
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/livez")).status_code == 200
        assert (await server.start())["type"] == "lifespan.startup.complete"
        assert (await http.get("/readyz")).json() == {"ready": True}
        assert (await http.head("/livez")).content == b""
        health = (await http.get("/health")).json()
        assert health["brokers"][0]["state"] == "running" and health["live"]
        assert (await http.post("/livez")).status_code == 405
        assert (await http.get("/nothing")).status_code == 404
        assert (await server.stop())["type"] == "lifespan.shutdown.complete"
        assert (await http.get("/readyz")).status_code == 503
    assert calls == ["start", "stop"]


async def test_a_start_that_fails_says_why() -> None:
    hosted = AsgiFastStream(NatsBroker("nats://u:secret@127.0.0.1:1", startup_timeout=0.1))
    server = Server(hosted)
    failed = await server.start()
    assert failed["type"] == "lifespan.startup.failed"
    assert "nats://127.0.0.1:1" in failed["message"] and "secret" not in failed["message"]
    with pytest.raises(ConnectionError):
        await server.task


async def test_a_start_that_fails_in_the_users_code_shows_the_traceback(
    broker: MemoryBroker,
) -> None:
    hosted = AsgiApp(broker)

    @hosted.on_startup
    def boom() -> None:
        raise RuntimeError("no table")

    server = Server(hosted)
    failed = await server.start()
    assert "in boom" in failed["message"] and "RuntimeError: no table" in failed["message"]
    with pytest.raises(RuntimeError):
        await server.task


async def test_a_stop_that_fails_is_told(broker: MemoryBroker) -> None:
    hosted = AsgiApp(broker)

    @hosted.on_shutdown
    def boom() -> None:
        raise RuntimeError("no end")

    server = Server(hosted)
    await server.start()
    assert await server.stop() == {"type": "lifespan.shutdown.failed", "message": "no end"}


async def test_options_reach_the_hooks(broker: MemoryBroker) -> None:
    hosted, seen = AsgiApp(broker), []

    @hosted.on_startup
    def up(env: str, number: int) -> None:
        seen.append((env, number))

    hosted.startup_options = {"env": "prod", "number": "5"}
    server = Server(hosted)
    await server.start()
    await server.stop()
    assert seen == [("prod", 5)]


def test_what_it_is_made_of(broker: MemoryBroker) -> None:
    second = MemoryBroker()
    hosted = AsgiApp(broker, second, title="shop")
    assert hosted.brokers == [broker, second] and hosted.broker is broker
    assert hosted.app.title == "shop" and hosted.context is hosted.app.context
    with pytest.raises(SetupError, match="belong to the Millstream"):
        AsgiApp(hosted.app, second)


@asynccontextmanager
async def started(app: AsgiApp) -> AsyncIterator[httpx.AsyncClient]:
    server = Server(app)
    await server.start()
    async with client(app) as http:
        yield http
    await server.stop()


async def test_routes_and_mounts(broker: MemoryBroker) -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = json.dumps([scope["root_path"], scope["path"]]).encode()
        await AsgiResponse(body, 201, {"X-Kind": "echo"})(scope, receive, send)

    hosted = Millstream(broker).as_asgi(routes=[("/exact", echo)])
    hosted.mount("/sub/", echo)
    async with started(hosted) as http:
        answer = await http.get("/exact")
        assert (answer.status_code, answer.headers["x-kind"]) == (201, "echo")
        assert (await http.get("/exact/more")).status_code == 404
        assert (await http.get("/sub/a/b")).json() == ["/sub", "/sub/a/b"]
        assert (await http.get("/sub")).json() == ["/sub", "/sub"]
        assert (await http.get("/subway")).status_code == 404


async def test_a_route_of_ones_own_in_place_of_a_built_in_one(broker: MemoryBroker) -> None:
    hosted = AsgiApp(broker, asgi_routes=[("/livez", AsgiResponse(b"mine"))])
    async with started(hosted) as http:
        assert (await http.get("/livez")).text == "mine"


async def test_below_a_root_path(broker: MemoryBroker) -> None:
    hosted = AsgiApp(broker)
    server = Server(hosted)
    await server.start()
    transport = httpx.ASGITransport(hosted, root_path="/api")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/api/livez")).status_code == 200
    await server.stop()


async def test_a_websocket_is_closed(broker: MemoryBroker) -> None:
    hosted, sent = AsgiApp(broker), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    for path in ("/livez", "/nothing"):
        await hosted({"type": "websocket", "path": path, "root_path": ""}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"] * 2


async def test_ping(broker: MemoryBroker) -> None:
    hosted = AsgiApp(broker, routes=[("/ping", make_ping_asgi(broker, timeout=0.5))])
    async with client(hosted) as http:
        assert (await http.get("/ping")).status_code == 500
        async with broker:
            assert (await http.get("/ping")).status_code == 204


async def test_handlers_take_what_they_name(broker: MemoryBroker) -> None:
    app = Millstream(broker)
    app.context.set_global("settings", {"tenant": "acme", "level": "3"})

    @get
    async def find(
        request: Request,
        scope: Any,
        logger: Logger,
        limit: Annotated[int, Query()],
        user_agent: Annotated[str, Header()],
        tenant: Annotated[str, Context("settings.tenant")],
        page: int = Query("p", default=1),
        flag: Annotated[bool, Query()] = False,
        missing: Annotated[str, Context("nowhere", default="none")] = "",
        broker_: Annotated[Any, Context("broker")] = None,
        timeout: Annotated[float, Context("broker.request_timeout")] = 0.0,
        unknown: Annotated[str, Context("broker.nothing", default="none")] = "",
        made: Annotated[list[int], Context("made", initial=list)] = [],  # noqa: B006
        level: Annotated[int, Context("settings.level", cast=True)] = 0,
        plain: Annotated[str, Context("settings.nothing")] = "plain",
    ) -> AsgiResponse:
        assert (timeout, unknown, level, plain) == (5.0, "none", 3, "plain")
        made.append(limit)
        assert app.context.get("made") is made
        assert request.method == "GET" and request.path == scope["path"] and broker_ is app.broker
        logger.info("asked")
        found = [limit, page, flag, user_agent, tenant, missing]
        return AsgiResponse(json.dumps(found).encode())

    @post(description="takes JSON", tags=["x"])
    def take(request: Request) -> Any:
        async def answer() -> AsgiResponse:
            again = await request.body()
            assert again == await request.body()
            return AsgiResponse(json.dumps(await request.json()).encode())

        return answer()

    assert take.documents == {"description": "takes JSON", "tags": ["x"]}
    async with started(app.as_asgi(routes=[("/find", find), ("/take", take)])) as http:
        agent = {"user-agent": "me"}
        answer = await http.get("/find?limit=5&p=3&flag=true", headers=agent)
        assert answer.json() == [5, 3, True, "me", "acme", "none"]
        assert (await http.get("/find?limit=5", headers=agent)).json()[:3] == [5, 1, False]
        refused = await http.get("/find", headers=agent)
        assert (refused.status_code, refused.text) == (422, "query parameter 'limit' is missing")
        refused = await http.get("/find?limit=x", headers=agent)
        assert refused.status_code == 422 and "Expected `int`" in refused.text
        assert (await http.post("/find")).status_code == 405
        assert (await http.post("/take", json={"a": [1]})).json() == {"a": [1]}
        assert (await http.get("/take")).headers["allow"] == "POST"


def test_a_handler_with_a_parameter_nobody_can_fill() -> None:
    with pytest.raises(SetupError, match="parameter 'what' cannot be filled"):

        @get
        def wrong(what: int) -> AsgiResponse:
            return AsgiResponse()


async def test_context_outside_of_an_application_is_an_error(broker: MemoryBroker) -> None:
    @get
    def shows(value: Annotated[str, Context("settings")]) -> AsgiResponse:
        return AsgiResponse()

    @get
    def needs_none(
        value: Annotated[int, Context("settings", default="none", cast=True)],
    ) -> AsgiResponse:
        return AsgiResponse(str(value).encode())

    async with client(shows) as http:
        with pytest.raises(SetupError, match="as_asgi"):
            await http.get("/")
    async with client(needs_none) as http:
        assert (await http.get("/")).text == "none"
    async with started(AsgiApp(broker, routes=[("/", shows)])) as http:
        with pytest.raises(KeyError):
            await http.get("/")


SERVED = """
import logging
from millstream import Logger, Millstream
from millstream.nats import NatsBroker

broker = NatsBroker({url!r})
plain = Millstream(broker)
app = plain.as_asgi()


@broker.subscriber("{subject}.in")
async def handle(body: int, logger: Logger) -> None:
    logger.info("took %s", body)


@plain.after_startup
async def send() -> None:
    await broker.publish(1, "{subject}.in")
"""
SET_UP = "import millstream.logging\nmillstream.logging.setup(json={json})\n"


@pytest.mark.parametrize("mode", ["as it is", "set up"])
def test_under_plain_uvicorn_all_lines_have_one_format(
    run: Run, tmp_path: Any, nats: Any, subject: str, mode: str
) -> None:
    source = SERVED.format(url=nats.url, subject=subject)
    write(tmp_path, main=source + (SET_UP.format(json=True) if mode == "set up" else ""))
    port = free_port()
    process = run("main:app", "--port", str(port), program=("-m", "uvicorn"))
    process.expect("took 1")
    assert json.loads(process.get(f"http://127.0.0.1:{port}/readyz")) == {"ready": True}
    process.expect("GET /readyz")
    process.stop()
    lines = process.output.splitlines()
    begin = next(i for i, line in enumerate(lines) if "Waiting for application startup" in line)
    if mode == "set up":
        assert all(json.loads(line) for line in lines[begin:])
    else:
        assert all(line.startswith("INFO:     ") for line in lines[begin:])
    assert any("took 1" in line for line in lines[begin:]) and any(
        "finished" in line for line in lines[begin:]
    )
