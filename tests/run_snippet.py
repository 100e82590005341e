"""Runs ``snippet_.py`` of the current folder, then uses what it declared (see test_docs.py)."""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from pathlib import Path
from typing import Any


def execute(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "snippet_", "__file__": "snippet_.py"}
    code = compile(source, "snippet_.py", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:

        async def run() -> None:
            result = eval(code, namespace)
            if inspect.isawaitable(result):
                await result

        asyncio.run(run())
        # It did by itself what there was to do.
        return {}
    exec(code, namespace)
    return namespace


def use(namespace: dict[str, Any]) -> None:
    from millstream import Millstream
    from millstream.broker import Broker

    for name, value in list(namespace.items()):
        if name.startswith("test_") and inspect.isfunction(value):
            result = value()
            if inspect.isawaitable(result):
                asyncio.run(wait(result))
    values = list({id(v): v for v in namespace.values()}.values())
    apps = [v for v in values if isinstance(v, Millstream)]
    owned = {id(b) for app in apps for b in app.brokers}
    brokers = [v for v in values if isinstance(v, Broker) and id(v) not in owned]
    for startable in (*apps, *brokers):
        asyncio.run(up_and_down(startable))
    if "fastapi" in sys.modules:
        from fastapi import FastAPI

        for app in values:
            if isinstance(app, FastAPI):
                asyncio.run(lifespan(app))


async def wait(result: Any) -> None:
    await result


async def lifespan(app: Any) -> None:
    async with app.router.lifespan_context(app):
        pass


async def up_and_down(startable: Any) -> None:
    await startable.start()
    await startable.stop()


def point_default_at(url: str) -> None:
    """``NatsBroker()`` without an address means the test's server here."""
    from millstream.nats import NatsBroker

    init = NatsBroker.__init__
    assert init.__defaults__ == ("nats://localhost:4222",)
    init.__defaults__ = (url,)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    point_default_at(sys.argv[1])
    use(execute(Path("snippet_.py").read_text()))
