"""MQTT inside a FastAPI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from millstream.mqtt.fastapi import Depends, Logger, MqttBroker, MqttMessage, MqttRouter
from tests.helpers import eventually


async def test_messages_and_http_on_one_router(mqtt: Any, name: str) -> None:
    router = MqttRouter(mqtt.url, try_it=True)
    got: list[Any] = []

    def tenant() -> str:
        return "acme"

    @router.subscriber(f"{name}/{{region}}")
    @router.publisher(f"{name}-out")
    async def order(
        body: dict[str, int],
        region: str,
        message: MqttMessage,
        logger: Logger,
        who: str = Depends(tenant),
    ) -> dict[str, int]:
        got.append((body, region, message.qos, who))
        return body

    @router.subscriber(f"{name}-out", qos=0)
    async def out(body: dict[str, int]) -> None:
        got.append(body)

    @router.post("/orders")
    async def place(id: int, broker: MqttBroker) -> None:
        await broker.publish({"id": id}, f"{name}/eu")

    app = FastAPI()
    app.include_router(router)
    transport = ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        assert (await client.post("/orders", params={"id": 7})).status_code == 200
        await eventually(lambda: len(got) == 2)
        sent = await client.post(f"/messages/{name}-out", json={"id": 8})
        assert sent.status_code == 200, sent.text
        await eventually(lambda: len(got) == 3)
    assert got == [({"id": 7}, "eu", 1, "acme"), {"id": 7}, {"id": 8}]
