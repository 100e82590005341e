"""A transactional producer of the library, in a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from confluent_kafka import KafkaException, Producer

from .. import killpoints
from .client import ASK, Broken, Client, broken, partitions, produce
from .message import Send
from .offsets import Commit

#: Errors of messages that no cluster will take, however often they are sent.
_REFUSALS = {
    "MSG_SIZE_TOO_LARGE",
    "RECORD_LIST_TOO_LARGE",
    "INVALID_MSG",
    "INVALID_RECORD",
    "TOPIC_AUTHORIZATION_FAILED",
    "TOPIC_EXCEPTION",
    "UNKNOWN_TOPIC_OR_PART",
    "_UNKNOWN_TOPIC",
    "_UNKNOWN_PARTITION",
}


#: Seconds after its time for a call of the library that does not keep to it.
LATE = 1.0


class Refused(Broken):
    """A transaction was aborted because the cluster does not take some of its messages.

    Args:
        text: why.
        code: Kafka's name of the error.
        which: the places of the groups that they are in.
    """

    def __init__(self, text: str, code: str, which: Sequence[int]) -> None:
        super().__init__(text, code)
        self.which = which


class Stuck(Broken):
    """The library does not come back, and its producer is left behind."""


class Transactor:
    """A transactional producer; one transaction after another.

    Args:
        client: whose cluster it is.
        name: its transactional id.
    """

    def __init__(self, client: Client, name: str) -> None:
        limit = client.transaction_timeout_ms
        self.settings = {
            # The cluster often is not done yet with the transaction before when the next begins.
            "retry.backoff.ms": 10,
            **client.settings,
            **client.producing,
            "error_cb": client.on_error,
            "enable.idempotence": True,
            "acks": "all",
            "transactional.id": name,
            "transaction.timeout.ms": limit,
            # Nothing may wait longer than the transaction does.
            "message.timeout.ms": min(client.producing["message.timeout.ms"], limit),
            "socket.timeout.ms": min(client.settings["socket.timeout.ms"], limit),
            "delivery.report.only.error": True,
        }
        self._limit = limit / 1000
        self._pool = ThreadPoolExecutor(1, "kafka-transactions")
        self._producer: Any = None
        self._began = killpoints.kill_point("transaction_began")
        self._sent = killpoints.kill_point("transaction_sent")
        self._told = killpoints.kill_point("transaction_offsets")
        self._committed = killpoints.kill_point("transaction_committed")

    async def open(self) -> None:
        """End what the last owner of its name left open, and fence it.

        Raises:
            Broken: the cluster does not let us.
        """
        await asyncio.get_running_loop().run_in_executor(self._pool, self._open)

    def _open(self) -> None:
        try:
            self._producer = Producer(self.settings)
            # Longer than the cluster needs to abort what the last owner of the name left.
            self._patiently(self._producer.init_transactions, self._limit + 20.0)
        except KafkaException as error:
            raise broken(error) from error

    async def run(
        self, groups: Sequence[Sequence[Send]], commits: Sequence[Commit], member: Any
    ) -> None:
        """Store groups of messages, and offsets, at once.

        Raises:
            Refused: it was aborted, and will be again with the same messages.
            Broken: it was aborted; or, fatal, it is not known and the producer is of no use any
                more. ``_FENCED`` says that another process has its name.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._pool, self._run, groups, commits, member)
        except RuntimeError as error:  # closed meanwhile
            raise Broken(str(error), "_STATE", True) from error

    def _run(
        self, groups: Sequence[Sequence[Send]], commits: Sequence[Commit], member: Any
    ) -> None:
        began = time.monotonic()
        refused: dict[int, str] = {}
        try:
            self._transact(groups, commits, member, refused)
        except (KafkaException, BufferError, ValueError, TypeError, Stuck) as error:
            problem = error if isinstance(error, Stuck) else broken(error)
            if not problem.fatal:
                try:
                    if problem is not error:
                        self._patiently(self._producer.abort_transaction, self._limit)
                    # The library's own numbering has gaps now, at which it stumbles later.
                    self._open()
                except (KafkaException, Broken) as second:
                    problem = second if isinstance(second, Broken) else broken(second)
                    problem.fatal = True
            if problem.fatal and time.monotonic() > began + self._limit * 0.9:
                # The cluster aborted it, which looks the same as another owner of the name.
                problem = Broken(f"open for too long: {problem}", "_EXPIRED", True)
            if refused and not problem.fatal:
                codes = next(iter(refused.values()))
                raise Refused(str(problem), codes, list(refused)) from error
            raise problem from error

    def _transact(
        self,
        groups: Sequence[Sequence[Send]],
        commits: Sequence[Commit],
        member: Any,
        refused: dict[int, str],
    ) -> None:
        producer = self._producer
        producer.begin_transaction()
        if self._began is not None:
            self._began()
        end = time.monotonic() + self._limit
        for number, group in enumerate(groups):
            report = functools.partial(_report_refusal, refused, number)
            for send in group:
                while True:
                    try:
                        produce(producer, send, report)
                        break
                    except BufferError:
                        if time.monotonic() > end:
                            raise
                        producer.poll(0.05)
                    except KafkaException as error:
                        if broken(error).code in _REFUSALS:
                            refused[number] = broken(error).code
                        raise
        if self._sent is not None:
            producer.flush(self._limit)
            self._sent()
        if commits:
            ask = functools.partial(
                producer.send_offsets_to_transaction, partitions(commits), member
            )
            self._patiently(functools.partial(_in_time, ask), self._limit)
        if self._told is not None:
            self._told()
        self._patiently(producer.commit_transaction, self._limit)
        if self._committed is not None:
            self._committed()

    def _patiently(self, call: Callable[[float], Any], seconds: float) -> None:
        """Call again what did not end in time, which goes on then where it was."""
        end = time.monotonic() + seconds
        while True:
            try:
                call(min(seconds, ASK))
                return
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > end:
                    raise

    async def close(self) -> None:
        self._producer = None
        self._pool.shutdown(wait=False)


def _in_time(call: Callable[[float], Any], seconds: float) -> None:
    """Call what may never return, whatever time it was given.

    librdkafka waits without end for a group's coordinator that is gone (its issues 5456 and 5511).

    Raises:
        Stuck: it still runs, in a thread that nobody waits for.
    """
    answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            call(seconds)
            answer.put(None)
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=ask, name="kafka-offsets", daemon=True).start()
    try:
        error = answer.get(timeout=seconds + LATE)
    except queue.Empty:
        raise Stuck("no answer of the group's coordinator", "_TIMED_OUT") from None
    if error is not None:
        raise error


def _report_refusal(refused: dict[int, str], number: int, error: Any, message: Any) -> None:
    if error is not None and error.name() in _REFUSALS:
        refused[number] = error.name()
