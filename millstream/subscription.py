"""A subscription as it runs: from a raw message to its settlement."""

from __future__ import annotations

import asyncio
import enum
import operator
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from .ack import TABLE, UNSETTLED, AckPolicy, Row, Settlement
from .driver import Capability, Intake, Sink, SubscriptionSpec
from .endpoints import Scope
from .errors import (
    AckMessage,
    CapabilityError,
    DecodeError,
    HandlerException,
    HandlerNotFound,
    NackMessage,
    RejectMessage,
    SetupError,
    SkipMessage,
    StopApplication,
    StopConsume,
)
from .lanes import Lanes
from .log import log_error, log_line
from .message import BatchMessage, Link, Message, current
from .middleware import Call, fold_consume
from .plan import Plan, Site, compile_plan
from .publisher import Publication, Response
from .retry import DEFAULT_RETRY, DeadLetter, Exponential, Retry
from .subscriber import Entry, Subscriber

if TYPE_CHECKING:
    from .broker import Broker

_ACK, _NACK, _REJECT, _NONE = Settlement.ACK, Settlement.NACK, Settlement.REJECT, Settlement.NONE
_TRACEBACK_LIMIT = 8 * 1024
#: How a subscription that was lost comes back.
_RECOVERY = Exponential(0.2, cap=15.0, jitter=0.5)


class SubscriptionState(enum.Enum):
    """Where a subscription is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    RETRYING = "retrying"
    PAUSED = "paused"
    FAILED = "failed"
    STOPPED = "stopped"


class _NotYet:
    """Stands for the intake until the driver returned it: a message may be faster."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ready = asyncio.Event()

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        await self.ready.wait()
        assert self.link.intake is not None
        await self.link.intake.settle(raw, how, delay, **options)

    async def touch(self, raw: Any, /) -> None:
        await self.ready.wait()
        assert self.link.intake is not None
        await self.link.intake.touch(raw)

    async def pause(self) -> int:
        return 0

    async def close(self) -> None:
        return None


class Subscription:
    """One subscription of a broker, its plan, its lanes and its counters."""

    def __init__(self, subscriber: Subscriber, scope: Scope, broker: Broker) -> None:
        self.subscriber, self.scope, self.broker = subscriber, scope, broker
        spec = subscriber.spec
        self.spec: SubscriptionSpec = spec.prefixed(scope.prefix) if scope.prefix else spec
        handlers = subscriber.handlers
        self.name = handlers[0].name if handlers else "(no handler)"
        self.where = handlers[0].where if handlers else ""
        self.state = SubscriptionState.STOPPED
        self.in_flight = 0
        self.handled = self.failures = self.dead_lettered = 0
        #: Clock time of the last message's end; 0 if there was none.
        self.last_message = 0.0
        self.finished = self.returned = 0
        self.plans: list[Plan] = []
        self.include_in_schema = self.spec.include_in_schema and scope.include_in_schema
        self._resolve()
        self._intake: Intake | None = None
        self._lanes: Lanes | None = None
        self._inbox: deque[Message[Any]] | None = None
        self._arrived: asyncio.Event | None = None
        self._taken: asyncio.Event | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._running: set[Message[Any]] = set()
        self._dead_letter_address: str | None = None
        self._idle: asyncio.Event | None = None
        self._limit: asyncio.Timeout | None = None
        self._now = False

    def _resolve(self) -> None:
        """The policy, retry and dead letter in force, from what is said and what is possible."""
        spec, scope = self.spec, self.scope
        can = spec.capabilities
        said = spec.ack_policy or scope.ack_policy
        self.policy = said or AckPolicy.RETRY
        self.row: Row = TABLE[self.policy] if Capability.ACK in can else UNSETTLED
        asked = spec.retry or scope.retry
        self.retry: Retry = asked or DEFAULT_RETRY
        #: Retried at all: by default where the source can redeliver, elsewhere only if asked for.
        self.retries = self.policy is AckPolicy.RETRY and (
            Capability.NACK in can or asked is not None
        )
        where = self.retry.where
        if where == "auto":
            delayed = Capability.NACK_DELAY in can and spec.ordered_by is None
            where = "broker" if delayed else "lane"
        self.retry_here = self.retries and where == "lane"
        named = scope.dead_letter if spec.dead_letter is msgspec.UNSET else spec.dead_letter
        then = self.retry.then
        if isinstance(then, DeadLetter):
            named = then
        self.dead_letter: DeadLetter | None
        if named is msgspec.UNSET:
            wanted = self.policy is AckPolicy.RETRY and Capability.NACK in can
            self.dead_letter = DeadLetter() if wanted and not isinstance(then, Settlement) else None
        elif isinstance(named, str):
            self.dead_letter = DeadLetter(named)
        else:
            self.dead_letter = named
        self.last_resort = then if isinstance(then, Settlement) else _REJECT

    # Compile

    def compile(self) -> None:
        """Make the plan.

        Raises:
            SetupError: something about the declaration is wrong.
        """
        spec = self.spec
        where = f"{self.name} ({self.where})"
        try:
            spec.check()
            self._check()
            self.address = self.broker.driver.syntax.compile(spec.destination)
        except SetupError as error:
            error.where = error.where or where
            raise
        self._link = Link(self.broker.driver, spec, self.name)
        entries = self.subscriber.entries
        table = [(entry, *self._process(entry)) for entry in entries]
        plain = [e for e, _, _ in table if e.filter is None]
        if len(plain) > 1:
            raise SetupError(
                f"{len(plain)} handlers of one subscription take every message: "
                + ", ".join(f"{e.handler.name} ({e.handler.where})" for e in plain),
                code="MS126",
                where=where,
                fix="give all but the last a filter=..., or declare a subscriber for each",
            )
        _, call, respond = table[0]
        if len(table) > 1 or entries[0].filter is not None:
            call, respond = self._choose(table), None
        parser = entries[0].parser or spec.parser or self.scope.parser
        after = next((p.after for p in self.plans if p.after is not None), None)
        if self.retry_here:
            call = self._retrying(call)
        self.deliver: Sink = self._deliverer(call, respond, parser, after)
        if self.broker.probe is not None:
            self.deliver = self.broker.probe.around(self.deliver)
        self._seen_overrides = dict(self.broker.dependency_overrides)
        if any(plan.has_dependencies for plan in self.plans):
            self.deliver = self._watching_overrides(self.deliver)

    def _check(self) -> None:
        spec, can = self.spec, self.spec.capabilities
        if spec.lanes < 1:
            raise SetupError(f"concurrency={spec.lanes}", code="MS127", fix="1 or more")
        said = spec.ack_policy or self.scope.ack_policy
        if (
            spec.ack_policy is not None
            and Capability.ACK not in can
            and said not in (AckPolicy.MANUAL, AckPolicy.ACK_FIRST)
        ):
            raise CapabilityError(
                f"{spec.destination!r} cannot acknowledge, so ack_policy={said} has no meaning",
                fix="leave ack_policy out, or subscribe to a source that stores its messages",
            )
        if self.retry.where == "broker" and self.retries and Capability.NACK_DELAY not in can:
            raise CapabilityError(
                f"{spec.destination!r} cannot delay a redelivery, so Retry(where='broker') is impossible",
                fix="use where='lane' or 'auto'",
            )
        if spec.ordered_by is not None and spec.batch is not None:
            raise SetupError("ordered_by and batch exclude each other", code="MS128")

    def _process(
        self, entry: Entry
    ) -> tuple[Call, Callable[[Message[Any], Any], Awaitable[None]] | None]:
        """The folded call of one handler, and what publishes its result."""
        handler, scope, spec, broker = entry.handler, self.scope, self.spec, self.broker
        site = Site(
            name=handler.name,
            where=handler.where,
            spec=spec,
            address=self.address,
            codec=spec.codec or scope.codec,
            context=broker.context,
            logger=broker.logger,
            broker=broker,
            app=broker.app,
            handler=handler,
            values=broker.values,
            sources=broker.sources,
            dependencies=(*scope.dependencies, *spec.dependencies, *entry.dependencies),
            overrides=broker.dependency_overrides,
            decoder=entry.decoder or spec.decoder or scope.decoder,
            inline=spec.inline,
            hints=handler.hints,
        )
        plan = compile_plan(handler.function, site)
        self.plans.append(plan)
        if self._link.decode is None:
            self._link.decode = plan.read
        call = plan.call
        if spec.handler_timeout is not None:
            call = _timed(call, spec.handler_timeout)
        call = fold_consume(
            (*scope.middlewares, *spec.middlewares, *broker.test_middlewares), call, site
        )
        publications = [p.publication(scope.chain) for p in handler.publishers]
        replies = Capability.REPLY in spec.capabilities and not spec.no_reply and spec.batch is None
        self._link.site = site
        return call, self._responder(publications, replies, site)

    def _responder(
        self, publications: list[Publication], replies: bool, site: Site
    ) -> Callable[[Message[Any], Any], Awaitable[None]] | None:
        if not publications and not replies:
            return None
        if not replies and len(publications) == 1:
            return publications[0].result
        send = self.broker.sender(site.codec, self.scope.middlewares)
        command_type = self.broker.driver.command

        async def respond(message: Message[Any], result: Any) -> None:
            for publication in publications:
                await publication.result(message, result)
            if replies:
                reply_to = message.reply_to
                if reply_to:
                    command = command_type()
                    command.destination = reply_to
                    command.message = result
                    command.correlation_id = message.known_correlation_id
                    if isinstance(result, Response):
                        command.message = result.body
                        command.headers = result.headers
                        command.correlation_id = result.correlation_id or command.correlation_id
                    await send(command)

        return respond

    def _choose(
        self, table: list[tuple[Entry, Call, Callable[[Message[Any], Any], Awaitable[None]] | None]]
    ) -> Call:
        """The handler whose filter takes the message; one without a filter takes the rest."""
        ordered = [row for row in table if row[0].filter is not None]
        ordered += [row for row in table if row[0].filter is None]
        choices = [(entry.filter, call, respond) for entry, call, respond in ordered]

        async def choose(message: Message[Any]) -> Any:
            for accepts, call, respond in choices:
                if accepts is not None:
                    yes = accepts(message)
                    if hasattr(yes, "__await__"):
                        yes = await yes
                    if not yes:
                        continue
                result = await call(message)
                if respond is not None and result is not None:
                    await respond(message, result)
                return None
            raise HandlerNotFound(f"no handler of {self.spec.destination!r} accepts the message")

        return choose

    def _retrying(self, call: Call) -> Call:
        """Retries in place: the lane waits, so the order is kept."""
        retry, clock = self.retry, self.broker.clock

        async def call_again(message: Message[Any]) -> Any:
            attempt = message.attempt
            while True:
                try:
                    return await call(message)
                except (HandlerException, StopConsume, DecodeError, HandlerNotFound):
                    raise
                except Exception as error:
                    if not retry.again(error, attempt):
                        raise
                    delay = retry.backoff(attempt)
                    self._log_failure(
                        message,
                        error,
                        f"attempt {attempt} of {retry.attempts} failed, again in {delay:.3g} s",
                    )
                    await clock.sleep(delay)
                    attempt += 1

        return call_again

    def _watching_overrides(self, deliver: Sink) -> Sink:
        """Compile anew when a test replaces a dependency."""
        overrides = self.broker.dependency_overrides

        async def watching(raw: Any) -> None:
            if overrides != self._seen_overrides:
                self.plans.clear()
                intake = self._link.intake
                self.compile()
                self._link.intake = intake
                await self.broker.values.open(self.broker.stack)
                await self.deliver(raw)
                return
            await deliver(raw)

        return watching

    # Run

    def _deliverer(
        self,
        call: Call,
        respond: Callable[[Message[Any], Any], Awaitable[None]] | None,
        parser: Callable[..., Any] | None,
        after: Callable[[Message[Any]], Awaitable[None]] | None,
    ) -> Sink:
        """The function that a driver or a lane awaits for each message: the hot path."""
        link, envelope, row = self._link, self.spec.envelope, self.row
        batch = self.spec.batch is not None
        before, success = row.before, row.success
        first, settles = before is not _NONE, success is not _NONE
        keep = self.spec.ack_wait is not None and Capability.TOUCH in self.spec.capabilities
        running = self._running
        set_current, reset_current = current.set, current.reset
        failed, now = self._failed, self.broker.clock.now
        parse = _parser(parser, envelope, link) if parser is not None else None

        async def deliver(raw: Any) -> None:
            if batch:
                message: Message[Any] = BatchMessage([envelope(r, link) for r in raw], link)
            elif parse is not None:
                message = await parse(raw)
            else:
                message = envelope(raw, link)
            self.in_flight += 1
            token = set_current(message)
            if keep:
                running.add(message)
            try:
                if first:
                    await message.settle(before)
                result = await call(message)
                if result is not None and respond is not None:
                    await respond(message, result)
                if settles and message.settled is None:
                    if batch:
                        await message.settle(success)
                    else:
                        message.settled = success
                        try:
                            await link.intake.settle(raw, success, None)  # type: ignore[union-attr]
                        except Exception as error:
                            log_error(
                                self.broker.logger, f"{self.name}: cannot settle: {error}", error
                            )
                self.handled += 1
            except asyncio.CancelledError:
                await self._abandoned(message)
                raise
            except (Exception, StopApplication) as error:
                await failed(message, error)
            finally:
                reset_current(token)
                if keep:
                    running.discard(message)
                self.in_flight -= 1
                self.last_message = now()
                if self._idle is not None and not self.in_flight:
                    self._idle.set()
                if after is not None:
                    await self._afterwards(after, message)

        return deliver

    async def _afterwards(
        self, after: Callable[[Message[Any]], Awaitable[None]], message: Message[Any]
    ) -> None:
        try:
            await after(message)
        except Exception as error:
            log_error(
                self.broker.logger,
                f"{self.name}: after the message: {type(error).__name__}: {error}",
                error,
            )

    async def _abandoned(self, message: Message[Any]) -> None:
        """A handler was cancelled at the end of the drain: hand its message back."""
        self.returned += 1
        if message.settled is None and self.row.cancelled is not _NONE:
            try:
                async with asyncio.timeout(1):
                    await asyncio.shield(asyncio.ensure_future(message.settle(self.row.cancelled)))
            except Exception as error:
                log_error(self.broker.logger, f"{self.name}: cannot hand back: {error}", error)

    async def _failed(self, message: Message[Any], error: BaseException) -> None:
        """Everything that follows an exception; never on the way of a success."""
        try:
            await self._fail(message, error)
        except Exception as second:
            # The broker is away or refuses: unsettled messages come back by its deadline.
            log_error(
                self.broker.logger,
                f"{self.name}: cannot settle after {type(error).__name__}: {second}",
                second,
            )

    async def _fail(self, message: Message[Any], error: BaseException) -> None:
        if isinstance(error, HandlerException):
            await self._settle_as_told(message, error)
            return
        if isinstance(error, StopConsume | StopApplication):
            if Capability.NACK in self.spec.capabilities:
                await message.settle(_NACK, 0.0)
            if isinstance(error, StopConsume):
                self.broker.spawn(self.stop(self.broker.clock.now() + self.broker.graceful_timeout))
            else:
                self.broker.stop_application()
            return
        self.failures += 1
        if self.broker.probe is not None:
            self.broker.probe.failed(error)
        if isinstance(error, DecodeError) and isinstance(message, BatchMessage):
            if await self._split(message, error):
                return
        poison = isinstance(error, DecodeError | HandlerNotFound)
        attempt = message.attempt
        if message.settled is not None:
            self._log_failure(message, error, "failed after it was settled")
        elif (
            self.retries and not self.retry_here and not poison and self.retry.again(error, attempt)
        ):
            delay = self.retry.backoff(attempt)
            self._log_failure(
                message,
                error,
                f"attempt {attempt} of {self.retry.attempts} failed, again in {delay:.3g} s",
            )
            await message.settle(_NACK, delay)
            return
        elif self.dead_letter is not None and (poison or self.policy is AckPolicy.RETRY):
            await self._bury(message, error, attempt)
        else:
            how = self.row.decode_error if poison else self.row.error
            if self.policy is AckPolicy.RETRY and how is _NACK:
                how = self.last_resort
            wait = self.retry.backoff(attempt) if how is _NACK else None
            self._log_failure(
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

    async def _split(self, batch: BatchMessage, error: DecodeError) -> bool:
        """Part the bad messages of a batch from the good, and handle the good ones."""
        read = self.plans[0].read_one
        if read is None or len(batch.messages) < 2:
            return False
        good: list[Any] = []
        for message in batch.messages:
            try:
                read(message)
                good.append(message.raw)
            except DecodeError as bad:
                await self._failed(message, bad)
        if len(good) == len(batch.messages):
            return False
        if good:
            await self.deliver(good)
        return True

    async def _bury(self, message: Message[Any], error: BaseException, attempt: int) -> None:
        """Publish to the dead letter, and settle the original only when that is confirmed."""
        assert self.dead_letter is not None
        messages = message.messages if isinstance(message, BatchMessage) else [message]
        driver = self.broker.driver
        try:
            if self._dead_letter_address is None:
                self._dead_letter_address = await driver.dead_letter(
                    self.spec, self.dead_letter.destination
                )
            for single in messages:
                if single.settled is not None:
                    continue
                command = driver.command()
                command.destination = self._dead_letter_address
                command.message = single.body
                command.timeout = self.broker.publish_timeout
                headers = {
                    k: v
                    for k, v in single.headers.items()
                    if not (driver.control_headers and k.startswith(driver.control_headers))
                }
                if self.dead_letter.headers:
                    headers.update(self._cause(single, error, attempt))
                await driver.publish(command, single.body, headers)
                await single.settle(_ACK)
                self.dead_lettered += 1
        except Exception as second:
            delay = self.retry.backoff(attempt)
            self._log_failure(
                message,
                error,
                f"failed, and its dead letter too ({second}); again in {delay:.3g} s",
            )
            if Capability.NACK in self.spec.capabilities:
                await message.settle(_NACK, delay)
            return
        self._log_failure(
            message,
            error,
            f"failed for good after attempt {attempt}, now in {self._dead_letter_address}",
        )

    def _cause(self, message: Message[Any], error: BaseException, attempt: int) -> dict[str, str]:
        cause = {
            "ms-error": str(error)[:2000],
            "ms-error-type": type(error).__name__,
            "ms-traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:],
            "ms-origin": message.destination,
            "ms-attempts": str(attempt),
            "ms-failed-at": datetime.fromtimestamp(self.broker.clock.wall(), UTC).isoformat(),
            "ms-handler": self.name,
        }
        if isinstance(error, DecodeError):
            cause |= {"ms-path": error.path, "ms-expected": error.expected, "ms-got": error.got}
        return {name: _one_line(value) for name, value in cause.items() if value}

    async def _answer_failure(self, message: Message[Any], error: BaseException) -> None:
        """Tell who waits for an answer that there will be none."""
        if Capability.REPLY not in self.spec.capabilities or self.spec.no_reply or self.spec.batch:
            return
        reply_to = message.reply_to
        if not reply_to:
            return
        command = self.broker.driver.command()
        command.destination = reply_to
        command.timeout = self.broker.publish_timeout
        headers = {"ms-error": _one_line(str(error)[:2000]), "ms-error-type": type(error).__name__}
        correlation_id = message.known_correlation_id
        if correlation_id:
            headers["correlation_id"] = correlation_id
        await self.broker.driver.publish(command, b"", headers)

    def _log_failure(self, message: Message[Any], error: BaseException, outcome: str) -> None:
        text = f"{self.name}: {outcome}: {type(error).__name__}: {error} [{message.destination}]"
        if isinstance(error, DecodeError | HandlerNotFound):
            # Nobody's code failed, so a traceback would say nothing.
            log_line(self.broker.logger, "error", text)
        else:
            log_error(self.broker.logger, text, error)

    # Life

    async def start(self) -> None:
        """Subscribe and begin to handle messages."""
        spec = self.spec
        self.state = SubscriptionState.STARTING
        sink: Sink = self.deliver
        if spec.lanes > 1 or spec.batch is not None or spec.ordered_by is not None:
            size = spec.batch.size if spec.batch is not None else 1
            self._lanes = Lanes(
                self._deliver_now,
                spec.lanes,
                limit=max(2 * size, 2),
                clock=self.broker.clock,
                key=self._key(),
                batch=spec.batch,
                name=self.name,
            )
            sink = self._lanes.submit
        elif any(plan.has_dependencies for plan in self.plans):
            sink = self._deliver_now
        await self._subscribe(sink)
        if spec.ack_wait is not None and Capability.TOUCH in spec.capabilities:
            self._keeper = asyncio.create_task(
                self._keep(spec.ack_wait / 2), name=f"{self.name}-keeper"
            )

    async def _deliver_now(self, raw: Any) -> None:
        await self.deliver(raw)

    async def _subscribe(self, sink: Sink) -> None:
        waiting = _NotYet(self._link)
        self._link.intake = waiting
        self._sink = sink
        self._intake = await self.broker.driver.subscribe(self.spec, sink, self._lost)
        self._link.intake = self._intake
        waiting.ready.set()
        self.state = SubscriptionState.RUNNING

    def _key(self) -> Callable[[Any], Hashable] | None:
        """The function from a raw message to the key whose order is kept."""
        by = self.spec.ordered_by
        if by is None:
            return None
        envelope, link = self.spec.envelope, self._link
        if callable(by):
            return lambda raw: by(envelope(raw, link))
        if by.startswith("header:"):
            header = by.removeprefix("header:")
            return lambda raw: envelope(raw, link).headers.get(header)
        if by in self.address.places:
            return lambda raw: envelope(raw, link).path[by]
        codec = self.spec.codec or self.scope.codec
        read = codec.decoder(msgspec.defstruct("Key", [(by, Any, None)]))
        field = operator.attrgetter(by)

        def key(raw: Any) -> Hashable:
            try:
                value = field(read(envelope(raw, link).body))
            except Exception:  # a poison body: any lane may find out
                return None
            return value if isinstance(value, Hashable) else repr(value)

        return key

    def _lost(self, error: Exception) -> None:
        """The driver gave the subscription up: build it anew, again and again."""
        if self.state in (SubscriptionState.RUNNING, SubscriptionState.STARTING):
            self.state = SubscriptionState.RETRYING
            log_line(
                self.broker.logger,
                "warning",
                f"{self.name}: lost {self.spec.destination}: {error}; subscribing anew",
            )
            self._recovery = asyncio.create_task(self._recover(), name=f"{self.name}-recovery")

    async def _recover(self) -> None:
        attempt = 0
        while self.state is SubscriptionState.RETRYING:
            attempt += 1
            await self.broker.clock.sleep(_RECOVERY(attempt))
            try:
                if self._intake is not None:
                    await self._intake.close()
                    self._intake = None
                await self.broker.driver.declare([self.spec])
                await self._subscribe(self._sink)
            except Exception as error:
                if attempt == 1:
                    log_line(self.broker.logger, "warning", f"{self.name}: not back yet: {error}")
                continue
            log_line(self.broker.logger, "info", f"{self.name}: back on {self.spec.destination}")

    async def _keep(self, interval: float) -> None:
        """Push back the ack deadlines of messages that run longer than half of them."""
        seen: set[Message[Any]] = set()
        while True:
            await self.broker.clock.sleep(interval / 2)
            for message in list(self._running):
                if message in seen and message.settled is None:
                    try:
                        await message.in_progress()
                    except Exception as error:
                        log_line(
                            self.broker.logger,
                            "warning",
                            f"{self.name}: cannot extend a deadline: {error}",
                        )
            seen = set(self._running)

    async def pause(self) -> None:
        """Stop taking messages; those that wait are handed back, those that run finish."""
        if self.state is SubscriptionState.RUNNING:
            self.state = SubscriptionState.PAUSED
            await self._stop_intake()
            if self._intake is not None:
                await self._idle_before(self.broker.clock.now() + self.broker.graceful_timeout)
                await self._intake.close()
                self._intake = None

    async def resume(self) -> None:
        """Take messages again."""
        if self.state is SubscriptionState.PAUSED:
            self.state = SubscriptionState.STARTING
            await self._subscribe(self._sink)

    async def _stop_intake(self) -> None:
        """No new message after this; what waits goes back where the source can take it back."""
        if self._intake is not None:
            self.returned += await self._intake.pause()
        if self._lanes is not None and Capability.NACK in self.spec.capabilities:
            for raw in self._lanes.take_back():
                await self._link.intake.settle(raw, _NACK, 0.0)  # type: ignore[union-attr]
                self.returned += 1

    async def _idle_before(self, deadline: float) -> None:
        """Wait until nothing runs, or the deadline (clock time) is there."""
        clock = self.broker.clock
        self._idle = asyncio.Event()
        timer = clock.call_later(max(deadline - clock.now(), 0.0), self._idle.set)
        try:
            while self.in_flight or (self._lanes is not None and not self._lanes.idle):
                if self._now or clock.now() >= deadline:
                    return
                self._idle.clear()
                await self._idle.wait()
                await asyncio.sleep(0)  # the lane that just finished takes its next item
        finally:
            timer.cancel()
            self._idle = None

    def hurry(self) -> None:
        """End a running drain now."""
        self._now = True
        if self._idle is not None:
            self._idle.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def stop(self, deadline: float) -> None:
        """Drain: stop the intake, hand back, finish what runs until the deadline, close."""
        if self.state is SubscriptionState.STOPPED:
            return
        self.state = SubscriptionState.STOPPED
        if self._recovery is not None:
            self._recovery.cancel()
        handled = self.handled
        try:
            async with asyncio.timeout(None) as self._limit:
                timer = self.broker.clock.call_later(
                    max(deadline - self.broker.clock.now(), 0.0), self.hurry
                )
                try:
                    await self._stop_intake()
                finally:
                    timer.cancel()
                    self._limit = None
        except TimeoutError:
            pass  # what still runs is cancelled below
        except Exception as error:
            log_error(self.broker.logger, f"{self.name}: cannot hand back: {error}", error)
        await self._idle_before(deadline)
        if self._lanes is not None:
            await self._lanes.close()
            self._lanes = None
        if self._intake is not None:
            await self._intake.close()
        if self._keeper is not None:
            self._keeper.cancel()
        await self._return_inbox()
        self._intake = None
        self.finished += self.handled - handled

    # Reading without a handler

    @property
    def open(self) -> bool:
        """Whether it takes messages."""
        return self.state is not SubscriptionState.STOPPED

    async def open_reader(self) -> None:
        """Subscribe for ``get_one`` and iteration."""
        spec = self.spec
        spec.check()
        self.address = self.broker.driver.syntax.compile(spec.destination)
        self._link = Link(self.broker.driver, spec, self.name)
        self._link.decode = self.broker.reader_of(spec.codec or self.scope.codec)
        self._inbox, self._arrived, self._taken = deque(), asyncio.Event(), asyncio.Event()
        self.state = SubscriptionState.STARTING
        await self._subscribe(self._keep_for_reader)

    async def _keep_for_reader(self, raw: Any) -> None:
        assert self._inbox is not None and self._arrived is not None and self._taken is not None
        while self._inbox and self.state is not SubscriptionState.STOPPED:
            self._taken.clear()
            await self._taken.wait()
        self._inbox.append(self.spec.envelope(raw, self._link))
        self._arrived.set()

    async def take(self, timeout: float | None) -> Message[Any] | None:
        """The next message, or None when the time is over or the subscription stopped."""
        assert self._inbox is not None and self._arrived is not None and self._taken is not None
        clock, over = self.broker.clock, False

        def expire() -> None:
            nonlocal over
            over = True
            self._arrived.set()  # type: ignore[union-attr]

        timer = clock.call_later(timeout, expire) if timeout is not None else None
        try:
            while not self._inbox:
                if over or self.state is SubscriptionState.STOPPED:
                    return None
                self._arrived.clear()
                await self._arrived.wait()
            message = self._inbox.popleft()
            self._taken.set()
            return message
        finally:
            if timer is not None:
                timer.cancel()

    async def _return_inbox(self) -> None:
        if self._inbox is None or self._arrived is None or self._taken is None:
            return
        self._taken.set()
        await asyncio.sleep(0)
        while self._inbox:
            message = self._inbox.popleft()
            if Capability.NACK in self.spec.capabilities:
                await message.settle(_NACK, 0.0)
                self.returned += 1
        self._arrived.set()

    def health(self) -> dict[str, Any]:
        """State and progress, for people and probes."""
        now = self.broker.clock.now()
        return {
            "source": self.spec.destination,
            "handler": self.name,
            "state": self.state.value,
            "in_flight": self.in_flight,
            "handled": self.handled,
            "failed": self.failures,
            "dead_lettered": self.dead_lettered,
            "seconds_since_last_message": round(now - self.last_message, 3)
            if self.last_message
            else None,
        }


_OUTCOMES = {
    _ACK: "failed, acknowledged all the same",
    _NACK: "failed, will be delivered again",
    _REJECT: "failed, dropped",
    _NONE: "failed, left unsettled",
}


def _one_line(value: str) -> str:
    """Header values are single lines on every broker."""
    return value.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def _timed(call: Call, seconds: float) -> Call:
    async def timed(message: Message[Any]) -> Any:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await call(message)
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"the handler ran longer than {seconds:g} s") from None
            raise

    return timed


def _parser(
    parser: Callable[..., Any], envelope: type[Message[Any]], link: Link
) -> Callable[[Any], Awaitable[Message[Any]]]:
    """The user's parser, with the driver's own as its second argument if it takes one."""
    from .params import MISSING
    from .signature import read_params

    two = len([p for p in read_params(parser)[0] if p.default is MISSING]) >= 2

    async def original(raw: Any) -> Message[Any]:
        return envelope(raw, link)

    async def parse(raw: Any) -> Message[Any]:
        made = parser(raw, original) if two else parser(raw)
        message: Message[Any] = await made if hasattr(made, "__await__") else made
        return message

    return parse
