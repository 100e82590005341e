"""Kafka inside a FastAPI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from millstream.kafka import Topic
from millstream.kafka.fastapi import Depends, KafkaBroker, KafkaMessage, KafkaRouter, Logger
from tests.helpers import eventually, unique


async def test_messages_and_http_on_one_router(kafka: Any) -> None:
    name = unique()
    router = KafkaRouter(kafka.url, try_it=True)
    got: list[Any] = []

    def tenant() -> str:
        return "acme"

    @router.subscriber(Topic(name, 2), group_id=name)
    @router.publisher(f"{name}.out")
    async def order(
        body: dict[str, int], message: KafkaMessage, logger: Logger, who: str = Depends(tenant)
    ) -> dict[str, int]:
        got.append((body, message.destination, message.key, who))
        return body

    @router.subscriber(f"{name}.out", group_id=name)
    async def out(body: dict[str, int]) -> None:
        got.append(body)

    @router.post("/orders")
    async def place(id: int, broker: KafkaBroker) -> int:
        stored = await broker.publish({"id": id}, name, key=f"k{id}")
        return int(stored.offset)

    app = FastAPI()
    app.include_router(router)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        done = await client.post("/orders", params={"id": 7})
        assert (done.status_code, done.json()) == (200, 0)
        await eventually(lambda: len(got) == 2)
        assert (await client.post(f"/messages/{name}", json={"id": 8})).status_code == 200
        await eventually(lambda: len(got) == 4)
    assert got[:2] == [({"id": 7}, name, b"k7", "acme"), {"id": 7}]
    assert got[2:] == [({"id": 8}, name, None, "acme"), {"id": 8}]
