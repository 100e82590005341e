"""Sets a scenario up, does the damage, waits with bounds, and judges what is left."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgspec

from millstream import Millstream
from millstream.errors import NotConnected, PublishError, PublishTimeout
from millstream.killpoints import VARIABLE as KILL_AT
from tests.cli.harness import Process, alive
from tests.faults import app as under_test
from tests.faults.checker import Fault, Verdict, check
from tests.faults.ledger import Ledger, Record, read
from tests.faults.proxy import Proxy
from tests.faults.registry import SOURCES
from tests.faults.sources.base import Setup
from tests.helpers import eventually, unique
from tests.servers import Server

#: Where a line per scenario goes; nowhere if it is not set.
RESULTS = "FAULTS_RESULTS"
#: Seconds that everything together may add to a bound on a busy machine.
SLACK = 3.0
#: Servers that run and were left as they had been, by the method that made them: some take
#: seconds to start.
_spare: dict[str, list[Server]] = {}


def remove_spare() -> None:
    """Stop all servers that wait for another scenario."""
    for servers in _spare.values():
        while servers:
            servers.pop().remove()


class Worker:
    """One ``millstream run``, of one process or of several under a supervisor."""

    def __init__(self, trial: Trial, count: int, kill_at: str) -> None:
        setup = trial.setup
        env = {under_test.VARIABLE: msgspec.json.encode(setup).decode()}
        if kill_at:
            env[KILL_AT] = kill_at
        self.trial, self.count = trial, count
        self._known = {r.pid for r in trial.records("up")}
        arguments = ["--workers", str(count)] if count > 1 else []
        self.process = Process(
            "run", "--factory", "tests.faults.app:create", *arguments, folder=trial.folder, env=env
        )

    @property
    def pids(self) -> list[int]:
        """The processes that consume."""
        up = {r.pid for r in self.trial.records("up")} - self._known
        return sorted(pid for pid in up if alive(pid))

    @property
    def output(self) -> str:
        return self.process.output

    async def ready(self, timeout: float = 30.0) -> Self:
        """Wait until all its processes consume."""

        def all_up() -> bool:
            assert self.process.process.poll() is None, self.output
            return len(self.pids) >= self.count

        try:
            await eventually(all_up, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None
        return self

    def send(self, number: signal.Signals, pid: int | None = None) -> float:
        """Send a signal to the process (the supervisor), or to one of its workers."""
        os.kill(self.process.pid if pid is None else pid, number)
        return time.monotonic()

    async def kill(self, pid: int | None = None) -> None:
        """SIGKILL, as a fault of the trial; without a pid the process itself."""
        trial, pid = self.trial, self.process.pid if pid is None else pid
        begin = self.send(signal.SIGKILL, pid)
        await eventually(lambda: not alive(pid), 5)
        trial.died(pid, begin)

    async def wait(self, timeout: float = 20.0) -> int:
        """The exit code."""
        code = await asyncio.to_thread(self.process.wait, timeout)
        return code

    async def killed(self, timeout: float = 20.0) -> None:
        """Wait until a kill point has ended the process."""
        assert await self.wait(timeout) == -signal.SIGKILL, self.output
        self.trial.died(self.process.pid)

    async def stop(self, *, code: int = 0, timeout: float = 30.0) -> float:
        """Ask it to stop, check how it ends, and return the seconds it took."""
        begin = self.send(signal.SIGTERM)
        found = await self.wait(timeout)
        assert found == code, f"exit code {found}\n{self.output}"
        return time.monotonic() - begin


class Trial:
    """One scenario on one source: server, proxy, sender, workers, ledgers and the verdict."""

    def __init__(self, source: str, folder: Path, **options: Any) -> None:
        kind = SOURCES[source]
        self.source = kind()
        self.folder = folder
        self.ledgers = folder / "ledgers"
        self.setup = Setup(
            kind=f"{kind.__module__}:{kind.__qualname__}",
            folder=str(self.ledgers),
            name=unique("faults"),
            **options,
        )
        self.faults: list[Fault] = []
        self.workers: list[Worker] = []
        self.apps: list[Millstream] = []
        self.sender: Any = None
        self.ledger = Ledger(self.ledgers, "sender")
        self._server: Server | None = None
        #: Where the server goes when nothing happened to it.
        self._shelf: list[Server] | None = None
        self._proxy: Proxy | None = None
        self._count = 0
        self._stack = AsyncExitStack()

    # Surroundings

    @property
    def server(self) -> Any:
        """The server, for damage: no other scenario will use it."""
        assert self._server is not None, f"{self.source.name} has no server"
        self._shelf = None
        return self._server

    @property
    def proxy(self) -> Proxy:
        """What stands between the workers and the server; the sender does not pass through it."""
        assert self._proxy is not None, f"{self.source.name} has no server"
        return self._proxy

    @property
    def untold(self) -> int:
        """How many messages may be done of which the broker was not told yet, in all workers."""
        lanes = self.setup.concurrency * max((w.count for w in self.workers), default=1)
        return math.ceil(self.source.behind / max(self.setup.work, 0.005)) * lanes

    def lossy(self, number: int) -> int:
        """How many messages a fault may cost: none where they are stored."""
        return 0 if self.source.confirms else number

    # Life

    async def __aenter__(self) -> Self:
        if not self.source.processes:
            return self
        if not (self.setup.watched or self.setup.logins):
            self._shelf = _spare.setdefault(type(self.source).server.__qualname__, [])
        self._server = self._shelf.pop() if self._shelf else self.source.server(self.setup)
        assert self._server is not None
        self._stack.callback(self._leave, self._server)
        if not self._server.running:
            await asyncio.to_thread(self._server.start)
        self._proxy = await Proxy(*self.source.way(self._server)).start()
        self._stack.push_async_callback(self._proxy.stop)
        user = "worker" if self.setup.logins else ""
        self.setup.url = self.source.url(self._proxy.port, user)
        return self

    def _leave(self, server: Server) -> None:
        if self._shelf is not None and server.running:
            self._shelf.append(server)
        else:
            server.remove()

    async def __aexit__(self, *_: object) -> None:
        if self._proxy is not None:
            self._proxy.heal()
        for app in self.apps:
            await app.stop()
        for worker in self.workers:
            for pid in {*worker.pids, worker.process.pid}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            if worker.process.process.poll() is None:
                worker.process.process.kill()
            await asyncio.to_thread(worker.process.wait)
            for pid in worker.pids:  # orphans stop by themselves; nobody has to wait for them
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.sender is not None:
            await self.sender.stop()
        await self._stack.aclose()
        self.ledger.close()

    async def worker(self, count: int = 1, *, kill_at: str = "", ready: bool = True) -> Worker:
        """Start ``millstream run`` with so many processes."""
        worker = Worker(self, count, kill_at)
        self.workers.append(worker)
        return await worker.ready() if ready else worker

    async def inside(self) -> Millstream:
        """Run the application in this process."""
        app = under_test.build(self.source, self.setup, Ledger(self.ledgers, "inside"))
        await app.start()
        self.apps.append(app)
        return app

    async def consume(self, count: int = 1) -> None:
        """Run the application in so many processes, or in this one if no other can reach it."""
        await (self.worker(count) if self.source.processes else self.inside())

    async def connect(self) -> Any:
        """The broker that sends and looks; it does not pass through the proxy."""
        if self.sender is None:
            direct = msgspec.structs.replace(self.setup, publish_timeout=2.0)
            if self._server is not None:
                user = "sender" if self.setup.logins else ""
                direct.url = self.source.url(self._server.port, user)
            self.sender = self.source.broker(direct)
            await self.sender.connect()
        return self.sender

    # Sending

    async def send(self, number: int, *, pace: float = 0.0, keys: int = 4, **do: Any) -> list[str]:
        """Send messages one after the other, each until it is confirmed; returns their ids."""
        ids = []
        for _ in range(number):
            self._count += 1
            id, key = f"m{self._count}", f"k{self._count % keys}"
            order = under_test.Order(id=id, key=key, seq=self._count, **do)
            await self.put(order)
            ids.append(id)
            if pace:
                await asyncio.sleep(pace)
        return ids

    async def put(self, order: under_test.Order, patience: float = 60.0) -> None:
        """Send one message until it is confirmed."""
        self.ledger.write("sent", order.id, key=order.key, seq=order.seq)
        end = time.monotonic() + patience
        while True:
            try:
                await self.publish(order, order.id)
                break
            except (NotConnected, PublishTimeout, PublishError):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.05)
                # The first one may have been stored all the same.
                self.ledger.write("sent", order.id, key=order.key, seq=order.seq)
        self.ledger.write("confirmed", order.id)

    async def publish(self, body: Any, id: str, **options: Any) -> None:
        """Publish once to where the messages go, without a word in the ledger."""
        broker = await self.connect()
        options |= self.source.publication(self.setup, id)
        if self.source.keyed and isinstance(body, under_test.Order):
            options["key"] = body.key
        await broker.publish(body, self.source.address(self.setup), **options)

    @asynccontextmanager
    async def load(self, pace: float = 0.02, **do: Any) -> AsyncIterator[None]:
        """Send all the time while the block runs."""
        over = asyncio.Event()

        async def sending() -> None:
            while not over.is_set():
                await self.send(1, pace=pace, **do)

        task = asyncio.create_task(sending())
        try:
            yield
        finally:
            over.set()
            await asyncio.wait_for(task, 70)

    # Faults

    @asynccontextmanager
    async def fault(self, name: str, pids: Iterable[int] = ()) -> AsyncIterator[None]:
        """What the block does is the fault."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.faults.append(Fault(name, begin, time.monotonic(), frozenset(pids)))

    def died(self, pid: int, begin: float | None = None) -> None:
        """A process is gone; without its time, it was when it wrote for the last time."""
        if begin is None:
            begin = max((r.at for r in self.records() if r.pid == pid), default=time.monotonic())
        self.ledger.write("died", pid=pid)
        self.faults.append(Fault("killed", begin, time.monotonic(), frozenset([pid])))

    # Looking

    def records(self, *events: str) -> list[Record]:
        return [r for r in read(self.ledgers) if not events or r.event in events]

    def count(self, *events: str) -> int:
        return len(self.records(*events))

    def effects(self) -> set[str]:
        return {r.id for r in self.records("effect")}

    async def until(self, condition: Callable[[], object], timeout: float = 20.0) -> None:
        """Wait for something; what the workers said is shown if it does not come."""
        try:
            await eventually(condition, timeout, every=0.02)
        except AssertionError as error:
            said = "\n".join(worker.output[-4000:] for worker in self.workers)
            raise AssertionError(f"{error}\n{said}") from None

    async def working(self, number: int = 1, timeout: float = 20.0) -> None:
        """Wait until ``number`` more messages had their effect."""
        goal = self.count("effect") + number
        await self.until(lambda: self.count("effect") >= goal, timeout)

    async def quiet(self, timeout: float = 30.0) -> None:
        """Wait until everything confirmed is done and the broker holds nothing.

        Args:
            timeout: seconds to wait without any progress; five minutes in all.
        """
        broker, end, last = await self.connect(), time.monotonic() + 300, time.monotonic()
        before = (-1, -1)
        while time.monotonic() < min(end, last + timeout):
            with suppress(Exception):
                self._note_dead(await self.source.dead(broker, self.setup))
                wanted = {r.id for r in self.records("confirmed")}
                missing = len(wanted - {r.id for r in self.records("effect", "dead")})
                held = await self.source.held(broker, self.setup)
                if held < 0:  # nobody can tell but the workers
                    told = {r.id for r in self.records("settled") if r.more["how"] != "NACK"}
                    held = len(wanted - told) if self.source.confirms else 0
                if not missing and not held:
                    return
                if (missing, held) != before:
                    before, last = (missing, held), time.monotonic()
            await asyncio.sleep(0.1)
        # A loss is the checker's to tell, with its numbers.

    def _note_dead(self, letters: list[tuple[bytes, dict[str, str]]]) -> None:
        known = {r.id for r in self.records("dead")}
        for body, _ in letters:
            try:
                id = msgspec.json.decode(body, type=under_test.Order).id
            except msgspec.MsgspecError:
                continue
            if id not in known:
                known.add(id)
                self.ledger.write("dead", id)

    async def letters(self) -> list[tuple[bytes, dict[str, str]]]:
        """The dead letters."""
        return await self.source.dead(await self.connect(), self.setup)

    async def results(self) -> list[str]:
        """The ids of what handlers' results led to."""
        made = await self.source.made(await self.connect(), self.setup)
        return [self.id_of(body) for body in made]

    @staticmethod
    def id_of(body: bytes) -> str:
        return msgspec.json.decode(body, type=under_test.Order).id

    async def held(self) -> int:
        """How many messages the broker holds; -1 if nobody can tell."""
        return await self.source.held(await self.connect(), self.setup)

    def settled(self, id: str) -> bool:
        return any(r.id == id and r.more["how"] != "NACK" for r in self.records("settled"))

    # The verdict

    async def verdict(
        self,
        scenario: str,
        invariant: str,
        *,
        lost: int = 0,
        duplicates: int = 0,
        recovery: float | None = None,
        timeout: float = 30.0,
        **options: Any,
    ) -> Verdict:
        """Wait until it is quiet, judge, record the result, and fail on a broken invariant.

        Args:
            scenario: its number and name.
            invariant: for people.
            lost: how many messages may be lost: 0 where the source is at-least-once.
            duplicates: how many effects too many may be there; if any at all, then also those
                that the broker had not been told of when a fault struck.
            recovery: seconds that the recovery may take; by default reconnect cap and one ack
                deadline.
            timeout: seconds to wait for everything.
            options: as for :func:`check`.
        """
        options["linger"] = options.get("linger", 0.0) + self.source.linger
        await self.quiet(timeout)
        held = await self.held()
        found = check(
            self.records(),
            self.faults,
            held=None if held < 0 else held,
            confirms=self.source.confirms,
            repeats=not self.source.once,
            resends=self.source.resends,
            # What it held; then the next attempt to connect, which may time out once.
            away=(0.5, self.setup.reconnect + 2.5),
            **options,
        )
        if not self.source.confirms:
            found.unsettled = 0  # nobody counts them there
        if duplicates:
            duplicates += self.untold * len(self.faults)
        bound = self.setup.reconnect + self.setup.ack_wait if recovery is None else recovery
        took = max(found.recovery, default=None)
        broken = [
            text
            for text, wrong in (
                (f"lost {sorted(found.lost)}", len(found.lost) > lost),
                (f"phantom {sorted(found.phantom)}", found.phantom),
                (f"dead after its effect {sorted(found.misburied)}", found.misburied),
                (f"lost without a cause {sorted(found.abandoned)}", found.abandoned),
                (f"dead without a beginning {sorted(found.unbegun)}", found.unbegun),
                (f"duplicates {dict(found.duplicates)}", found.duplicated > duplicates),
                (f"duplicates without a cause {sorted(found.uncaused)}", found.uncaused),
                (f"reordered {sorted(found.reordered)}", found.reordered),
                (f"{found.unsettled} unsettled", found.unsettled),
                (f"recovery took {took} s, not {bound} s", (took or 0.0) > bound + SLACK),
                (f"a stall of {found.stall:.1f} s", found.stall > bound + SLACK),
            )
            if wrong
        ]
        self.record(scenario, invariant, found, took, broken)
        said = "\n".join(worker.output[-6000:] for worker in self.workers)
        assert not broken, f"{scenario} on {self.source.name}: {'; '.join(broken)}\n{said}"
        return found

    def record(
        self,
        scenario: str,
        invariant: str,
        found: Verdict,
        recovery: float | None,
        broken: list[str],
    ) -> None:
        """Write one line of results."""
        write_result(
            scenario,
            self.source.name,
            invariant,
            result="; ".join(broken) or "holds",
            sent=found.sent,
            lost=len(found.lost),
            duplicated=found.duplicated,
            recovery=recovery,
        )


def write_result(
    scenario: str,
    source: str,
    invariant: str,
    *,
    sent: int,
    lost: int = 0,
    duplicated: int = 0,
    recovery: float | None = None,
    result: str = "holds",
) -> None:
    """Write one line of results, for the tables of docs/delivery.md."""
    path = os.environ.get(RESULTS)
    if not path:
        return
    line = {
        "scenario": scenario,
        "source": source,
        "invariant": invariant,
        "result": result,
        "sent": sent,
        "lost": lost,
        "duplicated": duplicated,
        "recovery": None if recovery is None else round(recovery, 2),
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def gaps(records: Iterable[Record], id: str) -> list[float]:
    """Seconds between the beginnings of the attempts at one message."""
    starts = [r.at for r in records if r.event == "start" and r.id == id]
    return [later - earlier for earlier, later in pairwise(starts)]
