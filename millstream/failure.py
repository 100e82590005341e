"""What an error leads to: a retry, the dead letter, a settlement, an answer to the caller.

Nothing here is on the way of a message that is handled without an error.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from . import killpoints
from .ack import TABLE, UNSETTLED, AckPolicy, Row, Settlement
from .dedup import Once
from .driver import Capability, Undoing
from .errors import (
    AckMessage,
    BatchFailed,
    CapabilityError,
    CrashedWorker,
    DecodeError,
    HandlerException,
    HandlerNotFound,
    MessageTooLarge,
    NackMessage,
    RejectMessage,
    SkipMessage,
    StopApplication,
    StopConsume,
)
from .letters import CAUSE, REPLAY_TO, one_line
from .log import Rate, log_error
from .message import BatchMessage, Message
from .middleware import Call
from .retry import DEFAULT_RETRY, DeadLetter, Retry

if TYPE_CHECKING:
    from .subscription import Subscription

_ACK, _NACK, _REJECT, _NONE = Settlement.ACK, Settlement.NACK, Settlement.REJECT, Settlement.NONE
_TRACEBACK_LIMIT = 8 * 1024


class Failures:
    """The policy of one subscription, resolved, and what it does with errors."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.spec, self.broker = subscription.spec, subscription.broker
        self.name = subscription.name
        #: Messages whose handling failed, retries included; messages that were buried.
        self.count = self.dead_lettered = 0
        #: What a replayed message calls this subscription.
        self.identity = one_line(f"{self.name}@{self.spec.destination}")
        #: What keeps handled messages from being handled again, if there is such a thing.
        self.once: Once | None = None
        self._address: str | None = None
        self._send_letter = killpoints.around("dead_letter", self.broker.driver.publish)
        self._rate = Rate()
        spec, scope = self.spec, subscription.scope
        can = spec.capabilities
        self.policy = spec.ack_policy or scope.ack_policy or AckPolicy.RETRY
        self.row: Row = TABLE[self.policy] if Capability.ACK in can else UNSETTLED
        self.retry: Retry = spec.retry or DEFAULT_RETRY
        #: Retried at all: by default where the source can redeliver, elsewhere only if asked for.
        self.retries = self.policy is AckPolicy.RETRY and (
            Capability.NACK in can or spec.retry is not None
        )
        #: Whether an attempt can be told from the first before the handler runs.
        self.counts = self.retries and Capability.DELIVERY_COUNT in can and spec.batch is None
        where = self.retry.where
        if where == "auto":
            delayed = Capability.NACK_DELAY in can and spec.ordered_by is None
            where = "broker" if delayed else "lane"
        self.retry_here = self.retries and where == "lane"
        then, said = self.retry.then, spec.buried
        wanted = self.policy is AckPolicy.RETRY and Capability.NACK in can
        by_default = DeadLetter() if wanted and not isinstance(then, Settlement) else None
        self.dead_letter = by_default if isinstance(said, msgspec.UnsetType) else said
        self.last_resort = then if isinstance(then, Settlement) else _REJECT

    def check(self) -> None:
        """Raise a :class:`SetupError` for a policy that the source cannot keep."""
        spec, can, where = self.spec, self.spec.capabilities, self.retry.where

        def refuse(what: str, fix: str) -> None:
            raise CapabilityError(f"{spec.destination!r} {what}", fix=fix)

        if Capability.ACK not in can:
            stored = "subscribe to a source that stores its messages"
            if spec.ack_policy not in (None, AckPolicy.MANUAL, AckPolicy.ACK_FIRST):
                refuse(
                    f"cannot acknowledge, so ack_policy={spec.ack_policy} has no meaning",
                    f"leave ack_policy out, or {stored}",
                )
            if spec.breaker is not None:
                refuse("keeps no messages: a breaker would lose them", stored)
        if not self.retries:
            return
        if where == "broker" and Capability.NACK_DELAY not in can:
            refuse(
                "cannot delay a redelivery, so Retry(where='broker') is impossible",
                "use where='lane' or 'auto'",
            )
        if where == "topic" and (Capability.RETRY_TOPIC not in can or spec.batch is not None):
            refuse(
                "has no retry topics, so Retry(where='topic') is impossible",
                "use where='lane' or 'auto'",
            )

    def retrying(
        self, call: Call, respond: Callable[[Message[Any], Any], Awaitable[None]] | None = None
    ) -> Call:
        """Retries in place, of the handler and what publishes its result: the lane waits, so the
        order is kept."""
        retry, clock = self.retry, self.broker.clock

        async def call_again(message: Message[Any]) -> Any:
            while True:
                try:
                    result = await call(message)
                    if result is not None and respond is not None:
                        await respond(message, result)
                    return None
                except (HandlerException, StopConsume, DecodeError, HandlerNotFound):
                    raise
                except Exception as error:
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        raise asyncio.CancelledError from error  # the handler hid it
                    attempt = message.attempt
                    if isinstance(error, BatchFailed) and isinstance(message, BatchMessage):
                        if not await self._shrunk(message, error, attempt):
                            return None
                    elif message.settled is not None or not retry.again(error, attempt):
                        raise
                    else:
                        _undo(message)
                    delay = retry.backoff(attempt)
                    self.count += 1
                    self.log(message, error, self._again(attempt, delay))
                    await clock.sleep(delay)
                    await self._only_ours(message)
                    message.tries = attempt + 1
                    for one in message.messages if isinstance(message, BatchMessage) else ():
                        one.tries = attempt + 1

        return call_again

    async def _only_ours(self, message: Message[Any]) -> None:
        """Leave alone what became another process's meanwhile: its attempts are counted there.

        Raises:
            SkipMessage: nothing is left.
        """
        ours = self.subscription.ours
        if ours is None:
            return
        batch = message.messages if isinstance(message, BatchMessage) else [message]
        asked = [one.raw for one in batch if one.settled is None]
        left = set(map(id, await ours(asked)))
        batch[:] = [one for one in batch if one.settled is not None or id(one.raw) in left]
        if not batch:
            raise SkipMessage

    async def _shrunk(self, batch: BatchMessage, error: BatchFailed, attempt: int) -> bool:
        """Leave in a batch what is to be tried again; False if that is nothing."""
        left: list[Message[Any]] = []
        for index, message in enumerate(batch.messages):
            why = error.errors.get(index)
            if why is not None and self.retry.again(why, attempt):
                left.append(message)
            elif why is not None:
                await self.handle(message, why)
            else:
                await self._done(message)
        batch.messages[:] = left
        return bool(left)

    async def _done(self, message: Message[Any]) -> None:
        """Acknowledge a good message of a batch; the others have their turn also if that fails."""
        try:
            if message.settled is None:
                await message.settle(_ACK)
        except Exception as error:
            self.subscription.report("cannot settle", error)

    def _again(self, attempt: int, delay: float) -> str:
        return f"attempt {attempt} of {self.retry.attempts} failed, again in {delay:.3g} s"

    async def taken(self, message: Message[Any]) -> bool:
        """Look at a message that is not plainly new, before its handler runs.

        Returns whether it was taken care of: replayed for another subscription, or one that
        crashes its worker.
        """
        if isinstance(message, BatchMessage):
            mine = [m for m in message.messages if not await self._skipped(m)]
            message.messages[:] = mine
            return not mine
        return await self._skipped(message) or (self.counts and await self._crashed(message))

    async def _skipped(self, message: Message[Any]) -> bool:
        to = message.headers.get(REPLAY_TO)
        if to is None or to in (self.identity, self.name):
            return False
        await message.settle(_ACK)
        return True

    async def _crashed(self, message: Message[Any]) -> bool:
        """Bury a message whose last attempt was begun and never ended.

        It ended neither well nor with an error: it took its process down with it. Where the
        note of that is lost, twice as many deliveries as attempts have to do.
        """
        attempt, most, intake = message.attempt, self.retry.attempts, message.link.intake
        if attempt < most or intake is None:
            return False
        begun = await intake.begun(message.raw)
        if attempt == most or not (begun or attempt > 2 * most):
            return False
        if self.once is not None and not await self.once.missing(message):
            return False  # it was handled, and only its acknowledgement was lost
        error = CrashedWorker(f"{attempt - 1} attempts ended with the process that made them")
        self.count += 1
        if self.dead_letter is not None:
            await self._bury(message, error, attempt - 1)
        else:
            self.log(message, error, _OUTCOMES[self.last_resort])
            await message.settle(self.last_resort)
        return True

    async def abandoned(self, message: Message[Any]) -> None:
        """A handler was cancelled at the end of the drain: hand its message back."""
        self.subscription.returned += 1
        if message.settled is None and self.row.cancelled is not _NONE:
            task = asyncio.ensure_future(message.settle(self.row.cancelled))
            task.add_done_callback(_seen)  # it may fail later than is waited for
            try:
                async with asyncio.timeout(1):
                    await asyncio.shield(task)
            except Exception as error:
                task.cancel()
                self.subscription.report("cannot hand back", error)

    async def handle(self, message: Message[Any], error: BaseException) -> None:
        """Everything that follows an exception; never on the way of a success."""
        try:
            await self._fail(message, error)
        except Exception as second:
            # The broker is away or refuses: unsettled messages come back by its deadline.
            self.subscription.report(f"cannot settle after {type(error).__name__}", second)

    async def _fail(self, message: Message[Any], error: BaseException) -> None:
        if isinstance(error, HandlerException):
            await self._settle_as_told(message, error)
            return
        if isinstance(error, StopConsume | StopApplication):
            try:  # before anything else gets a turn: the next message may be here already
                await self.subscription.take_no_more()
            finally:
                self.broker.spawn(
                    self.subscription.end_with(message, stop=isinstance(error, StopConsume))
                )
            if isinstance(error, StopApplication):
                self.broker.stop_application()
            return
        self.count += 1
        if not isinstance(error, BatchFailed):
            _undo(message)
        if self.broker.probe is not None:
            self.broker.probe.failed(error)
        if isinstance(message, BatchMessage) and await self._part(message, error):
            return
        poison = isinstance(error, DecodeError | HandlerNotFound)
        attempt = message.attempt
        if message.settled is not None:
            self.log(message, error, "failed after it was settled")
        elif (
            self.retries and not self.retry_here and not poison and self.retry.again(error, attempt)
        ):
            delay = self.retry.backoff(attempt)
            self.log(message, error, self._again(attempt, delay))
            if self.retry.where == "topic":
                await message.settle(_NACK, delay, attempt=attempt)
            else:
                await message.settle(_NACK, delay)
            return
        elif self.dead_letter is not None and (poison or self.policy is AckPolicy.RETRY):
            await self._bury(message, error, attempt)
        else:
            how = self.row.decode_error if poison else self.row.error
            if self.policy is AckPolicy.RETRY and how is _NACK:
                how = self.last_resort
            wait = self.retry.backoff(attempt) if how is _NACK else None
            self.log(
                message, error, _OUTCOMES[how] if self.row is not UNSETTLED else "failed, dropped"
            )
            if how is not _NONE:
                await message.settle(how, wait)
        await self._answer_failure(message, error)

    async def _settle_as_told(self, message: Message[Any], error: HandlerException) -> None:
        options = dict(error.options)
        delay = options.pop("delay", None)
        if isinstance(error, SkipMessage) or self.row is UNSETTLED:
            return
        if isinstance(error, AckMessage):
            await message.settle(_ACK, **options)
        elif isinstance(error, RejectMessage):
            await message.settle(_REJECT, **options)
        elif isinstance(error, NackMessage):
            # Without a delay of its own, the retry's: no policy redelivers in a hot loop.
            await message.settle(
                _NACK, self.retry.backoff(message.attempt) if delay is None else delay, **options
            )

    async def _part(self, batch: BatchMessage, error: BaseException) -> bool:
        """Part the bad messages of a batch from the good; each has a fate of its own."""
        if isinstance(error, BatchFailed):
            for index, message in enumerate(batch.messages):
                if index in error.errors:
                    await self.handle(message, error.errors[index])
                else:
                    await self._done(message)
            return True
        read = self.subscription.plans[0].read_one
        if isinstance(error, DecodeError) and read is not None and len(batch.messages) > 1:
            good: list[Any] = []
            bad: list[tuple[Message[Any], DecodeError]] = []
            for message in batch.messages:
                try:
                    read(message)
                    good.append(message.raw)
                except DecodeError as reason:
                    bad.append((message, reason))
            for message, why in bad:
                await self.handle(message, why)
            if good and bad:
                await self.subscription.deliver(good)
            return bool(bad)
        if len({message.attempt for message in batch.messages}) > 1:
            # Some have had their last attempt, others have not.
            for message in batch.messages:
                await self.handle(message, error)
            return True
        return False

    async def _bury(self, message: Message[Any], error: BaseException, attempt: int) -> None:
        """Publish to the dead letter, and settle the original only when that is confirmed."""
        assert self.dead_letter is not None
        messages = message.messages if isinstance(message, BatchMessage) else [message]
        driver = self.broker.driver
        try:
            if self._address is None:
                self._address = await driver.dead_letter(self.spec, self.dead_letter.destination)
            for single in messages:
                if single.settled is not None:
                    continue
                command = driver.command()
                command.destination = self._address
                command.message = single.body
                command.timeout = self.broker.publish_timeout
                single.carry(command)
                cause = self._cause(single, error, attempt) if self.dead_letter.headers else {}
                control, dropped = driver.control_headers, {REPLAY_TO, *(CAUSE if cause else ())}
                headers = {
                    k: v
                    for k, v in single.headers.items()
                    if k not in dropped and not (control and k.startswith(control))
                }
                await self._send_fitting(command, single.body, headers, cause)
                await single.settle(_ACK)
                self.dead_lettered += 1
        except Exception as second:
            delay = self.retry.backoff(attempt)
            self.log(
                message,
                error,
                f"failed, and its dead letter too ({second}); again in {delay:.3g} s",
            )
            if Capability.NACK in self.spec.capabilities:
                await message.settle(_NACK, delay)
            return
        self.log(
            message,
            error,
            f"failed for good after attempt {attempt}, now in {self._address}",
        )

    async def _send_fitting(
        self, command: Any, body: bytes, headers: dict[str, str], cause: dict[str, str]
    ) -> None:
        """Send a letter; where it is too large with all of its cause, with less of it."""
        kept = ("message_id", "ms-error-type", "ms-origin", "ms-handler", "ms-source")
        essential = {k: cause[k] for k in kept if k in cause}
        short = {k: v for k, v in cause.items() if k not in ("ms-traceback", "ms-got")}
        for part in (cause, short, essential):
            try:
                await self._send_letter(command, body, headers | part)
                return
            except MessageTooLarge:
                continue
        await self._send_letter(command, body, {})

    def _cause(self, message: Message[Any], error: BaseException, attempt: int) -> dict[str, str]:
        cause = {
            "ms-error": str(error)[:2000],
            "ms-error-type": type(error).__name__,
            "ms-traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:],
            "ms-origin": message.destination,
            "ms-attempts": str(attempt),
            "ms-failed-at": datetime.fromtimestamp(self.broker.clock.wall(), UTC).isoformat(),
            "ms-handler": self.name,
            "ms-source": self.spec.destination,
            # Where a broker's own control header held it, it would be lost.
            "message_id": message.message_id,
        }
        if isinstance(error, DecodeError):
            cause |= {"ms-path": error.path, "ms-expected": error.expected, "ms-got": error.got}
        return {name: one_line(value) for name, value in cause.items() if value}

    async def _answer_failure(self, message: Message[Any], error: BaseException) -> None:
        """Tell who waits for an answer that there will be none."""
        if Capability.REPLY not in self.spec.capabilities or self.spec.no_reply or self.spec.batch:
            return
        if not message.reply_to:
            return
        command = self.broker.driver.command()
        command.answer(message)
        command.timeout = self.broker.publish_timeout
        headers = {"ms-error": one_line(str(error)[:2000]), "ms-error-type": type(error).__name__}
        if command.correlation_id:
            headers["correlation_id"] = command.correlation_id
        await self.broker.driver.publish(command, b"", headers)

    def log(self, message: Message[Any], error: BaseException, outcome: str) -> None:
        """One line; in a storm, one a second that counts those it stands for."""
        more = self._rate.admit(self.broker.clock.now())
        if more is None:
            return
        text = f"{outcome}: {type(error).__name__}: {error} [{message.destination}]{more}"
        if isinstance(error, DecodeError | HandlerNotFound | CrashedWorker):
            # Nobody's code failed, so a traceback would say nothing.
            self.subscription.say("error", text)
        else:
            log_error(self.broker.logger, f"{self.name}: {text}", error)


def _undo(message: Message[Any]) -> None:
    """Drop what a failed attempt published, where that goes out with the settlement only."""
    intake = message.link.intake
    if isinstance(intake, Undoing):
        intake.undo(message.raw)


def _seen(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


_OUTCOMES = {
    _ACK: "failed, acknowledged all the same",
    _NACK: "failed, will be delivered again",
    _REJECT: "failed, dropped",
    _NONE: "failed, left unsettled",
}
