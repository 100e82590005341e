"""A router with a broker: declarations, inclusion, and one function in several roles."""

import asyncio
import logging
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from millstream import AckPolicy, Context, Depends, Header, Logger, Path, SetupError
from millstream.fastapi import attach
from millstream.nats import NatsBroker
from millstream.nats import NatsRouter as CoreRouter
from millstream.nats.annotations import NatsBroker as BrokerOf
from millstream.nats.annotations import NatsMessage as MessageOf
from millstream.nats.fastapi import NatsRouter
from tests.fastapi.serving import serving
from tests.helpers import eventually, unique


class Order(BaseModel):
    id: int
    amount: float = 1.0


async def test_the_story(nats: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The application of the documentation: a subscriber, a publisher and an endpoint."""
    name = unique()
    router = NatsRouter(nats.url)
    invoices: list[dict[str, Any]] = []

    @router.subscriber(name + ".orders.{region}")
    @router.publisher(f"{name}.invoices")
    async def invoice(order: Order, region: str, logger: Logger) -> dict[str, Any]:
        logger.info("order %s from %s", order.id, region)
        return {"order": order.id, "total": order.amount * 1.2}

    @router.subscriber(f"{name}.invoices")
    async def done(body: dict[str, Any]) -> None:
        invoices.append(body)

    @router.post("/orders/{region}")
    async def place(region: str, order: Order, logger: Logger) -> dict[str, Any]:
        logger.info("accepted")
        await router.broker.publish(order, f"{name}.orders.{region}")
        return {"accepted": order.id}

    app = FastAPI(lifespan=router.lifespan_context)
    app.include_router(router)
    with caplog.at_level(logging.INFO, "millstream"):
        async with serving(app) as client:
            answer = await client.post("/orders/eu", json={"id": 7, "amount": 10})
            assert answer.json() == {"accepted": 7}
            await eventually(lambda: invoices)
    assert invoices == [{"order": 7, "total": 12.0}]
    assert "order 7 from eu" in caplog.text
    assert "accepted" in caplog.text


@pytest.mark.parametrize("way", ["included", "lifespan only", "both", "attached", "broker"])
async def test_every_way_in_handles_each_message_once(nats: Any, way: str) -> None:
    subject, got = unique(), []
    broker = NatsBroker(nats.url)
    router = NatsRouter(broker=broker) if way == "broker" else NatsRouter(nats.url)
    declare = broker if way == "attached" else router

    @declare.subscriber(subject)
    async def take(body: str) -> str:
        got.append(body)
        return body

    app = (
        FastAPI(lifespan=router.lifespan_context) if way in ("lifespan only", "both") else FastAPI()
    )
    if way in ("included", "both", "broker"):
        app.include_router(router)
    if way == "attached":
        attach(app, broker)
    async with serving(app):
        own: NatsBroker = app.state.broker
        assert app.state.millstream.brokers == [own]
        await own.publish("once", subject)
        await eventually(lambda: got)
        await own.request("twice", subject)  # answered after whatever came before it
    assert got == ["once", "twice"]


async def test_a_second_start_of_the_same_application(nats: Any) -> None:
    subject, got = unique(), []
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    async def take(body: str) -> str:
        got.append(body)
        return body

    app = FastAPI()
    app.include_router(router)
    for turn in ("first", "second"):
        async with serving(app):
            answer = await router.broker.request(turn, subject)
            assert answer.body == turn.encode()
    assert got == ["first", "second"]


async def test_routers_of_all_kinds_in_any_order(nats: Any) -> None:
    """Nested, prefixed, plain, and with subscribers declared after they were included."""
    name = unique()
    got: list[str] = []
    app = FastAPI()
    outer = APIRouter(prefix="/api")
    main = NatsRouter(nats.url, prefix="/main")
    other = NatsRouter(nats.url)
    shared = NatsRouter(prefix="/shared")
    core = CoreRouter(f"{name}.core.")
    late = CoreRouter()

    @main.get("/hello")
    async def hello(broker: BrokerOf) -> str:
        return "main" if broker is main.broker else "wrong broker"

    @shared.get("/hello")
    async def hello_shared(broker: BrokerOf) -> str:
        return "shared" if broker is main.broker else "wrong broker"

    @other.get("/hello")
    async def hello_other(broker: BrokerOf) -> str:
        return "other" if broker is other.broker else "wrong broker"

    main.include_router(shared)
    main.include_router(core)
    core.include_router(late, prefix="late.")
    outer.include_router(main)
    app.include_router(outer)
    app.include_router(other)
    app.include_router(other, prefix="/again")
    app.include_router(APIRouter())

    def collect(owner: Any, subject: str, kind: str) -> None:
        @owner.subscriber(subject)
        async def take(body: str) -> str:
            got.append(kind)
            return kind

    collect(main, f"{name}.main", "main")
    collect(other, f"{name}.other", "other")
    collect(shared, f"{name}.shared", "shared")
    collect(core, "x", "core")
    collect(late, "x", "late")

    async with serving(app) as client:
        assert shared.broker is main.broker
        assert app.state.millstream.brokers == [main.broker, other.broker]
        for subject in ("main", "other", "shared", "core.x", "core.late.x"):
            await main.broker.request("hi", f"{name}.{subject}")
        assert (await client.get("/api/main/hello")).json() == "main"
        assert (await client.get("/api/main/shared/hello")).json() == "shared"
        assert (await client.get("/hello")).json() == "other"
        assert (await client.get("/again/hello")).json() == "other"
    assert got == ["main", "other", "shared", "core", "late"]


async def test_a_subscriber_that_starts_while_the_application_runs(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)
    app = FastAPI()
    app.include_router(router)
    async with serving(app):
        late = router.subscriber(subject)

        @late
        async def take(body: str) -> str:
            return body.upper()

        await late.start()
        assert (await router.broker.request("late", subject)).body == b"LATE"


async def test_one_function_in_three_roles(nats: Any) -> None:
    name, out = unique(), []
    router = NatsRouter(nats.url)

    @router.post("/double/{factor}")
    @router.subscriber(name + ".double.{factor}")
    @router.publisher(f"{name}.doubled")
    async def double(
        order: Order, factor: int, logger: Logger, note: Annotated[str, Header("x-note")] = "none"
    ) -> dict[str, Any]:
        """Multiply."""
        logger.debug("doubling")
        return {"id": order.id, "amount": order.amount * factor, "note": note}

    @router.subscriber(f"{name}.doubled")
    async def take(body: dict[str, Any]) -> None:
        out.append(body)

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        answer = await client.post(
            "/double/3", json={"id": 1, "amount": 2}, headers={"x-note": "http"}
        )
        assert answer.json() == {"id": 1, "amount": 6.0, "note": "http"}
        assert out == []
        await router.broker.publish(
            Order(id=2, amount=5), f"{name}.double.2", headers={"x-note": "nats"}
        )
        await eventually(lambda: out)
        # The same function is still a function.
        direct = await double(Order(id=3, amount=1), 4, logging.getLogger("x"), "none")
        assert direct["amount"] == 4
    assert out == [{"id": 2, "amount": 10.0, "note": "nats"}]


async def test_markers_mean_the_same_in_handlers_and_endpoints(nats: Any) -> None:
    name = unique()
    router = NatsRouter(nats.url)
    elsewhere = APIRouter()
    seen: list[tuple[str, Any]] = []

    def tenant(
        user: Annotated[str, Header("x-user")], limit: Annotated[int, Context("limit")]
    ) -> str:
        return f"{user}/{limit}"

    @router.subscriber(name + ".{kind}")
    async def handler(
        body: str,
        kind: Annotated[str, Path()],
        who: Annotated[str, Depends(tenant)],
        broker: BrokerOf,
        message: MessageOf,
        logger: Logger,
        limit: Annotated[int, Context()],
    ) -> str:
        seen.append(("handler", (kind, who, broker is router.broker, limit)))
        return message.destination

    @router.get("/own/{kind}")
    async def own(
        kind: Annotated[str, Path()],
        who: Annotated[str, Depends(tenant)],
        broker: BrokerOf,
        logger: Logger,
        limit: Annotated[int, Context()],
        message: Annotated[Any, Context("message", default=None)],
    ) -> None:
        seen.append(("own", (kind, who, broker is router.broker, limit)))
        assert message is None

    @elsewhere.get("/elsewhere/{kind}")
    async def foreign(
        kind: Annotated[str, Path("kind")],
        who: Annotated[str, Depends(tenant)],
        broker: BrokerOf,
        logger: Logger,
        limit: Annotated[int, Context()],
    ) -> None:
        seen.append(("foreign", (kind, who, broker is router.broker, limit)))

    app = FastAPI()
    app.include_router(elsewhere)
    app.include_router(router)
    router.broker.context.set_global("limit", 3)
    headers = {"x-user": "ann"}
    async with serving(app) as client:
        answer = await router.broker.request("b", f"{name}.k", headers=headers)
        assert answer.body.decode() == f"{name}.k"
        assert (await client.get("/own/k", headers=headers)).status_code == 200
        assert (await client.get("/elsewhere/k", headers=headers)).status_code == 200
        assert (await client.get("/own/k")).status_code == 422
        missing = await client.get("/elsewhere/k")
        assert missing.status_code == 422
        assert missing.json()["detail"][0]["loc"] == ["header", "x-user"]
    assert seen == [(kind, ("k", "ann/3", True, 3)) for kind in ("handler", "own", "foreign")]


async def test_values_are_converted_in_foreign_endpoints_too(nats: Any) -> None:
    app = FastAPI()

    @app.get("/")
    async def page(
        count: Annotated[int, Header("count")], wide: bool = Header("wide", default=False)
    ) -> Any:
        return [count, wide]

    attach(app, NatsBroker(nats.url))
    async with serving(app) as client:
        assert (await client.get("/", headers={"count": "4", "wide": "true"})).json() == [4, True]
        assert (await client.get("/", headers={"count": "4"})).json() == [4, False]
        answer = await client.get("/", headers={"count": "four"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["header", "count"]


class _Loud:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, *args: Any) -> None:
        self.lines.append(text % args)

    debug = warning = error = exception = critical = info


async def test_a_logger_of_ones_own_is_the_logger_everywhere(nats: Any) -> None:
    own, subject = _Loud(), unique()
    router = NatsRouter(nats.url, logger=own)
    elsewhere = APIRouter()

    @router.subscriber(subject)
    async def handler(body: str, logger: Logger) -> str:
        logger.info("message %s", body)
        return "ok"

    @router.get("/own")
    async def endpoint(logger: Logger) -> None:
        logger.info("own")

    @elsewhere.get("/foreign")
    async def foreign(logger: Logger) -> None:
        logger.info("foreign")

    app = FastAPI()
    app.include_router(router)
    app.include_router(elsewhere)
    async with serving(app) as client:
        await router.broker.request("m", subject)
        await client.get("/own")
        await client.get("/foreign")
    assert [line for line in own.lines if "finished" not in line][-3:] == [
        "message m",
        "own",
        "foreign",
    ]


async def test_the_logger_of_an_application_without_a_broker() -> None:
    app = FastAPI()

    @app.get("/")
    async def page(logger: Logger) -> str:
        return logger.name  # type: ignore[attr-defined, no-any-return]

    async with serving(app) as client:
        assert (await client.get("/")).json() == "millstream"


async def test_router_state_and_hooks(nats: Any) -> None:
    router = NatsRouter(nats.url)
    order: list[str] = []

    @router.after_startup
    async def up(app: FastAPI) -> dict[str, Any]:
        order.append(f"up {router.broker.state.value}")
        return {"cache": {"a": 1}}

    @router.on_broker_shutdown
    def down(app: FastAPI) -> None:
        order.append(f"down {router.broker.state.value}")

    @router.get("/")
    async def page(request: Request) -> Any:
        return [request.state.broker is router.broker, request.state.cache]

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        assert (await client.get("/")).json() == [True, {"a": 1}]
    assert order == ["up running", "down running"]


async def test_setup_state_can_be_left_out(nats: Any) -> None:
    router = NatsRouter(nats.url, setup_state=False)

    @router.get("/")
    async def page(request: Request) -> bool:
        return hasattr(request.state, "broker")

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        assert (await client.get("/")).json() is False


def test_a_broker_and_arguments_for_one() -> None:
    with pytest.raises(SetupError, match=r"NatsRouter\(broker=\.\.\.\) with 'nats://x', name"):
        NatsRouter("nats://x", broker=NatsBroker(), name="n")
    with pytest.raises(SetupError, match="resolver='x'"):
        NatsRouter(resolver="x")  # type: ignore[arg-type]


def test_attach_says_what_it_takes() -> None:
    with pytest.raises(SetupError, match="no FastAPI or Starlette application"):
        attach(object(), NatsBroker())
    with pytest.raises(SetupError, match="is not a broker"):
        attach(FastAPI(), "nats://x")  # type: ignore[arg-type]


async def test_starlette_applications(nats: Any) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    subject = unique()
    broker, second = NatsBroker(nats.url), NatsBroker(nats.url)

    @broker.subscriber(subject)
    async def take(body: str) -> str:
        return body.upper()

    async def page(request: Any) -> PlainTextResponse:
        answer = await request.app.state.broker.request("hi", subject)
        return PlainTextResponse(answer.body.decode())

    app = Starlette(routes=[Route("/", page)])
    attach(app, broker)
    attach(app, second, broker)
    assert app.state.millstream.brokers == [broker, second]
    async with serving(app) as client:
        assert (await client.get("/")).text == "HI"


async def test_wrong_markers_of_endpoints_are_found_at_start(nats: Any) -> None:
    router = NatsRouter(nats.url)
    shared = Context()

    @router.get("/message")
    async def first(message: MessageOf) -> None: ...

    app = FastAPI()
    app.include_router(router)

    @app.get("/nameless")
    async def second(one: Annotated[int, shared], two: Annotated[int, shared]) -> None: ...

    with pytest.raises(RuntimeError, match="MS130") as error:
        async with serving(app):
            pass
    text = str(error.value)
    assert "'message' of the HTTP endpoint '/message': an HTTP request has no message" in text
    assert "Context('message', default=None)" in text
    assert "'two' of the HTTP endpoint '/nameless'" in text
    assert "give the marker a name" in text
    assert "test_router.py" in text


async def test_wrong_handlers_stop_the_start(nats: Any) -> None:
    router = NatsRouter(nats.url)

    @router.subscriber("a", ack_policy=AckPolicy.ACK)
    async def first(body: str) -> None: ...

    @router.subscriber("b")
    async def second(one: bytes, two: bytes) -> None: ...

    app = FastAPI()
    app.include_router(router)
    with pytest.raises(RuntimeError, match="2 declarations are wrong"):
        async with serving(app):
            pass


async def test_an_endpoint_without_a_pause_in_between(nats: Any) -> None:
    """Sync endpoints and sync handlers work as FastAPI's and Millstream's own do."""
    subject = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    def handler(body: str, logger: Logger) -> str:
        return body + "!"

    @router.get("/")
    def endpoint(logger: Logger, broker: BrokerOf) -> str:
        return type(broker).__name__

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        assert (await router.broker.request("a", subject)).body == b"a!"
        assert (await client.get("/")).json() == "NatsBroker"
        await asyncio.sleep(0)
