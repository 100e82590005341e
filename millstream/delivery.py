"""From a raw message to its settlement: the hot path of one subscription, compiled.

What may differ between subscriptions is decided here, once; ``deliver`` itself is written
out so that a message costs few calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from . import killpoints
from .ack import Settlement
from .body import reader
from .breaker import Circuit
from .clock import Clock
from .dedup import Once
from .driver import Capability, Sink
from .errors import HandlerNotFound, SetupError, StopApplication
from .message import BatchMessage, Link, Message, current
from .middleware import Call, fold_consume
from .params import MISSING
from .plan import Plan, Site, compile_plan
from .publisher import Publication, Response
from .sending import sender
from .signature import read_params
from .subscriber import Entry

if TYPE_CHECKING:
    from .subscription import Subscription

_NONE = Settlement.NONE
Respond = Callable[[Message[Any], Any], Awaitable[None]]


class Delivery:
    """The plans of a subscription's handlers and the function that takes raw messages.

    Raises:
        SetupError: something about the declaration is wrong.
    """

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.spec, self.scope = subscription.spec, subscription.scope
        self.broker = subscription.broker
        self.link = Link(self.broker.driver, self.spec, subscription.name)
        self.plans: list[Plan] = []
        entries = subscription.subscriber.entries
        table = [(entry, *self._process(entry)) for entry in entries]
        self._only_one_takes_all(entries)
        _, call, respond = table[0]
        if len(table) > 1 or entries[0].filter is not None:
            call, respond = self._choose(table), None
        failing = subscription.failing
        if self.spec.deduplicate is not None:
            call, respond = _both(call, respond), None
            # What tells the keys of this subscription from those of others in one store.
            scope = f"{self.spec.destination}/{subscription.name}"
            failing.once = Once(self.spec.deduplicate, scope, self.broker.clock, call)
            call = failing.once.run
        if self.spec.breaker is not None:
            # What cannot be published tells of an outage as well.
            circuit = Circuit(self.spec.breaker, subscription)
            call, respond = circuit.guard(_both(call, respond)), None
        if failing.retry_here:
            call, respond = failing.retrying(call, respond), None
        call = killpoints.around("handler", call)
        parser = entries[0].parser or self.spec.parser or self.scope.parser
        after = next((p.after for p in self.plans if p.after is not None), None)
        self.has_dependencies = any(plan.has_dependencies for plan in self.plans)
        self.deliver: Sink = self._deliverer(call, respond, parser, after)

    def _only_one_takes_all(self, entries: list[Entry]) -> None:
        plain = [e for e in entries if e.filter is None]
        if len(plain) > 1:
            raise SetupError(
                f"{len(plain)} handlers of one subscription take every message: "
                + ", ".join(f"{e.handler.name} ({e.handler.where})" for e in plain),
                code="MS126",
                fix="give all but the last a filter=..., or declare a subscriber for each",
            )

    def _process(self, entry: Entry) -> tuple[Call, Respond | None]:
        """The folded call of one handler, and what publishes its result."""
        handler, scope, spec, broker = entry.handler, self.scope, self.spec, self.broker
        site = Site(
            name=handler.name,
            where=handler.where,
            spec=spec,
            address=self.link.address,
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
        if len(self.subscription.subscriber.entries) > 1:
            # Whose annotation would hold? Filters, too, ask before a handler is chosen.
            self.link.decode = reader(site, Any, MISSING)
        else:
            self.link.decode = plan.read
        call = plan.call
        if spec.handler_timeout is not None:
            call = _timed(call, spec.handler_timeout, broker.clock)
        call = fold_consume(
            (*scope.middlewares, *spec.middlewares, *broker.test_middlewares), call, site
        )
        publications = [p.publication(scope.chain) for p in handler.publishers]
        replies = Capability.REPLY in spec.capabilities and not spec.no_reply and spec.batch is None
        self.link.site = site
        return call, self._responder(publications, replies, site)

    def _responder(
        self, publications: list[Publication], replies: bool, site: Site
    ) -> Respond | None:
        if not publications and not replies:
            return None
        if not replies and len(publications) == 1:
            return publications[0].result
        send = sender(self.broker, site.codec, self.scope.middlewares)
        kind = self.broker.driver.command

        async def respond(message: Message[Any], result: Any) -> None:
            for publication in publications:
                await publication.result(message, result)
            if replies and message.reply_to:
                if isinstance(result, Response):
                    command = result.command(kind)
                else:
                    command = kind(message=result)
                command.answer(message)
                await send(command)

        return respond

    def _choose(self, table: list[tuple[Entry, Call, Respond | None]]) -> Call:
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

    def _deliverer(
        self,
        call: Call,
        respond: Respond | None,
        parser: Callable[..., Any] | None,
        after: Callable[[Message[Any]], Awaitable[None]] | None,
    ) -> Sink:
        """The function that a driver or a lane awaits for each message: the hot path."""
        me, link, envelope = self.subscription, self.link, self.spec.envelope
        row = me.failing.row
        batch = self.spec.batch is not None
        before, success = row.before, row.success
        first, settles = before is not _NONE, success is not _NONE
        counts, taken = me.failing.counts, me.failing.taken
        keep = self.spec.ack_wait is not None and Capability.TOUCH in self.spec.capabilities
        running = me.running
        set_current, reset_current = current.set, current.reset
        failed, now = me.failing.handle, self.broker.clock.now
        parse = _parser(parser, envelope, link) if parser is not None else None

        async def deliver(raw: Any) -> None:
            if batch:
                message: Message[Any] = BatchMessage(raw, envelope, link)
            else:
                message = envelope(raw, link)
            me.in_flight += 1
            token = set_current(message)
            try:
                if parse is not None:
                    message = await parse(message.raw)
                    set_current(message)
                if keep:
                    running.add(message)
                if first:
                    await message.settle(before)
                if (message.unusual if counts else message.marked) and await taken(message):
                    return
                result = await call(message)
                if result is not None and respond is not None:
                    await respond(message, result)
                if settles and message.settled is None:
                    try:
                        if batch:
                            await message.settle(success)
                        else:
                            message.settled = success
                            await link.intake.settle(raw, success, None)  # type: ignore[union-attr]
                    except Exception as error:
                        me.report("cannot settle", error)
                me.handled += 1
            except asyncio.CancelledError:
                await me.failing.abandoned(message)
                raise
            except (Exception, StopApplication) as error:
                await failed(message, error)
            finally:
                reset_current(token)
                if keep:
                    running.discard(message)
                me.in_flight -= 1
                me.last_message = now()
                if me.idle is not None and not me.in_flight:
                    me.idle.set()
                if after is not None:
                    await self._afterwards(after, message)

        return deliver

    async def _afterwards(
        self, after: Callable[[Message[Any]], Awaitable[None]], message: Message[Any]
    ) -> None:
        try:
            await after(message)
        except Exception as error:
            self.subscription.report(f"after the message: {type(error).__name__}", error)


def _both(call: Call, respond: Respond | None) -> Call:
    """The handler and what publishes its result, as one call."""
    if respond is None:
        return call

    async def both(message: Message[Any]) -> None:
        result = await call(message)
        if result is not None:
            await respond(message, result)

    return both


def _timed(call: Call, seconds: float, clock: Clock) -> Call:
    async def timed(message: Message[Any]) -> Any:
        limit = asyncio.timeout(None)
        try:
            async with limit:
                loop = asyncio.get_running_loop()
                timer = clock.call_later(seconds, lambda: limit.reschedule(loop.time()))
                try:
                    return await call(message)
                finally:
                    timer.cancel()
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"the handler ran longer than {seconds:g} s") from None
            raise

    return timed


def _parser(
    parser: Callable[..., Any], envelope: type[Message[Any]], link: Link
) -> Callable[[Any], Awaitable[Message[Any]]]:
    """The user's parser, with the driver's own as its second argument if it takes one."""
    two = len([p for p in read_params(parser)[0] if p.default is MISSING]) >= 2

    async def original(raw: Any) -> Message[Any]:
        return envelope(raw, link)

    async def parse(raw: Any) -> Message[Any]:
        made = parser(raw, original) if two else parser(raw)
        message: Message[Any] = await made if hasattr(made, "__await__") else made
        return message

    return parse
