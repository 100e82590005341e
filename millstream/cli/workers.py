"""One supervisor for N processes of the same target, plain or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator

import msgspec

from .child import MARGIN, Child, either, ended
from .options import RunOptions
from .output import FAILED, OK, USAGE
from .run import configure_logging
from .sockets import Doorman

log = logging.getLogger("millstream.workers")

#: A worker that lived this many seconds did not die of its start.
STABLE = 10.0
#: Seconds before the first restart; doubled for each death in a row.
BACKOFF, BACKOFF_CAP = 0.25, 8.0
#: Deaths in a row of one worker that end everything.
CRASH_LIMIT = 5


@contextlib.contextmanager
def signals(on_stop: object, on_hangup: object = None) -> Iterator[None]:
    """Handle SIGINT and SIGTERM, and SIGHUP if asked for, on the running loop."""
    loop = asyncio.get_running_loop()
    wanted = {signal.SIGINT: on_stop, signal.SIGTERM: on_stop}
    if on_hangup is not None:
        wanted[signal.SIGHUP] = on_hangup
    for number, call in wanted.items():
        loop.add_signal_handler(number, call)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)


class Worker:
    """One place of the set, filled by one process after another."""

    def __init__(self, supervisor: Supervisor, number: int) -> None:
        self.supervisor, self.number = supervisor, number
        self.child: Child | None = None
        #: The process was told to end so that a new one takes its place.
        self.replacing = False
        self.deaths = 0

    @property
    def is_up(self) -> bool:
        """Whether its process is ready."""
        return self.child is not None and self.child.ready.is_set()

    async def keep(self) -> None:
        """Keep a process running until the supervisor stops."""
        boss, loop = self.supervisor, asyncio.get_running_loop()
        while not boss.stopping.is_set():
            options = msgspec.structs.replace(boss.options, worker_id=self.number)
            child = self.child = Child(options, boss.doorman.welcome)
            await child.start()
            if boss.stopping.is_set():
                child.terminate()
            exit = loop.create_task(child.wait())
            await either(child.ready.wait(), exit)
            started = loop.time()
            if child.ready.is_set():
                boss.up(self)
            code = await exit
            if boss.stopping.is_set():
                boss.codes.append(OK if code == -signal.SIGTERM and boss.forced else code)
                return
            if self.replacing:
                self.replacing = False
                continue
            lived = loop.time() - started if child.ready.is_set() else 0.0
            self.deaths = 1 if lived >= STABLE else self.deaths + 1
            delay = self._judge(code, child)
            if delay is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(boss.stopping.wait(), delay)

    def _judge(self, code: int, child: Child) -> float | None:
        """Seconds until the restart; None where there is none and everything stops."""
        boss, what = self.supervisor, f"worker {self.number} (pid {child.pid}) {ended(code)}"
        if not boss.started:
            # The child has said why.
            if code < 0 or code not in (OK, FAILED, USAGE):
                log.error("%s before it was up", what)
            boss.stop(code if code in (OK, USAGE) else FAILED)
        elif code == OK:
            log.info("%s; stopping the others", what)
            boss.stop(OK)
        elif self.deaths >= CRASH_LIMIT:
            log.error("%s, %d times in a row; giving up", what, self.deaths)
            boss.stop(FAILED)
        else:
            delay: float = min(BACKOFF * 2 ** (self.deaths - 1), BACKOFF_CAP)
            log.warning("%s; a new one starts in %g s", what, delay)
            return delay
        return None


class Supervisor:
    """Starts the workers, restarts those that die, rolls them on SIGHUP, stops them together."""

    def __init__(self, options: RunOptions, count: int) -> None:
        self.options = options
        self.doorman = Doorman(options)
        self.workers = [Worker(self, number) for number in range(count)]
        self.stopping = asyncio.Event()
        #: Whether some worker was up once.
        self.started = False
        self.result = OK
        #: How the processes ended that were told to.
        self.codes: list[int] = []
        self._first_up = asyncio.Event()
        self._roll: asyncio.Task[None] | None = None
        #: Told twice to stop: the second signal may reach a process that was about to leave.
        self.forced = False

    @property
    def children(self) -> list[Child]:
        """The processes, those that ended included."""
        return [worker.child for worker in self.workers if worker.child is not None]

    def up(self, worker: Worker) -> None:
        """A worker is ready."""
        assert worker.child is not None
        log.info("worker %d is up (pid %d)", worker.number, worker.child.pid)
        if not self.started and worker.child.hello is not None:
            self.doorman.up(worker.child.hello, f"{len(self.workers)} workers")
        self.started = True
        self._first_up.set()

    def stop(self, result: int) -> None:
        """Stop all workers; ``result`` is the exit code."""
        if self.stopping.is_set():
            return
        self.result = result
        self.stopping.set()
        self._first_up.set()
        if self._roll is not None:
            self._roll.cancel()
        for child in self.children:
            child.terminate()

    def interrupted(self) -> None:
        """SIGINT or SIGTERM; the second one means now."""
        if not self.stopping.is_set():
            log.info("stopping %d workers", len(self.workers))
            self.stop(OK)
            return
        self.forced = True
        for child in self.children:
            child.terminate()

    def hangup(self) -> None:
        """SIGHUP: replace the workers one by one."""
        if self.started and (self._roll is None or self._roll.done()):
            self._roll = asyncio.get_running_loop().create_task(self._replace_all())

    async def _replace_all(self) -> None:
        loop = asyncio.get_running_loop()
        log.info("replacing %d workers, one by one", len(self.workers))
        for worker in self.workers:
            while not all(other.is_up for other in self.workers):
                await asyncio.sleep(0.05)
            old, deaths = worker.child, worker.deaths
            assert old is not None
            worker.replacing = True
            old.terminate()
            deadline = loop.time() + old.grace
            while worker.child is old or not worker.is_up:
                if worker.child is old and loop.time() > deadline:
                    log.warning("worker %d did not stop in time; killing it", worker.number)
                    old.kill()
                if worker.deaths > deaths:
                    log.error("worker %d did not come back; the others stay", worker.number)
                    return
                await asyncio.sleep(0.05)
        log.info("all workers are new")

    async def run(self) -> int:
        """Run until a signal, a clean end or a failure; returns the exit code."""
        with signals(self.interrupted, self.hangup):
            try:
                first, *others = self.workers
                # The first one alone, so that a wrong target or an unreachable broker is
                # told once and not N times.
                tasks = [asyncio.create_task(first.keep())]
                await either(*tasks, self._first_up.wait())
                if not self.stopping.is_set() and not tasks[0].done():
                    tasks += [asyncio.create_task(worker.keep()) for worker in others]
                await either(*tasks, self.stopping.wait())
                self.stop(FAILED)  # no effect after a signal; a worker's task failed otherwise
                return await self._finish(tasks)
            finally:
                self.doorman.close()

    async def _finish(self, tasks: list[asyncio.Task[None]]) -> int:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max((child.grace for child in self.children), default=MARGIN)
        while pending := [task for task in tasks if not task.done()]:
            if self.forced:
                deadline = min(deadline, loop.time() + 2.0)
            await asyncio.wait(pending, timeout=0.1)
            if loop.time() > deadline:
                for child in self.children:
                    child.kill()
        if killed := sum(code < 0 for code in self.codes):
            log.warning("%d of %d workers had to be killed", killed, len(self.workers))
        for task in tasks:
            if (error := task.exception()) is not None:
                raise error
        return FAILED if any(self.codes) and self.result == OK else self.result


def supervise(options: RunOptions, count: int) -> int:
    """Run ``count`` workers; returns the exit code.

    Raises:
        TargetError: the file of ``--log-config`` is wrong.
        BindError: the address cannot be listened on.
    """
    configure_logging(options)

    async def run() -> int:
        return await Supervisor(options, count).run()

    return asyncio.run(run())
