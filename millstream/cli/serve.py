"""Serves an ASGI application by uvicorn in this process: our logging, signals and exit codes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from ..broker import Broker, State
from ..errors import StateError
from .child import Channel, Hello
from .options import RunOptions, split_known
from .sockets import Doorman, url_of
from .target import Target, TargetError

log = logging.getLogger("millstream.run")

_OWN = ("host", "port", "uds", "worker_id")


async def serve(
    target: Target,
    brokers: Sequence[Broker],
    options: RunOptions,
    channel: Channel | None,
    hello: Hello,
) -> bool:
    """Serve until a signal; False if that was not a clean end.

    Raises:
        TargetError: an option that neither uvicorn nor the application knows.
        BindError: the address cannot be listened on.
        StateError: a broker was lost for good.
        Exception: what the start of the application raised.
    """
    settings = _settings(target, options)
    # Requests are finished first, then messages: a request may wait for one of our handlers.
    hello.grace += settings.setdefault("timeout_graceful_shutdown", int(hello.grace) + 1) or 0.0
    door = Doorman(options)
    if channel is not None:
        sock = channel.hello(hello)
        channel.watch()
    else:
        sock = await door.welcome(hello)
    assert sock is not None
    url = url_of(sock, "https" if settings.get("ssl_certfile") else "http")
    lifespan = _Lifespan(target.object)
    config = uvicorn.Config(lifespan, log_config=None, interface="asgi3", **settings)

    def stop() -> None:
        server.lost = [b.driver.describe() for b in brokers if b.state is State.FAILED]
        server.should_exit = True

    def up() -> None:
        for broker in brokers:
            broker.on_stop_application = stop
        if channel is not None:
            channel.ready()
        else:
            log.info("%s on %s", target.title, url)

    server = _Server(config, brokers, up)
    try:
        await server.serve(sockets=[sock])
    except SystemExit as ended:  # uvicorn's way to say that the start failed
        if lifespan.error is None:
            return not ended.code
    finally:
        sock.close()
        door.close()
    if lifespan.error is not None:
        raise lifespan.error
    if server.lost:
        raise StateError(f"lost for good: {', '.join(server.lost)}", state="failed")
    return server.started


def _settings(target: Target, options: RunOptions) -> dict[str, Any]:
    """The extra options that are uvicorn's; the others go to the application's start."""
    given = {k: v for k, v in options.startup().items() if k not in _OWN}
    settings, others = split_known(given, uvicorn.Config)
    start = getattr(target.object, "startup_options", None)
    if isinstance(start, dict):
        start |= others | {"worker_id": options.worker_id}
    elif others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise TargetError(f"neither uvicorn nor {target.title} knows {names}")
    return settings


class _Server(uvicorn.Server):
    """Stops on the first signal, hurries on the second and gives up on the third, whichever
    they are; uvicorn knows SIGINT only, and waits for the end of a start."""

    def __init__(
        self, config: uvicorn.Config, brokers: Sequence[Broker], up: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._brokers, self._up = brokers, up
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        #: Brokers that were lost for good.
        self.lost: list[str] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the lifespan open then; messages are handed back
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.force_exit or not self.started:
            assert self._task is not None
            self._loop.call_soon_threadsafe(self._task.cancel)
        elif self.should_exit:
            self.force_exit = True
            for broker in self._brokers:
                self._loop.call_soon_threadsafe(broker.hurry)
        self.should_exit = True


class _Lifespan:
    """The application, with a short message in place of a traceback where its start fails.

    Frameworks put the whole traceback into ``lifespan.startup.failed`` and then raise the
    error itself: what the user needs is the error.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.error: BaseException | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        failed: dict[str, Any] = {}

        async def hold(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.failed":
                failed.update(message)
            else:
                await send(message)

        try:
            await self.app(scope, receive, hold)
        except Exception as error:
            if not failed:
                raise  # the application knows no lifespan, or its end failed
            self.error = error
            failed["message"] = ""
        if failed:
            await send(failed)
