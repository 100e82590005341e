"""The application: brokers, hooks and their order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .broker import Broker, State
from .codec import JSON
from .context import ContextRepo
from .errors import SetupError, StateError
from .hooks import call_with
from .log import default_logger, log_line, silent_logger
from .plan import Site
from .signature import name_of, where_is
from .types import AnyCallable, Lifespan, LoggerLike

if TYPE_CHECKING:
    from .asgi import AsgiApp

F = TypeVar("F", bound=Callable[..., Any])
_UNSET: Any = msgspec.UNSET


class Millstream:
    """Brokers that start and stop together, with hooks around.

    The order: ``lifespan`` is entered, ``on_startup`` hooks run, all brokers connect at
    once and then consume, ``after_startup`` hooks run; at the end ``on_shutdown`` hooks run,
    the brokers drain and disconnect, ``after_shutdown`` hooks run, ``lifespan`` is left. A
    failure undoes exactly what was done.

    Args:
        brokers: started in this order, stopped together.
        lifespan: an async context manager function; it and the ``on_startup`` hooks may take
            command-line options by name, and all hooks what handlers take: ``Context``,
            ``Depends``, ``ContextRepo``, a broker.
        on_startup: hooks before the brokers connect.
        after_startup: hooks once everything consumes.
        on_shutdown: hooks before the brokers drain.
        after_shutdown: hooks after they are gone.
        logger: what ``Logger`` injects for all brokers without a logger of their own; None
            for silence.
        context: values for ``Context``.
        title: a name for documents.
        version: for documents.
        description: for documents.
    """

    def __init__(
        self,
        *brokers: Broker,
        lifespan: Lifespan | None = None,
        on_startup: Sequence[AnyCallable] = (),
        after_startup: Sequence[AnyCallable] = (),
        on_shutdown: Sequence[AnyCallable] = (),
        after_shutdown: Sequence[AnyCallable] = (),
        logger: LoggerLike | None = _UNSET,
        context: ContextRepo | None = None,
        title: str = "Millstream",
        version: str = "0.1.0",
        description: str | None = None,
    ) -> None:
        self.brokers: list[Broker] = []
        self.lifespan = lifespan
        self.title, self.version, self.description = title, version, description
        self.given_logger: LoggerLike | None = (
            None if logger is _UNSET else silent_logger() if logger is None else logger
        )
        self.context = context or ContextRepo()
        self.context.set_global("app", self)
        self._hooks: dict[str, list[AnyCallable]] = {
            "on_startup": list(on_startup),
            "after_startup": list(after_startup),
            "on_shutdown": list(on_shutdown),
            "after_shutdown": list(after_shutdown),
        }
        self._stack: AsyncExitStack | None = None
        self._exit: asyncio.Event | None = None
        for broker in brokers:
            self.add_broker(broker)

    @property
    def logger(self) -> LoggerLike:
        """The logger given, or ``millstream.app``."""
        return self.given_logger if self.given_logger is not None else default_logger("app")

    @property
    def broker(self) -> Broker | None:
        """The first broker."""
        return self.brokers[0] if self.brokers else None

    def add_broker(self, broker: Broker) -> None:
        """Add a broker before the start.

        Raises:
            SetupError: it is no broker, or was added before.
        """
        if not isinstance(broker, Broker):
            raise SetupError(
                f"{broker!r} is not a broker", code="MS134", fix="Millstream(NatsBroker(...))"
            )
        if broker in self.brokers:
            raise SetupError("this broker was added before", code="MS135")
        self.brokers.append(broker)
        self._adopt(broker)

    def on_startup(self, hook: F) -> F:
        """Run ``hook`` before the brokers connect."""
        self._hooks["on_startup"].append(hook)
        return hook

    def after_startup(self, hook: F) -> F:
        """Run ``hook`` once everything consumes."""
        self._hooks["after_startup"].append(hook)
        return hook

    def on_shutdown(self, hook: F) -> F:
        """Run ``hook`` before the brokers drain."""
        self._hooks["on_shutdown"].append(hook)
        return hook

    def after_shutdown(self, hook: F) -> F:
        """Run ``hook`` when the brokers are gone."""
        self._hooks["after_shutdown"].append(hook)
        return hook

    def _adopt(self, broker: Broker) -> None:
        """Make a broker part of this application: one context, one logger."""
        broker.app = self
        broker.on_stop_application = self.exit
        for key, value in broker.context.context.items():
            if key not in self.context:
                self.context.set_global(key, value)
        broker.context = self.context

    async def start(self, **extra: Any) -> None:
        """Start everything; ``extra`` are command-line options for hooks and lifespan.

        Raises:
            StateError: there is no broker, or it runs already.
            SetupError: a declaration or a hook is wrong.
            ConnectError: a broker was not reached.
        """
        if self._stack is not None:
            raise StateError("the application runs already", state="running")
        if not self.brokers:
            raise StateError("the application has no broker", wanted="a broker")
        for broker in self.brokers:
            self._adopt(broker)  # again: another application may have had it since
        async with AsyncExitStack() as stack:
            if self.lifespan is not None:
                entered = await call_with(self.lifespan, self._site(self.lifespan), extra)
                await stack.enter_async_context(entered)
            stack.push_async_callback(self._call, "after_shutdown", {})
            await self._call("on_startup", extra)
            stack.push_async_callback(self._stop_brokers)
            await _all(broker.connect() for broker in self.brokers)
            for broker in self.brokers:
                await broker.start()
            stack.push_async_callback(self._call, "on_shutdown", {})
            await self._call("after_startup", extra)
            self._stack = stack.pop_all()

    async def stop(self) -> None:
        """Drain and stop everything; safe to call again."""
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    def exit(self) -> None:
        """Make ``run`` stop."""
        if self._exit is not None:
            self._exit.set()

    def hurry(self) -> None:
        """End a running drain now."""
        for broker in self.brokers:
            broker.hurry()

    async def run(self, **extra: Any) -> None:
        """Start, run until SIGINT, SIGTERM or ``exit()``, and stop; a second signal hurries.

        Raises:
            StateError: a broker was lost for good.
            Whatever ``start`` raises.
        """
        self._exit = asyncio.Event()
        loop = asyncio.get_running_loop()
        caught: list[signal.Signals] = []

        def asked(number: signal.Signals) -> None:
            if caught:
                self.hurry()
            caught.append(number)
            self.exit()

        installed: list[signal.Signals] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            # Not in the main thread, or not on this platform: somebody else handles signals.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, asked, number)
                installed.append(number)
        starting = asyncio.ensure_future(self.start(**extra))
        leaving = asyncio.ensure_future(self._exit.wait())
        try:
            await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                log_line(self.logger, "info", f"{self.title} runs: {self._summary()}")
                await leaving
        finally:
            for task in (starting, leaving):  # asked to stop, or cancelled, while starting
                task.cancel()
            await asyncio.gather(starting, leaving, return_exceptions=True)
            await self.stop()
            for number in installed:
                loop.remove_signal_handler(number)
        failed = [b for b in self.brokers if b.state is State.FAILED]
        if failed and not caught:
            raise StateError(
                f"lost for good: {', '.join(b.driver.describe() for b in failed)}", state="failed"
            )

    def _summary(self) -> str:
        parts = []
        for broker in self.brokers:
            count = len(broker.subscriptions)
            plural = "" if count == 1 else "s"
            parts.append(f"{broker.driver.describe()} ({count} subscription{plural})")
        return ", ".join(parts)

    async def _call(self, moment: str, extra: dict[str, Any]) -> None:
        for hook in self._hooks[moment]:
            await call_with(hook, self._site(hook), extra)

    def _site(self, hook: AnyCallable) -> Site:
        return Site(
            name=name_of(hook),
            where=where_is(hook),
            codec=JSON(),
            context=self.context,
            logger=self.logger,
            broker=self.broker,
            app=self,
        )

    async def _stop_brokers(self) -> None:
        await asyncio.gather(*(broker.stop() for broker in self.brokers))

    def health(self) -> dict[str, Any]:
        """Whether everything works, and the state of each broker and subscription.

        ``live`` is False once a broker failed for good; ``ready`` is True while all brokers
        are connected and consume.
        """
        brokers = [b.health() for b in self.brokers]
        return {
            "live": all(b.state is not State.FAILED for b in self.brokers),
            "ready": all(b["state"] == "running" and b["connected"] for b in brokers),
            "brokers": brokers,
        }

    async def full_health(self, timeout: float = 1.0) -> dict[str, Any]:
        """The same as ``health``, after every broker was asked for its ``lag`` (messages that
        wait there); one that does not answer within ``timeout`` seconds tells none."""
        asked = [s.ask_lag() for broker in self.brokers for s in broker.subscriptions]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.gather(*asked)
        return self.health()

    def as_asgi(self, routes: Sequence[tuple[str, Any]] = (), **options: Any) -> AsgiApp:
        """This application as ASGI: its lifespan, probes and the given ``(path, app)`` routes."""
        from .asgi import AsgiApp

        return AsgiApp(self, routes=routes, **options)


async def _all(work: Any) -> None:
    """Run all at once; the first failure is raised when all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


FastStream = Millstream
