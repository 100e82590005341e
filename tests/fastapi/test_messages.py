"""Handlers of messages that use what FastAPI gives: parameters, overrides, exceptions, state."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import fastapi
import pytest
from fastapi import (
    BackgroundTasks,
    Body,
    Cookie,
    FastAPI,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import APIKeyHeader, SecurityScopes
from pydantic import BaseModel

import millstream
from millstream import Context, ExceptionMiddleware, Logger
from millstream.errors import RemoteError, SignatureError
from millstream.nats import JStream, NatsMessage, PullSub
from millstream.nats.annotations import NatsMessage as MessageOf
from millstream.nats.fastapi import NatsRouter
from millstream.retry import Retry
from tests.fastapi.serving import serving
from tests.helpers import eventually, unique


class Order(BaseModel):
    id: int
    amount: float = 1.0


def application(router: NatsRouter, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.include_router(router)
    return app


async def ask(router: NatsRouter, subject: str, body: Any = "", **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await router.broker.request(body, subject, headers=named)
    return str(answer.body.decode())


async def test_parameters_of_fastapi(nats: Any) -> None:
    name = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(name + ".{region}")
    async def handler(
        order: Order,
        region: str,
        request: Request,
        response: Response,
        x_user: Annotated[str, fastapi.Header()],
        limit: Annotated[int, fastapi.Header(alias="limit")] = 5,
        session: str | None = Cookie(None),
        page: int = Query(1),
        area: str = fastapi.Path(alias="region"),
    ) -> dict[str, Any]:
        return {
            "order": order.id,
            "region": region,
            "area": area,
            "user": x_user,
            "limit": limit,
            "session": session,
            "page": page,
            "path": request.url.path,
            "app": request.app.title,
            "body": (await request.body()).decode(),
            "status": response.status_code,
        }

    async with serving(application(router, title="shop")):
        answer = await router.broker.request(
            b'{"id": 4}', f"{name}.eu", headers={"X-User": "ann", "Cookie": "session=s1"}
        )
    assert await answer.decode() == {
        "order": 4,
        "region": "eu",
        "area": "eu",
        "user": "ann",
        "limit": 5,
        "session": "s1",
        "page": 1,
        "path": f"/{name}.eu",
        "app": "shop",
        "body": '{"id": 4}',
        "status": None,
    }


async def test_a_body_that_fastapi_reads(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    async def handler(order: Annotated[Order, Body()], note: Annotated[str, Body()]) -> str:
        return f"{order.id} {note}"

    async with serving(application(router)):
        assert await ask(router, subject, {"order": {"id": 3}, "note": "n"}) == "3 n"
        with pytest.raises(RemoteError, match=r"DecodeError: .*order"):
            await ask(router, subject, {"note": "n"})


async def test_dependencies_of_both_worlds(nats: Any) -> None:
    """One tree with FastAPI's and our own markers, and one that the core runs by itself."""
    name = unique()
    router = NatsRouter(nats.url)
    order: list[str] = []

    def user(request: Request, logger: Logger, message: MessageOf) -> str:
        logger.debug("finding the user")
        return request.headers["x-user"] + message.headers["x-role"]

    async def resource(
        who: Annotated[str, fastapi.Depends(user)], limit: Annotated[int, Context("limit")]
    ) -> AsyncIterator[str]:
        order.append("open")
        yield f"{who}/{limit}"
        order.append("close")

    def plain(region: str) -> Iterator[str]:
        order.append("plain open")
        yield region.upper()
        order.append("plain close")

    @router.subscriber(name + ".{region}")
    async def handler(
        body: str,
        who: Annotated[str, millstream.Depends(resource)],
        where: Annotated[str, fastapi.Depends(plain)],
        message: MessageOf,
    ) -> str:
        order.append("handler")
        return f"{body} {who} {where} {message.destination == f'{name}.eu'}"

    router.broker.context.set_global("limit", 9)
    async with serving(application(router)):
        answer = await ask(router, f"{name}.eu", "b", x_user="ann", x_role="!")
    assert answer == "b ann!/9 EU True"
    assert sorted(order[:2]) == ["open", "plain open"]
    assert order[2] == "handler"
    assert sorted(order[3:]) == ["close", "plain close"]


async def test_security(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)
    key = APIKeyHeader(name="x-key")

    def check(scopes: SecurityScopes, given: Annotated[str, fastapi.Depends(key)]) -> str:
        if given != "good":
            raise HTTPException(403, "bad key")
        return f"{given}:{scopes.scope_str}"

    @router.subscriber(subject, dependencies=[fastapi.Depends(key)])
    async def handler(body: str, who: Annotated[str, Security(check, scopes=["read"])]) -> str:
        return who

    async with serving(application(router)):
        assert await ask(router, subject, "b", x_key="good") == "good:read"
        with pytest.raises(RemoteError, match="HTTPException: 403: bad key"):
            await ask(router, subject, "b", x_key="bad")


async def test_dependencies_of_the_subscription_alone(nats: Any) -> None:
    subject, seen = unique(), []
    router = NatsRouter(nats.url)

    def note(request: Request) -> None:
        seen.append(request.headers["x-user"])

    @router.subscriber(subject, dependencies=[fastapi.Depends(note)])
    async def handler(body: str) -> str:
        return body

    async with serving(application(router)):
        assert await ask(router, subject, "b", x_user="ann") == "b"
    assert seen == ["ann"]


async def test_background_tasks_run_after_settlement(nats: Any) -> None:
    stream, subject = unique("S"), unique()
    router = NatsRouter(nats.url)
    seen: list[tuple[str, Any]] = []

    @router.subscriber(subject, stream=JStream(stream), durable="d", pull_sub=PullSub())
    async def handler(body: str, tasks: BackgroundTasks, message: MessageOf) -> None:
        tasks.add_task(lambda: seen.append(("task", message.settled)))
        seen.append(("handler", message.settled))

    async with serving(application(router)):
        await router.broker.publish("a", subject)
        await eventually(lambda: len(seen) == 2)
    assert seen == [("handler", None), ("task", millstream.Settlement.ACK)]


async def test_a_background_task_that_fails_is_logged(
    nats: Any, caplog: pytest.LogCaptureFixture
) -> None:
    subject = unique()
    router = NatsRouter(nats.url)

    def fail() -> None:
        raise ValueError("too late")

    @router.subscriber(subject)
    async def handler(body: str, tasks: BackgroundTasks) -> str:
        tasks.add_task(fail)
        return "done"

    async with serving(application(router)):
        assert await ask(router, subject, "b") == "done"
        await eventually(lambda: "too late" in caplog.text)


async def test_lifespan_state_and_app_state(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        app.state.color = "red"
        yield {"pool": ["p"], "count": 1}

    @router.subscriber(subject)
    async def handler(body: str, request: Request) -> Any:
        request.state.count += 1  # of this message alone
        return [request.state.pool, request.state.count, request.app.state.color]

    async with serving(application(router, lifespan=lifespan)):
        for _ in range(2):
            assert await ask(router, subject) == '[["p"],2,"red"]'


async def test_dependency_overrides(nats: Any) -> None:
    """Of dependencies that the core runs and of those that FastAPI runs; while it runs, too."""
    name = unique()
    router = NatsRouter(nats.url)

    def plain() -> str:
        return "plain"

    def special(request: Request) -> str:
        return "special"

    @router.subscriber(f"{name}.a")
    async def native(body: str, value: Annotated[str, fastapi.Depends(plain)]) -> str:
        return value

    @router.subscriber(f"{name}.b")
    async def claimed(body: str, value: Annotated[str, fastapi.Depends(special)]) -> str:
        return value

    @router.get("/")
    async def page(value: Annotated[str, millstream.Depends(plain)]) -> str:
        return value

    def wanting(request: Request) -> str:
        return request.headers["x-user"]

    app = application(router)

    async def values(client: Any) -> list[str]:
        asked = [await ask(router, f"{name}.{s}", x_user="ann") for s in "ab"]
        return [*asked, (await client.get("/", headers={"x-user": "http"})).json()]

    async with serving(app) as client:
        assert await values(client) == ["plain", "special", "plain"]
        app.dependency_overrides[plain] = lambda: "other"
        app.dependency_overrides[special] = lambda: "another"
        assert await values(client) == ["other", "another", "other"]
        app.dependency_overrides = {plain: wanting}
        assert await values(client) == ["ann", "special", "http"]
        assert dict(router.broker.dependency_overrides) == {plain: wanting}
        del router.broker.dependency_overrides[plain]
        router.broker.dependency_overrides[special] = lambda: "third"
        assert await values(client) == ["plain", "third", "plain"]
        app.dependency_overrides = {}
        assert await values(client) == ["plain", "special", "plain"]


# Exceptions


class Refused(Exception):
    pass


class Broken(Exception):
    pass


async def test_exception_handlers_of_the_application(nats: Any) -> None:
    stream, name = unique("S"), unique()
    router = NatsRouter(nats.url)
    app = application(router)
    told: list[tuple[str, str, str]] = []
    published: list[Any] = []

    def note(request: Request, error: Exception) -> None:
        told.append((type(error).__name__, request.url.path, request.headers.get("x-user", "")))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        note(request, error)
        return JSONResponse({"refused": str(error)}, 409)

    @app.exception_handler(Broken)
    def broken(request: Request, error: Broken) -> PlainTextResponse:
        note(request, error)
        return PlainTextResponse("broken", 503)

    @app.exception_handler(404)
    async def missing(request: Request, error: HTTPException) -> PlainTextResponse:
        note(request, error)
        return PlainTextResponse("not here", 404)

    def user(request: Request) -> str:
        return request.headers["x-user"]

    @router.subscriber(f"{name}.native")
    @router.publisher(f"{name}.out")
    async def native(body: str) -> None:
        raise {"refused": Refused, "broken": Broken}.get(body, ValueError)(body)

    @router.subscriber(f"{name}.claimed")
    async def claimed(body: str, who: Annotated[str, fastapi.Depends(user)]) -> None:
        raise HTTPException(int(body))

    @router.subscriber(f"{name}.out")
    async def out(body: Any) -> None:
        published.append(body)

    @router.subscriber(
        f"{name}.stored", stream=JStream(stream), durable="d", retry=Retry(attempts=2, delay=0)
    )
    async def stored(body: str, message: MessageOf) -> None:
        attempts.append((body, message.delivery_count))
        raise {"refused": Refused, "broken": Broken}[body](body)

    attempts: list[tuple[str, int]] = []
    async with serving(app):
        assert await ask(router, f"{name}.native", "refused", x_user="u") == '{"refused":"refused"}'
        assert told.pop() == ("Refused", f"/{name}.native", "u")
        with pytest.raises(RemoteError, match="Broken: broken"):
            await ask(router, f"{name}.native", "broken")
        assert told.pop()[0] == "Broken"
        with pytest.raises(RemoteError, match="ValueError"):
            await ask(router, f"{name}.native", "other")
        assert told == []
        assert await ask(router, f"{name}.claimed", "404", x_user="u") == "not here"
        assert told.pop()[0] == "HTTPException"
        with pytest.raises(RemoteError, match="HTTPException: 403"):
            await ask(router, f"{name}.claimed", "403", x_user="u")
        assert told == []
        assert published == []
        # What is handled is acknowledged; what is not is tried again.
        await router.broker.publish("refused", f"{name}.stored")
        await router.broker.publish("broken", f"{name}.stored")
        await eventually(lambda: len(attempts) == 3)
        await eventually(lambda: [k for k, *_ in told] == ["Refused", "Broken", "Broken"])
    assert sorted(attempts) == [("broken", 1), ("broken", 2), ("refused", 1)]


async def test_a_message_that_cannot_be_read_is_told_and_dead_lettered(nats: Any) -> None:
    stream, name = unique("S"), unique()
    router = NatsRouter(nats.url)
    app = application(router)
    told: list[Any] = []
    dead: list[NatsMessage] = []

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        told.append(error.errors()[0])
        return JSONResponse({}, 422)

    options: Any = {"stream": JStream(stream), "dead_letter": f"{name}-dead"}

    @router.subscriber(f"{name}.native", durable="a", **options)
    async def native(order: Order) -> None: ...

    @router.subscriber(f"{name}.claimed", durable="b", **options)
    async def claimed(order: Annotated[Order, Body()]) -> None: ...

    @router.subscriber(f"{name}.header", durable="c", **options)
    async def header(body: str, x_count: Annotated[int, fastapi.Header()]) -> None: ...

    @router.subscriber(f"{name}-dead")
    async def bury(message: MessageOf) -> None:
        dead.append(message)

    @app.post("/")
    async def page(order: Order) -> None: ...

    async with serving(app) as client:
        for kind in ("native", "claimed", "header"):
            await router.broker.publish(b'{"id": "x"}', f"{name}.{kind}", headers={"x-count": "y"})
            await eventually(lambda: dead and told)
            letter, error = dead.pop(), told.pop()
            assert letter.headers["ms-error-type"] == "DecodeError"
            assert letter.headers["ms-attempts"] == "1"
            assert letter.body == b'{"id": "x"}'
            wanted = ("header", "x-count") if kind == "header" else ("body", "id")
            assert error["loc"] == wanted
        await client.post("/", json={"id": "x"})
        assert told.pop()["loc"] == ("body", "id")


async def test_exception_handlers_that_fail(nats: Any, caplog: pytest.LogCaptureFixture) -> None:
    subject = unique()
    router = NatsRouter(nats.url)
    app = application(router)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        raise KeyError("oops")

    @router.subscriber(subject)
    async def handler(body: str) -> None:
        raise Refused("no")

    async with serving(app):
        with pytest.raises(RemoteError, match="Refused: no"):
            await ask(router, subject)
    assert "the handler of Refused failed" in caplog.text


async def test_our_own_exceptions_and_middlewares_come_first(nats: Any) -> None:
    name = unique()
    own = ExceptionMiddleware(publish_handlers={Refused: lambda error: f"own {error}"})
    router = NatsRouter(nats.url, middlewares=[own])
    app = application(router)
    told: list[Exception] = []

    @app.exception_handler(Exception)
    async def anything(request: Request, error: Exception) -> JSONResponse:
        told.append(error)
        return JSONResponse({"handled": type(error).__name__}, 400)

    @router.subscriber(f"{name}.refuse")
    async def refuse(body: str) -> None:
        raise Refused("no")

    @router.subscriber(f"{name}.control")
    async def control(body: str) -> None:
        raise millstream.AckMessage

    @router.subscriber(f"{name}.any")
    async def anyhow(body: str) -> None:
        raise ZeroDivisionError

    async with serving(app):
        assert await ask(router, f"{name}.refuse") == "own no"
        await router.broker.publish("", f"{name}.control")
        assert await ask(router, f"{name}.any") == '{"handled":"ZeroDivisionError"}'
    assert [type(e) for e in told] == [ZeroDivisionError]


async def test_an_exception_handlers_background_task(nats: Any) -> None:
    from starlette.background import BackgroundTask

    subject, seen = unique(), []
    router = NatsRouter(nats.url)
    app = application(router)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({}, 200, background=BackgroundTask(seen.append, "task"))

    @router.subscriber(subject)
    async def handler(body: str) -> None:
        raise Refused

    async with serving(app):
        assert await ask(router, subject) == "{}"
        await eventually(lambda: seen == ["task"])


# The other engine


async def test_fastapi_fills_everything(nats: Any) -> None:
    name = unique()
    router = NatsRouter(nats.url, resolver="fastapi")

    def plain(x_user: Annotated[str, fastapi.Header()]) -> str:
        return x_user

    @router.subscriber(name + ".whole.{region}")
    async def whole(
        order: Order,
        region: str,
        logger: Logger,
        message: NatsMessage,
        who: Annotated[str, fastapi.Depends(plain)],
        limit: Annotated[int, Context()],
    ) -> str:
        return f"{order.id} {region} {message.destination == name + '.whole.eu'} {who} {limit}"

    @router.subscriber(f"{name}.fields")
    async def fields(id: int, amount: float = 2.0) -> str:
        return f"{id} {amount}"

    @router.subscriber(f"{name}.nothing")
    async def nothing() -> str:
        return "ok"

    router.broker.context.set_global("limit", 1)
    async with serving(application(router)):
        assert await ask(router, f"{name}.whole.eu", Order(id=2), x_user="u") == "2 eu True u 1"
        assert await ask(router, f"{name}.fields", {"id": 5}) == "5 2.0"
        assert await ask(router, f"{name}.nothing") == "ok"
        with pytest.raises(RemoteError, match="DecodeError"):
            await ask(router, f"{name}.fields", {"id": "x"})


async def test_what_fastapi_cannot_fill_is_said_at_start(nats: Any) -> None:
    router = NatsRouter(nats.url)

    def dependency(request: Request, message: NatsMessage) -> None: ...

    @router.subscriber("a")
    async def handler(body: str, value: Annotated[None, fastapi.Depends(dependency)]) -> None: ...

    with pytest.raises(RuntimeError, match="FastAPI cannot fill value") as error:
        async with serving(application(router)):
            pass
    assert SignatureError.code in str(error.value)
    assert "Context('message')" in str(error.value)
    assert "test_messages.py" in str(error.value)


async def test_a_handlers_own_validation_error_is_an_error_like_others(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)

    @router.subscriber(subject)
    async def handler(body: str, request: Request) -> None:
        raise RequestValidationError([])

    async with serving(application(router)):
        with pytest.raises(RemoteError, match="RequestValidationError"):
            await ask(router, subject)


async def test_concurrent_messages_do_not_mix(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url)
    gate = asyncio.Event()

    async def user(request: Request) -> str:
        await gate.wait()
        return request.headers["x-user"]

    @router.subscriber(subject, concurrency=8)
    async def handler(
        body: str, who: Annotated[str, fastapi.Depends(user)], tasks: BackgroundTasks
    ) -> str:
        tasks.add_task(logging.getLogger("x").debug, "done")
        return f"{body}{who}"

    async with serving(application(router)):
        asked = [
            asyncio.create_task(ask(router, subject, str(i), x_user=f"u{i}")) for i in range(8)
        ]
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*asked) == [f"{i}u{i}" for i in range(8)]
