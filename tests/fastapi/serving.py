"""Runs an application in the test's own process, through the ASGI protocol, as a server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Start the application's lifespan, give a client of it, and end the lifespan.

    Raises:
        RuntimeError: the application refused to start or stop; the text is what it said.
    """
    state: dict[str, Any] = {}
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}

    async def run() -> None:
        try:
            await app(scope, told.get, said.put)
        except BaseException as error:
            await said.put({"type": "raised", "message": repr(error)})

    async def step(name: str) -> None:
        await told.put({"type": f"lifespan.{name}"})
        answer = await said.get()
        if answer["type"] != f"lifespan.{name}.complete":
            raise RuntimeError(answer.get("message", answer["type"]))

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    task = asyncio.create_task(run())
    try:
        await step("startup")
        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
        await step("shutdown")
    finally:
        task.cancel()
        await asyncio.wait([task])
