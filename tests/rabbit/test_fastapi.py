"""RabbitMQ inside a FastAPI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from millstream.rabbit.fastapi import Depends, Logger, RabbitBroker, RabbitMessage, RabbitRouter
from tests.helpers import eventually, unique


async def test_messages_and_http_on_one_router(rabbit: Any) -> None:
    name = unique()
    router = RabbitRouter(rabbit.url, try_it=True)
    got: list[Any] = []

    def tenant() -> str:
        return "acme"

    @router.subscriber(name)
    @router.publisher(f"{name}-out")
    async def order(
        body: dict[str, int], message: RabbitMessage, logger: Logger, who: str = Depends(tenant)
    ) -> dict[str, int]:
        got.append((body, message.destination, who))
        return body

    @router.subscriber(f"{name}-out")
    async def out(body: dict[str, int]) -> None:
        got.append(body)

    @router.post("/orders")
    async def place(id: int, broker: RabbitBroker) -> None:
        await broker.publish({"id": id}, name)

    app = FastAPI()
    app.include_router(router)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        assert (await client.post("/orders", params={"id": 7})).status_code == 200
        await eventually(lambda: len(got) == 2)
        assert (await client.post(f"/messages/{name}", json={"id": 8})).status_code == 200
        await eventually(lambda: len(got) == 4)
    assert got == [({"id": 7}, name, "acme"), {"id": 7}, ({"id": 8}, name, "acme"), {"id": 8}]
