"""Runs a target in this process: a plain application on a loop of its own, HTTP by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from .. import logging as setup
from ..app import Millstream
from ..errors import ConnectError, MillstreamError, SetupError
from ..log import TARGET_VARIABLE
from .answering import answering
from .child import Channel, Hello
from .options import RunOptions
from .output import FAILED, OK, USAGE, fail
from .sockets import BindError
from .target import Target, TargetError, UserCodeError, find, own_traceback

log = logging.getLogger("millstream.run")
#: Thresholds of the garbage collector while everything is imported, which leaves little garbage.
_RARELY = (100_000, 100, 100)
#: Seconds that tasks and threads may go on after the application's end, at least.
LEAVE = 0.25


class _Limit:
    """Ends the process with the drain, whatever a handler left behind: a thread, or a task
    that swallows its cancellation, would keep it for as long as it likes."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def begin(self) -> None:
        """The drain begins."""
        self._began = time.monotonic()

    def arm(self, grace: float) -> None:
        """Everything orderly is done; ``grace`` seconds were given for it from the drain on."""
        left = max(self._began + grace - time.monotonic(), LEAVE)
        self._timer = threading.Timer(left, self._leave)
        self._timer.daemon = True
        self._timer.start()

    def _leave(self) -> None:
        log.error("something of a handler still runs after the end; leaving without it")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(FAILED)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Afterwards no collection walks through what was made in the block, which stays.

    With a FastAPI application that is 100,000 objects, and each full collection would stop the
    event loop for 40 ms. An application that set the thresholds itself keeps them.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        if gc.get_threshold() == _RARELY:
            gc.set_threshold(*before)
    gc.collect()
    gc.freeze()


def execute(options: RunOptions, channel: Channel | None = None) -> int:
    """Run the target until it ends; returns the exit code.

    Args:
        options: what the command line said.
        channel: the way to the supervisor, in a process that it started.
    """
    limit = _Limit()
    os.environ[TARGET_VARIABLE] = options.target
    try:
        found = find(options.target, app_dir=options.app_dir, factory=options.factory)
        with limit, asyncio.Runner(loop_factory=loop_factory(options.loop)) as runner:
            return runner.run(_run(found.build, options, channel, limit))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:  # stopped by a signal before it was up
        return OK
    except TargetError as error:
        return fail(error, USAGE)
    except UserCodeError as error:
        return fail(f"{options.target} failed\n{error}")
    except Exception as error:
        everything = (options.log_level or "").lower() == "debug"
        return fail(problem(options.target, error, everything=everything))


def problem(target: str, error: Exception, *, everything: bool = False) -> str:
    """An error for people: its text where that says all, else with the user's frames;
    ``everything`` shows all frames."""
    if everything:
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, SetupError | ConnectError | BindError):
        return str(error)
    trace = own_traceback(error)
    if isinstance(error, MillstreamError) and "\n  File " not in trace:
        return str(error)
    return f"{target} failed\n{trace}"


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
        TargetError: the file of ``--log-config`` is wrong.
    """
    level = options.log_level or "INFO"
    if options.log_config is not None:
        try:
            setup.load_config(options.log_config)
        except SetupError as error:
            raise TargetError(f"--log-config: {error.what}") from None
        ours = False
    else:
        ours = setup.setup(level=level, json=options.log_json, force=options.log_json)
    if not ours and options.log_level is not None:
        logging.getLogger().setLevel(setup.level_of(level))


async def _run(
    build: Callable[[], Awaitable[Target]],
    options: RunOptions,
    channel: Channel | None,
    limit: _Limit,
) -> int:
    with _importing():
        target = await build()
    configure_logging(options)
    brokers = target.brokers
    grace = max((broker.graceful_timeout for broker in brokers), default=15.0)
    hello = Hello(
        title=target.title,
        asgi=target.kind == "asgi",
        brokers=[broker.driver.describe() for broker in brokers],
        grace=grace,
        docs=getattr(target.object, "docs_url", None) or "",
    )
    if hello.asgi:
        try:
            from .serve import serve
        except ImportError:
            raise SetupError(
                f"{target.title} speaks HTTP and needs a server", fix="pip install uvicorn"
            ) from None
        return OK if await serve(target, brokers, options, channel, hello) else FAILED
    app, startup = target.app, options.startup()
    if channel is not None:
        channel.hello(hello)
        channel.watch()
        app.after_startup(channel.ready)
    app.on_shutdown(limit.begin)
    for name in _unused(app, startup):
        log.warning("no start-up hook takes --%s", name.replace("_", "-"))
    async with answering(app, options):
        await app.run(**startup)
    limit.arm(grace)
    return OK


def _unused(app: Millstream, startup: dict[str, Any]) -> list[str]:
    """The options that neither the lifespan nor a hook has a parameter for."""
    hooks = [*app._hooks["on_startup"], *app._hooks["after_startup"]]
    hooks += [app.lifespan] if app.lifespan is not None else []
    taken = {name for hook in hooks for name in inspect.signature(hook).parameters}
    return [name for name in startup if name not in taken and name != "worker_id"]
