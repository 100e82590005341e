"""Runs a target in this process: a plain application on a loop of its own, HTTP by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from .. import logging as setup
from ..broker import Broker
from ..errors import ConnectError, MillstreamError, SetupError
from .child import Answer, Channel, Hello
from .options import RunOptions, split_known
from .output import fail
from .sockets import BindError, listen, url_of
from .target import Target, TargetError, UserCodeError, brokers_of, find, own_traceback

log = logging.getLogger("millstream.run")
#: Exit codes.
OK, FAILED, USAGE = 0, 1, 2


def execute(options: RunOptions, channel: Channel | None = None) -> int:
    """Run the target until it ends; returns the exit code.

    Args:
        options: what the command line said.
        channel: the way to the supervisor, in a process that it started.
    """
    try:
        found = find(options.target, app_dir=options.app_dir, factory=options.factory)
        with asyncio.Runner(loop_factory=loop_factory(options.loop)) as runner:
            return runner.run(_run(found.build, options, channel))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:  # stopped by a signal before it was up
        return OK
    except TargetError as error:
        return fail(error, USAGE)
    except UserCodeError as error:
        return fail(f"{options.target} failed\n{error}")
    except (SetupError, ConnectError, BindError) as error:
        return fail(error)
    except Exception as error:
        return fail(f"{options.target} failed\n{own_traceback(error)}")


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The maker of event loops: ``auto`` takes uvloop where it is installed.

    Raises:
        TargetError: uvloop is asked for and not installed.
    """
    if name == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        if name == "auto":
            return None
        raise TargetError("--loop uvloop: not installed; pip install uvloop") from None
    return uvloop.new_event_loop


def configure_logging(options: RunOptions) -> None:
    """Logging as the command line asks; what the application configured itself stays.

    Raises:
        SetupError: no such level, or the file of ``--log-config`` is wrong.
    """
    level = options.log_level or "INFO"
    if options.log_config is not None:
        setup.load_config(options.log_config)
        ours = False
    else:
        ours = setup.setup(level=level, json=options.log_json, force=options.log_json)
    if not ours and options.log_level is not None:
        logging.getLogger().setLevel(setup.level_of(level))


async def _run(build: Callable[[], Any], options: RunOptions, channel: Channel | None) -> int:
    target: Target = await build()
    try:
        configure_logging(options)
    except SetupError as error:
        return fail(error, USAGE)
    brokers = brokers_of(target.object)
    grace = max((_grace(broker) for broker in brokers), default=15.0)
    hello = Hello(target.title, target.kind == "asgi", [b.driver.describe() for b in brokers])
    hello.grace, hello.docs = grace, getattr(target.object, "docs_url", None) or ""
    if target.kind == "asgi":
        return await _serve(target, options, channel, hello)
    if channel is not None:
        channel.hello(hello)
        channel.watch()
    return await _run_app(target, options, channel)


def _grace(broker: Broker) -> float:
    value = getattr(broker, "graceful_timeout", None)
    return 15.0 if value is None else float(value)


async def _run_app(target: Target, options: RunOptions, channel: Channel | None) -> int:
    app = target.app
    if channel is not None:
        app.after_startup(channel.ready)
    await app.run(**options.startup())
    return OK


async def _serve(
    target: Target, options: RunOptions, channel: Channel | None, hello: Hello
) -> int:
    try:
        import uvicorn
    except ImportError:
        raise SetupError(
            f"{target.title} speaks HTTP and needs a server", fix="pip install uvicorn"
        ) from None
    extra, others = split_known(options.startup(), uvicorn.Config)
    for own in ("host", "port", "uds", "worker_id"):
        extra.pop(own, None)
        others.pop(own, None)
    start = getattr(target.object, "startup_options", None)
    if isinstance(start, dict):  # our own AsgiApp passes them to its application
        start |= others | {"worker_id": options.worker_id}
    elif others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise TargetError(f"{target.title} takes no {names}")
    answer: Answer | None = None
    sock: socket.socket | None = None
    if channel is not None:
        answer, sock = channel.hello(hello)
        channel.watch()
    if sock is None:
        port = 8000 if options.port is None else options.port
        sock = listen(options.host or "127.0.0.1", port, options.uds)
    scheme = "https" if extra.get("ssl_certfile") else "http"
    url = url_of(sock, scheme)

    lifespan = _Lifespan(target.object)
    settings: dict[str, Any] = {"timeout_graceful_shutdown": int(hello.grace) + 1} | extra
    config = uvicorn.Config(
        lifespan, log_config=None, interface="asgi3", **settings
    )

    class Server(uvicorn.Server):
        """Stops on the first signal and gives up on the second, whichever they are."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and channel is not None:
                channel.ready()
            elif self.started:
                log.info("%s on %s", target.title, url)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit or not self.started:
                self.force_exit = True
                loop.call_soon_threadsafe(task.cancel)
            self.should_exit = True

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    server = Server(config)
    try:
        await server.serve(sockets=[sock])
    except SystemExit as stop:  # uvicorn's way to say that the start failed
        if lifespan.error is None:
            return FAILED if stop.code else OK
    finally:
        sock.close()
        if options.uds and channel is None:
            with contextlib.suppress(OSError):
                os.unlink(options.uds)
    if lifespan.error is not None:
        raise lifespan.error
    return OK if server.started else FAILED


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
                raise  # the application knows no lifespan
            self.error = error
            failed["message"] = ""
        if failed:
            await send(failed)
