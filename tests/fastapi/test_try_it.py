"""Subscriptions as operations of the OpenAPI document: /docs can publish."""

from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from millstream.fastapi import attach
from millstream.nats import JStream, KvWatch, NatsBroker, PullSub
from millstream.nats.fastapi import NatsRouter
from tests.fastapi.serving import serving
from tests.helpers import eventually, unique


class Order(BaseModel):
    id: int
    amount: float = 1.0


class Item(msgspec.Struct):
    name: str
    parent: "Item | None" = None


class Cart(msgspec.Struct):
    items: list[Item]


async def test_posting_publishes(nats: Any) -> None:
    name, got = unique(), []
    router = NatsRouter(nats.url, try_it=True)

    @router.subscriber(name + ".orders.{region}")
    async def take(order: Order, region: str) -> dict[str, Any]:
        """Take an order."""
        got.append((order, region))
        return {"taken": order.id}

    app = FastAPI()
    app.include_router(router)
    path = f"/messages/{name}.orders"
    async with serving(app) as client:
        document = (await client.get("/openapi.json")).json()
        operation = document["paths"][path + ".{region}"]["post"]
        assert operation["tags"] == ["messages"]
        assert operation["summary"] == name + ".orders.{region} → take"
        assert operation["description"] == "Take an order."
        assert operation["requestBody"]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/Order"
        }
        assert [p["name"] for p in operation["parameters"]] == ["region", "reply"]

        answer = await client.post(path + ".eu", json={"id": 3})
        assert answer.json() == {"published": f"{name}.orders.eu", "receipt": None}
        await eventually(lambda: got)
        assert got == [(Order(id=3), "eu")]

        answer = await client.post(path + ".eu?reply=true", json={"id": 4})
        assert answer.json() == {"published": f"{name}.orders.eu", "reply": {"taken": 4}}

        answer = await client.post(path + ".eu", json={"id": "x"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "id"]
        assert len(got) == 2


async def test_all_kinds_of_bodies(nats: Any) -> None:
    name, got = unique(), []
    broker = NatsBroker(nats.url)

    @broker.subscriber(f"{name}.struct")
    async def struct(cart: Cart) -> int:
        return len(cart.items)

    @broker.subscriber(f"{name}.fields")
    async def fields(id: int, order: Order, note: str = "none") -> str:
        return f"{id} {order.id} {note}"

    @broker.subscriber(f"{name}.mixed")
    async def mixed(id: int, item: Item) -> str:
        return f"{id} {item.name}"

    @broker.subscriber(f"{name}.any")
    async def anything(body) -> Any:  # type: ignore[no-untyped-def]
        return body

    @broker.subscriber(f"{name}.nothing")
    async def nothing() -> str:
        return "nothing"

    @broker.subscriber(f"{name}.text")
    async def text(body: str) -> str:
        return body.upper()

    @broker.subscriber(
        f"{name}.batch",
        stream=JStream(name),
        durable="d",
        pull_sub=PullSub(5, timeout=0.1, batch=True),
    )
    async def batch(orders: list[Order]) -> None:
        got.extend(orders)

    app = FastAPI()
    attach(app, broker, try_it=True)

    async with serving(app) as client:

        async def post(path: str, body: Any = None) -> Any:
            answer = await client.post(f"/messages/{name}.{path}?reply=true", json=body)
            return answer.json().get("reply", answer)

        assert await post("struct", {"items": [{"name": "a"}, {"name": "b"}]}) == 2
        wrong = await post("struct", {"items": [{"name": 1}]})
        assert wrong.status_code == 422
        assert wrong.json()["detail"][0]["loc"] == ["body", "items", 0, "name"]
        assert await post("fields", {"id": 1, "order": {"id": 2}}) == "1 2 none"
        assert (await post("fields", {"id": 1})).status_code == 422
        assert await post("mixed", {"id": 1, "item": {"name": "a"}}) == "1 a"
        assert await post("any", {"free": [1]}) == {"free": [1]}
        assert await post("nothing") == "nothing"
        assert await post("text", "abc") == "ABC"

        answer = await client.post(f"/messages/{name}.batch", json={"id": 5})
        assert answer.json()["receipt"]["seq"] == 1
        await eventually(lambda: got == [Order(id=5)])

        document = (await client.get("/openapi.json")).json()
        body = document["paths"][f"/messages/{name}.struct"]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        assert schema["properties"]["items"]["items"]["properties"]["name"] == {"type": "string"}


async def test_wildcards_need_an_address(nats: Any) -> None:
    name = unique()
    router = NatsRouter(nats.url, try_it=True)

    @router.subscriber(name + ".*.{kind}")
    async def take(body: str, kind: str) -> str:
        return kind

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        path = f"/messages/{name}.*.{{kind}}?reply=true"
        (known,) = [
            p for p in (await client.get("/openapi.json")).json()["paths"] if "messages" in p
        ]
        assert known == f"/messages/{name}.*.{{kind}}"
        path = f"/messages/{name}.*.x?reply=true"
        answer = await client.post(f"{path}&destination={name}.a.b", json="x")
        assert answer.json()["reply"] == "b"
        answer = await client.post(f"{path}&destination=other.a", json="x")
        assert answer.status_code == 422
        assert (await client.post(path, json="x")).status_code == 422


async def test_what_the_broker_says_no_to(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url, try_it=True, request_timeout=0.5)

    @router.subscriber(subject)
    async def take(body: str) -> None:
        raise ValueError("no")

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        answer = await client.post(f"/messages/{subject}?reply=true", json="x")
        assert answer.status_code == 502
        assert answer.json() == {"detail": "RemoteError: ValueError: no"}


async def test_late_subscribers_show_up(nats: Any) -> None:
    name = unique()
    router = NatsRouter(nats.url, try_it=True)

    @router.subscriber(f"{name}.first")
    async def first(body: str) -> str:
        return "first"

    app = FastAPI()
    app.include_router(router)

    async with serving(app) as client:

        async def paths() -> list[str]:
            document = (await client.get("/openapi.json")).json()
            return [p for p in document["paths"] if p.startswith("/messages/")]

        assert await paths() == [f"/messages/{name}.first"]
        late = router.subscriber(f"{name}.late")

        @late
        async def second(body: str) -> str:
            return "late"

        await late.start()
        assert await paths() == [f"/messages/{name}.first", f"/messages/{name}.late"]
        answer = await client.post(f"/messages/{name}.late?reply=true", json="x")
        assert answer.json()["reply"] == "late"


async def test_a_second_run_adds_nothing_twice(nats: Any) -> None:
    subject = unique()
    router = NatsRouter(nats.url, try_it=True)

    @router.subscriber(subject)
    async def take(body: str) -> str:
        return body

    app = FastAPI()
    app.include_router(router)
    for _ in range(2):
        async with serving(app) as client:
            document = (await client.get("/openapi.json")).json()
            assert [p for p in document["paths"] if "messages" in p] == [f"/messages/{subject}"]
            answer = await client.post(f"/messages/{subject}?reply=true", json="x")
            assert answer.json()["reply"] == "x"


@pytest.mark.parametrize(
    ("variable", "option", "shown"),
    [("", None, False), ("1", None, True), ("1", False, False), ("", True, True)],
)
async def test_on_in_development_only(
    nats: Any, monkeypatch: pytest.MonkeyPatch, variable: str, option: bool | None, shown: bool
) -> None:
    monkeypatch.setenv("MILLSTREAM_DEV", variable)
    router = NatsRouter(nats.url, try_it=option)

    @router.subscriber(unique())
    async def take(body: str) -> None: ...

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        document = (await client.get("/openapi.json")).json()
    assert any("messages" in path for path in document["paths"]) is shown


async def test_what_cannot_be_published_to_is_not_offered(nats: Any) -> None:
    router = NatsRouter(nats.url, try_it=True)

    @router.subscriber("*", kv_watch=KvWatch(unique()))
    async def changed(body: bytes) -> None: ...

    @router.subscriber(unique(), include_in_schema=False)
    async def hidden(body: bytes) -> None: ...

    app = FastAPI()
    app.include_router(router)
    async with serving(app) as client:
        document = (await client.get("/openapi.json")).json()
    assert document["paths"] == {}
