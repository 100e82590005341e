"""Annotations kept as text, and handlers that are endpoints of other routers."""

from __future__ import annotations

from typing import Annotated, Any

import fastapi
import pytest
from fastapi import APIRouter, FastAPI, Request

from millstream import Context, Depends, Header, Logger, Path
from millstream.fastapi import attach
from millstream.nats import NatsBroker, NatsMessage
from millstream.nats.fastapi import NatsRouter
from tests.fastapi.serving import serving
from tests.helpers import unique


def limit(count: Annotated[int, Header("count")], request: Request) -> int:
    return count + len(request.headers.get("x-user", ""))


Limit = Annotated[int, fastapi.Depends(limit)]


async def endpoint(
    kind: Annotated[str, Path("kind")],
    count: Annotated[int, Header()],
    limit: Limit,
    logger: Logger,
    tag: str = Context("tag", default="none"),
) -> list[Any]:
    return [kind, count, limit, hasattr(logger, "info"), tag]


async def handler(body: str, message: NatsMessage, limit: Limit, logger: Logger) -> list[Any]:
    return [body, message.destination, limit, hasattr(logger, "info")]


async def both(value: Annotated[int, Depends(limit)], note: str = "none") -> list[Any]:
    return [value, note]


async def test_text_annotations(nats: Any) -> None:
    subject = unique()
    router, foreign = NatsRouter(nats.url), APIRouter(prefix="/foreign")
    router.get("/{kind}")(endpoint)
    foreign.get("/{kind}")(endpoint)
    router.subscriber(subject)(handler)
    app = FastAPI()
    app.include_router(foreign)
    app.include_router(router)
    router.broker.context.set_global("tag", "red")
    headers = {"count": "4", "x-user": "ann"}
    async with serving(app) as client:
        for path in ("/k", "/foreign/k"):
            answer = await client.get(path, headers=headers)
            assert answer.json() == ["k", 4, 7, True, "red"]
        reply = await router.broker.request("b", subject, headers=headers)
        assert await reply.decode() == ["b", subject, 7, True]


@pytest.mark.parametrize("first", ["endpoint", "handler"])
async def test_a_handler_as_an_endpoint_of_the_application(nats: Any, first: str) -> None:
    if first == "handler" and tuple(map(int, fastapi.__version__.split(".")[:2])) < (0, 124):
        pytest.skip("this FastAPI resolves annotations kept as text for plain functions only")
    subject = unique()
    broker = NatsBroker(nats.url)
    app = FastAPI()
    if first == "endpoint":
        broker.subscriber(subject)(app.get("/")(both))
    else:
        app.get("/")(broker.subscriber(subject)(both))
    attach(app, broker)
    headers = {"count": "1", "x-user": "ann"}
    async with serving(app) as client:
        answer = await client.get("/?note=http", headers=headers)
        assert answer.json() == [4, "http"]
        reply = await broker.request("nats", subject, headers=headers)
        assert await reply.decode() == [4, "nats"]


async def test_values_set_on_first_use(nats: Any) -> None:
    app = FastAPI()

    @app.get("/")
    async def page(seen: list[int] = Context("seen", initial=list)) -> int:
        seen.append(1)
        return len(seen)

    @app.get("/nothing")
    async def nothing(value: Annotated[int, Context("unknown")]) -> None: ...

    attach(app, NatsBroker(nats.url))
    async with serving(app) as client:
        assert [(await client.get("/")).json() for _ in range(2)] == [1, 2]
        try:
            await client.get("/nothing")
        except KeyError as error:
            assert str(error) == "'unknown' is not in the context (for 'unknown')"
        else:
            raise AssertionError("no error")
