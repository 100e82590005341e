"""When the broker is there: around the application's own lifespan, once, or not at all."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI

from millstream import StopApplication
from millstream.errors import NotConnected
from millstream.fastapi import attach
from millstream.nats import JStream, NatsBroker, TestNatsBroker
from millstream.nats.fastapi import NatsRouter
from tests.fastapi.serving import serving
from tests.helpers import eventually, unique
from tests.servers import free_port


@pytest.mark.parametrize("nested", [False, True], ids=["direct", "in a plain router"])
@pytest.mark.parametrize("way", ["included", "attached"])
async def test_the_broker_is_there_for_the_whole_lifespan(
    nats: Any, way: str, nested: bool
) -> None:
    """Start-up and shutdown code publish; messages are handled only in between."""
    name, order = unique(), []
    broker = NatsBroker(nats.url)
    router = NatsRouter(broker=broker)

    @broker.subscriber(f"{name}.in", stream=JStream(name), durable="d")
    async def handler(body: str) -> None:
        order.append(f"handled {body}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        order.append(f"up {broker.state.value}")
        await broker.publish("early", f"{name}.in")
        order.append("started")
        yield {"pool": 1}
        order.append(f"down {broker.state.value}")
        await broker.publish("late", f"{name}.in")

    app = FastAPI(lifespan=lifespan)
    if way == "attached":
        attach(app, broker)
    elif nested:
        outer = APIRouter()
        outer.include_router(router)
        app.include_router(outer)
    else:
        app.include_router(router)
    app.include_router(APIRouter())
    # The stream has to be there for a message to be stored before anybody reads it.
    async with NatsBroker(nats.url) as first:
        await first.js.add_stream(name=name, subjects=[f"{name}.in"])
    async with serving(app):
        await eventually(lambda: "handled early" in order)
        await broker.publish("now", f"{name}.in")
        await eventually(lambda: "handled now" in order)
    assert order == [
        "up connected",
        "started",
        "handled early",
        "handled now",
        "down connected",
    ]
    assert broker.state.value == "stopped"


async def test_a_lifespan_that_runs_the_routers_by_hand(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    async def handler(body: str) -> str:
        return body

    answers: list[bytes] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.lifespan_context(app):
            answers.append((await router.broker.request("now", subject)).body)
            yield
            answers.append((await router.broker.request("still", subject)).body)

    async with serving(FastAPI(lifespan=lifespan)):
        pass
    assert answers == [b"now", b"still"]


async def test_one_by_hand_inside_another(nats: Any) -> None:
    subject = unique()
    outer, router = NatsBroker(nats.url), NatsRouter(nats.url)
    hooks: list[str] = []
    router.after_startup(lambda app: hooks.append("up"))
    router.on_broker_shutdown(lambda app: hooks.append("down"))

    @router.subscriber(subject)
    async def handler(body: str) -> str:
        return body

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.lifespan_context(app):
            assert (await outer.request("now", subject)).body == b"now"
            yield

    app = FastAPI(lifespan=lifespan)
    attach(app, outer)
    async with serving(app):
        assert outer.state.value == router.broker.state.value == "running"
    assert outer.state.value == router.broker.state.value == "stopped"
    assert hooks == ["up", "down"]


async def test_the_routers_own_lifespan_and_hooks(nats: Any) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        order.append(f"router up {router.broker.state.value}")
        yield {"of": "router", "both": "router"}
        order.append("router down")

    @asynccontextmanager
    async def main(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        order.append("app up")
        yield {"both": "app"}
        order.append("app down")

    router = NatsRouter(nats.url, lifespan=lifespan)
    app = FastAPI(lifespan=main)
    app.include_router(router)
    async with serving(app):
        state = app.state.millstream.state
        assert {k: v for k, v in state.items() if k != "broker"} == {"of": "router", "both": "app"}
    assert order == ["app up", "router up connected", "router down", "app down"]


async def test_several_brokers_and_one_that_fails_to_start(nats: Any) -> None:
    good = NatsBroker(nats.url)
    bad = NatsBroker(f"nats://user:secret@127.0.0.1:{free_port()}", startup_timeout=0.2)
    app = FastAPI()
    attach(app, good, bad)
    with pytest.raises(RuntimeError, match="ConnectError") as error:
        async with serving(app):
            pass
    assert "secret" not in str(error.value)
    assert good.state.value == "stopped"
    assert bad.state.value == "failed"


async def test_start_up_code_that_fails(nats: Any) -> None:
    router = NatsRouter(nats.url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    with pytest.raises(RuntimeError, match="no database"):
        async with serving(app):
            pass
    assert router.broker.state.value == "stopped"


async def test_a_broker_that_somebody_else_runs(nats: Any) -> None:
    subject = unique()
    broker = NatsBroker(nats.url)

    @broker.subscriber(subject)
    async def handler(body: str) -> str:
        return body

    app = FastAPI()
    attach(app, broker)
    await broker.start()
    async with serving(app):
        assert (await broker.request("a", subject)).body == b"a"
    assert broker.state.value == "running"
    await broker.stop()


async def test_a_mounted_application(nats: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its lifespan never runs: said when it is known, on a request, and by what fails."""
    router = NatsRouter(nats.url)
    inner = FastAPI()
    outer = FastAPI()

    @router.get("/publish")
    async def publish() -> str:
        try:
            await router.broker.publish("x", "y")
        except NotConnected as error:
            return str(error)
        return "published"

    inner.include_router(router)
    outer.mount("/inner", inner)
    async with serving(outer) as client:
        text = (await client.get("/inner/publish")).json()
    assert "The lifespan of an application that is mounted into another one never runs" in text
    assert "attach(outer, broker)" in text
    assert caplog.text.count("was never started (asked for '/inner/publish')") == 1

    # What the text says works, and is then the only start.
    attach(outer, router.broker)
    async with serving(outer) as client:
        assert (await client.get("/inner/publish")).json() == "published"


async def test_a_mounted_application_next_to_a_started_one(
    nats: Any, caplog: pytest.LogCaptureFixture
) -> None:
    inner, outer = FastAPI(), FastAPI()
    inner.include_router(NatsRouter("nats://127.0.0.1:1"))
    outer.include_router(NatsRouter(nats.url))
    outer.mount("/deep", FastAPI(routes=[]))
    outer.mount("/inner", inner)
    async with serving(outer):
        assert "nats://127.0.0.1:1 was never started (mounted at '/inner')" in caplog.text


async def test_a_router_that_is_included_too_late(
    nats: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router, app = NatsRouter(nats.url), FastAPI()
    app.include_router(NatsRouter(nats.url))
    async with serving(app):
        app.include_router(router)
        assert "was included while the application runs, and is not started" in caplog.text
        async with router.broker:
            await router.broker.publish("x", unique())


async def test_a_handler_that_stops_the_application(
    nats: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a server that listens to signals, it stops the broker."""
    subject = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    async def handler(body: str) -> None:
        raise StopApplication

    app = FastAPI()
    app.include_router(router)
    async with serving(app):
        await router.broker.publish("x", subject)
        await eventually(lambda: router.broker.state.value == "stopped")


async def test_in_memory() -> None:
    """The test broker and the application in any order; no server anywhere."""
    router = NatsRouter("nats://127.0.0.1:1", startup_timeout=0.1)

    @router.subscriber("orders.{region}")
    async def handler(body: str, region: str) -> str:
        return body + region

    @router.post("/{region}")
    async def place(region: str) -> str:
        answer = await router.broker.request("to ", f"orders.{region}")
        return str(answer.body.decode())

    app = FastAPI()
    app.include_router(router)
    async with TestNatsBroker(router.broker):
        async with serving(app) as client:
            assert (await client.post("/eu")).json() == "to eu"
        handler.mock.assert_called_once_with("to ")


async def test_one_router_in_two_applications(nats: Any) -> None:
    """One after the other, as tests make them: each is the one that counts while it runs."""
    router = NatsRouter(nats.url)

    @router.subscriber(subject := unique())
    async def handler(body: str, app: FastAPI) -> str:
        return app.title

    for title in ("first", "second"):
        app = FastAPI(title=title)
        app.include_router(router)
        async with serving(app):
            assert (await router.broker.request("", subject)).body.decode() == title
    logging.getLogger(__name__).debug("done")
