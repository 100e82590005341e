"""How the messages of one subscription get from its session to the sink, and are acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..ack import Settlement
from ..base import Feed
from ..clock import Timer
from ..driver import Sink
from ..errors import ConnectError, SetupError
from .attempts import Attempts
from .connection import Connection
from .letters import dead_letters_of
from .line import Line
from .wire import (
    DUP,
    PUBACK,
    PUBCOMP,
    PUBREC,
    PUBREL,
    QOS_2,
    V5,
    V311,
    Incoming,
    reason_of,
    write_subscribe,
    write_unsubscribe,
)

if TYPE_CHECKING:
    from .driver import MqttDriver
    from .options import MqttSubscription

log = logging.getLogger("millstream.mqtt")

#: Messages that may wait here before the server has to.
HIGH = 512
_ACK, _NACK, _NONE = Settlement.ACK, Settlement.NACK, Settlement.NONE
_PUBACK, _PUBREC, _PUBCOMP = (bytes((kind, 2)) for kind in (PUBACK, PUBREC, PUBCOMP))


class Flow(Feed, Line):
    """One subscription: a session of its own, so that nobody else's messages hold it up.

    Acknowledgements leave in the order in which the messages came, as the standard wants it
    (MQTT 5.0, 4.6). A message that waits for its next attempt steps out of that order.
    """

    def __init__(
        self,
        driver: MqttDriver,
        spec: MqttSubscription,
        sink: Sink,
        lost: Callable[[Exception], None],
        client_id: str,
    ) -> None:
        Feed.__init__(self, spec.filter, self._counted if spec.qos else sink, log)
        Line.__init__(self, driver.settings, client_id, driver.changed, driver.report)
        self.driver, self.spec, self._deliver, self.give_up = driver, spec, sink, lost
        self.kept = spec.kept and not driver.clean_session
        self.clean_first = self.clean = not self.kept
        self.expiry = int(spec.session_expiry or driver.session_expiry) if self.kept else 0
        ahead = spec.receive_maximum or driver.receive_maximum or spec.prefetch
        self.receive_maximum = min(ahead, 65_535) if spec.qos else None
        #: Unsettled messages in the order they came by this connection.
        self._order: deque[Incoming] = deque()
        #: Unsettled messages that stepped out of that order, by their identifiers.
        self._aside: dict[int, Incoming] = {}
        #: Those of them that wait for their next attempt.
        self._timers: dict[Incoming, Timer] = {}
        #: Unsettled messages that came by an earlier connection, until they are sent again.
        self._open: dict[int, Incoming] = {}
        #: QoS 2: identifiers of messages that were handled and whose exchange goes on.
        self._handled: set[int] = set()
        self._epoch = 0
        self._was_there = False
        letters = dead_letters_of(spec)
        noted = f"{letters}-attempts"
        own = driver.syntax.compile(spec.destination).matches(f"{letters}/x")
        #: How topics of its own dead letters and notes begin, where they would come back.
        self._own = (f"{letters}/", f"{noted}/") if own else ()
        self._attempts = Attempts(driver, noted, client_id)

    async def start(self) -> None:
        """Connect and subscribe; a server that is away just now is waited for.

        Raises:
            SetupError: the server refuses the subscription.
            ConnectError: it does not let us in.
        """
        try:
            await self.open()
        except ConnectError as error:
            if error.permanent:
                raise
            self.reason = str(error)
            self.changed(self, False, self.reason)
            self.revive()

    # The line

    def welcomed(self, connection: Connection, present: bool, limits: dict[str, Any]) -> None:
        super().welcomed(connection, present, limits)
        self._epoch += 1
        connection.read_on(True)
        if not present:
            self._open.clear()
            self._handled.clear()

    async def established(self, present: bool) -> None:
        spec, version = self.spec, self.settings.version
        for wanted, missing in (
            (spec.shared, "shared"),
            (set("+#") & set(spec.filter), "wildcard"),
        ):
            if wanted and self.limits.get(f"{missing}_subscription_available") == 0:
                raise SetupError(
                    f"{spec.filter!r}: {self.settings.where} knows no {missing} subscriptions"
                )
        granted = self.limits.get("session_expiry_interval", self.expiry)
        if granted < self.expiry and not self._was_there:
            self.driver.report(
                f"{spec.filter!r}: the server keeps the session for {granted} s where "
                f"{self.expiry} were wanted"
            )
        if present and self._was_there and version == V311:
            return  # it is in the session, and would have its retained messages sent again
        options = spec.qos
        if version == V5:
            handling = {"send": 0, "new": 1, "never": 2}[spec.retained or self._retained]
            options |= spec.no_local << 2 | spec.retain_as_published << 3 | handling << 4
        filters = [(spec.filter, options)]
        codes, reason = await self.ask(lambda mid: write_subscribe(version, mid, filters))
        if not codes or codes[0] >= 128:
            raise self._refusal(codes[0] if codes else 128, reason)
        if codes[0] < spec.qos:
            text = f"{spec.filter!r}: the server gives QoS {codes[0]} where {spec.qos} was wanted"
            self.driver.report(text)
        if self._was_there and self.kept and not present:
            log.warning(
                "the server had lost the session %r with what it kept; it is made again",
                self.client_id,
            )
        self._was_there = True

    @property
    def _retained(self) -> str:
        return "new" if self.kept else "send"

    def _refusal(self, code: int, reason: str) -> SetupError:
        fix = "grant the user the right to read there" if code in (0x80, 0x87) else ""
        what = reason_of(code, reason)
        return SetupError(f"{self.spec.filter!r}: the server refuses: {what}", fix=fix)

    def broken(self, error: Exception) -> None:
        if not self.closed:
            self.give_up(error)

    def dropped(self) -> None:
        self._open.update({message.mid: message for message in self._order})
        self._open.update(self._aside)
        self._order.clear()
        self._aside.clear()

    def received(self, message: Incoming) -> None:
        mid = message.mid
        if mid:
            if self.paused:
                return  # never acknowledged: the session brings it again
            if message.flags & DUP and self._known_already(message):
                return
            if self._own and message.topic.startswith(self._own):
                self._acknowledge(message)
                return
            message.epoch = self._epoch
            self._order.append(message)
        elif self._own and message.topic.startswith(self._own):
            return
        self.put(message)
        if len(self.waiting) > HIGH and self.connection is not None:
            self.connection.read_on(False)

    def _known_already(self, message: Incoming) -> bool:
        """Whether this process has a message that is sent again."""
        mid = message.mid
        if mid in self._handled:
            self._write(_PUBREC, mid)
            return True
        known = self._open.pop(mid, None)
        if known is None or known.topic != message.topic or known.payload != message.payload:
            return False
        known.epoch = self._epoch
        if known.done:
            self._acknowledge(known)
        elif known.parked:
            self._aside[mid] = known
        else:
            self._order.append(known)
        return True

    def acknowledged(self, kind: int, mid: int, code: int, reason: str) -> None:
        if kind == PUBREL:
            self._handled.discard(mid)
            self._write(_PUBCOMP, mid)

    # To the sink

    async def _counted(self, message: Incoming) -> None:
        if message.flags & DUP and message.count == 1:  # an earlier process had it
            behind = [m for m in self.waiting if m.flags & DUP and m.count == 1]
            await self._attempts.count([message, *behind])
        await self._deliver(message)

    def emptied(self) -> None:
        connection = self.connection
        if connection is not None and not connection.reading:
            connection.read_on(True)

    def ended(self) -> bool:
        return not self.waiting  # what nobody brings again was left there

    # The intake

    async def settle(
        self, raw: Incoming, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        if how is _NACK:
            self._again(raw, delay or 0.0)
        elif how is not _NONE and raw.mid:
            if raw.count > 1:
                self._attempts.settled(raw)
            order = self._order
            if raw.epoch != self._epoch or self.connection is None:
                raw.done = True  # told when it is sent again
            elif order and order[0] is raw:
                order.popleft()
                self._acknowledge(raw)
                while order and order[0].done:
                    self._acknowledge(order.popleft())
            elif raw.parked:
                self._aside.pop(raw.mid, None)
                self._acknowledge(raw)
            else:
                raw.done = True

    def _acknowledge(self, message: Incoming) -> None:
        if message.flags & QOS_2:
            self._handled.add(message.mid)
            self._write(_PUBREC, message.mid)
        else:
            self._write(_PUBACK, message.mid)

    def _write(self, head: bytes, mid: int) -> None:
        if self.connection is not None:
            self.connection.write(head + mid.to_bytes(2))

    def _again(self, message: Incoming, delay: float) -> None:
        """MQTT brings a message again only with the next connection, so that is done here.

        It stays unacknowledged meanwhile: should this process end, the session brings it.
        """
        if self.paused:
            return
        if message.mid and not message.parked and message.epoch == self._epoch:
            order = self._order = deque(m for m in self._order if m is not message)
            self._aside[message.mid] = message
            while order and order[0].done:
                self._acknowledge(order.popleft())
        message.parked = True
        self._timers[message] = self.driver.clock.call_later(delay, self._due, message)

    def _due(self, message: Incoming) -> None:
        self._timers.pop(message, None)
        if not self.paused:
            message.count += 1
            self.put(message)

    async def begun(self, raw: Incoming, /) -> bool:
        return await self._attempts.begun(raw)

    async def pause(self) -> int:
        if self.paused:
            return 0
        if not self.kept:
            await self._unsubscribe()
        self.paused = True
        back = [message for message in self.waiting if message.mid and self.kept]
        for message in back:
            self.waiting.remove(message)
        waiting = len(back) + len(self._timers)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self.waiting:
            await self.finish()
        return waiting

    async def _unsubscribe(self) -> None:
        """Stop the server from sending; only where the session ends with the subscription."""
        version, topic = self.settings.version, self.spec.filter
        try:
            async with asyncio.timeout(1):
                await self.ask(lambda mid: write_unsubscribe(version, mid, topic))
        except (OSError, TimeoutError) as error:
            log.debug("%s: %s", topic, error)

    async def close(self) -> None:
        self.driver.gone(self)
        await self.cut_off()
        await self._attempts.close()
        await super().close()
