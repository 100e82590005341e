"""JetStream subscriptions: what pull and push have in common.

Settlement, deadlines that are pushed back, and consumers that heal.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..ack import Settlement
from ..base import reconnect_delay
from ..errors import MillstreamError, SetupError
from .connection import NoJetStream
from .consumer import HEARTBEAT, Consumer
from .flow import Flow, log
from .message import ack_tokens

ACK, NAK, TERM, PROGRESS = b"+ACK", b"-NAK", b"+TERM", b"+WPI"
#: Unsettled messages from which on it pays to look for repeated ones.
CROWD = 4096
#: Seconds to wait before a broken consumer is looked after again, at most.
PATIENCE = 5.0


class StreamFlow(Flow):
    """What pull and push have in common: settlement, deadlines, and healing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.consumer = Consumer(self.driver, self.spec)
        self.acknowledged = self.spec.acknowledged
        #: Acknowledgement addresses of what was delivered and not settled, oldest first.
        self.open: dict[str, None] = {}
        #: When the server last proved that it heard us, and those of ``open`` whose deadline may
        #: have passed meanwhile: it delivers them again, to whom it likes.
        self.proved = self.driver.clock.now()
        self.lapsed: set[str] = set()
        #: Stream sequences that were handed back, until they are known to be settled.
        self.returned: set[int] = set()
        #: The stream sequence up to which all was settled when other processes were last seen to
        #: hold messages; None if this one knew of all.
        self._floor: int | None = None
        self.heard = 0.0
        self._latest: Msg | None = None
        self._last = 0
        self._failures = 0
        self._sick = False
        self._healing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the consumer and begin; raises what cannot heal."""
        await self.consumer.ensure()
        self._last = self.consumer.floor
        await self.attach()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    # Settlement

    async def settle(
        self, raw: Any, how: Settlement, delay: float | None, /, **options: Any
    ) -> None:
        if not self.acknowledged:
            return
        reply = raw.reply
        if how is Settlement.ACK:
            if options and options.get("sync"):
                timeout = options.get("timeout") or self.driver.publish_timeout
                await self.driver.outbox.ask(reply, ACK, None, timeout)
            else:
                await self.driver.outbox.acknowledge(reply)
        elif how is Settlement.NACK:
            self.returned.add(_sequence(reply))
            await self.driver.outbox.send(
                reply, NAK if not delay else b'%b {"delay": %d}' % (NAK, delay * 1e9)
            )
            self.open.pop(reply, None)
            return
        elif how is Settlement.REJECT:
            reason = str(options.get("reason") or "")
            await self.driver.outbox.send(reply, f"+TERM {reason}".encode() if reason else TERM)
        else:
            return
        self.open.pop(reply, None)
        if self.returned:
            self.returned.discard(_sequence(reply))

    async def touch(self, raw: Any, /) -> None:
        if self.acknowledged:
            await self.driver.outbox.send(raw.reply, PROGRESS)

    async def ours(self, raws: list[Any], /) -> list[Any]:
        self._lapse()
        return [raw for raw in raws if not self._left(raw)] if self.lapsed else raws

    def _lapse(self) -> None:
        """Give up what waits if we stood still, or were not heard, for longer than its deadline."""
        now = self.driver.clock.now()
        if self.acknowledged and now - self.proved > self.consumer.ack_wait:
            self.proved = now
            self._over(list(self.open))
            self.heal("")  # what is missing now is asked for again

    def came_again(self, msg: Msg) -> None:
        """Earlier deliveries of a message are over, and may still be here."""
        sequence, reply = _sequence(msg.reply), msg.reply
        alike = [other for other in self.open if f".{sequence}." in other]
        self._over([one for one in alike if one != reply and _sequence(one) == sequence])

    def _over(self, replies: list[str]) -> None:
        """Begin nothing of some deliveries; what runs goes on."""
        if replies:
            self.lapsed.update(replies)
            kept = [raw for raw in self.waiting if not self._left(raw)]
            self.waiting.clear()
            self.waiting.extend(kept)

    def _left(self, raw: Any) -> bool:
        """Leave a message to its next delivery, if this one is over."""
        reply = raw.reply
        if reply not in self.lapsed:
            return False
        if reply in self.open:
            del self.open[reply]
            self.returned.add(_sequence(reply))
        return True

    async def begun(self, raw: Any, /) -> bool:
        try:
            return await self.consumer.begun(_sequence(raw.reply))
        except (MillstreamError, NatsError, TimeoutError) as error:
            log.debug("cannot note in consumer %s: %s", self.consumer.name, error)
            return False

    async def lag(self) -> int | None:
        info = await self.consumer.info()
        return int(info["num_pending"]) + len(self.waiting)

    # Deadlines and signs of life

    async def _keep(self) -> None:
        """Keep what waits from being delivered again, and notice a consumer that died."""
        while not self.paused:
            beat = min(HEARTBEAT, self.consumer.ack_wait / 3)
            await self.driver.clock.sleep(beat)
            self._lapse()
            self.lapsed &= self.open.keys()
            self._last = max(self._last, self._delivered())
            if len(self.open) > CROWD:
                # Never settled, and delivered again under another address: the last one counts.
                latest = {_sequence(reply): reply for reply in self.open}
                self.open = dict.fromkeys(latest.values())
            if self.waiting and self.acknowledged:
                with suppress(MillstreamError):
                    for raw in list(self.waiting):
                        await self.touch(raw)
            if self._silent() and self.driver.connected:
                self.heal("no sign of life from the server")
            if self.acknowledged and self.driver.connected:
                asked = self.driver.clock.now()
                if await self.driver.ping(beat):  # answered after all that was sent before
                    self.proved = max(self.proved, asked)
                # A slow answer must not keep the deadlines waiting.
                with suppress(MillstreamError, NatsError, TimeoutError):
                    async with asyncio.timeout(beat):
                        await self._look()

    async def _look(self) -> None:
        """Learn what others hold: only the consumer knows it, and it may vanish with them."""
        held = len(self.open) + len(self.returned)
        info = await self.consumer.info()
        if not self.consumer.same(info):
            return  # made again by another process: there is something to heal
        floor = (info.get("ack_floor") or {}).get("stream_seq", 0)
        self.returned = {sequence for sequence in self.returned if sequence > floor}
        self._floor = floor if info["num_ack_pending"] > held else None

    def _silent(self) -> bool:
        raise NotImplementedError

    def _delivered(self) -> int:
        return _sequence(self._latest.reply) if self._latest is not None else 0

    def _unsettled(self) -> int | None:
        """The first stream sequence that may not be settled, as far as this process knows."""
        others = [self._floor + 1] if self._floor is not None else []
        return min([*map(_sequence, self.open), *self.returned, *others], default=None)

    def _resume(self) -> int | None:
        """The stream sequence from which nothing is missed; None for where it was declared."""
        if self.spec.watch is not None and self._latest is None:
            return None
        return self._unsettled() or max(self._last, self._delivered()) + 1

    def reconnected(self) -> None:
        self._anew()
        self.heal("")

    def _anew(self) -> None:
        """Give up a healing that runs: what it asked went down with the old connection."""
        if self._healing is not None:
            self._healing.cancel()
        self._healing, self._failures = None, 0

    def heal(self, reason: str) -> None:
        """Look whether the consumer is there, make it again if not, and go on."""
        self._sick = True
        if not self.paused and (self._healing is None or self._healing.done()):
            self._healing = asyncio.get_running_loop().create_task(self._heal(reason))

    async def _heal(self, reason: str) -> None:
        while self._sick and not self.paused:
            if self._failures:
                await self.driver.clock.sleep(reconnect_delay(self._failures + 1, PATIENCE))
            self._failures += 1
            self._sick = False
            try:
                resume = self._resume()
                made = await self.consumer.ensure(resume, self._unsettled())
                if self.consumer.emptied:  # the numbers of the old stream mean nothing
                    self.open.clear()
                    self.returned.clear()
                    self._latest, self._last, self._floor = None, 0, None
                if made:
                    self._announce(reason, resume)
                await self._continue(made)
            except (MillstreamError, NatsError, TimeoutError) as error:
                if isinstance(error, SetupError) and not isinstance(error, NoJetStream):
                    self._fail(error)
                    return
                self._sick = True
                log.debug("stream %s: %s", self.consumer.stream, error)

    def _announce(self, reason: str, resume: int | None) -> None:
        log.warning(
            "consumer %s of stream %s was gone%s and is made again, from message %d",
            self.consumer.name,
            self.consumer.stream,
            f" ({reason})" if reason else "",
            resume or 1,
        )

    async def _continue(self, made: bool) -> None:
        """Take up reading from the consumer, which is there; ``made`` if it is a new one."""
        raise NotImplementedError

    def _fail(self, error: Exception) -> None:
        if not self.paused:
            self.paused = True
            self.wake()
            self.lost(error)

    # The end

    def ended(self) -> bool:
        # What cannot be handed back is still given to the sink.
        return self.acknowledged or not self.waiting

    async def pause(self) -> int:
        self._stop_tasks()
        if not self.acknowledged:
            await self._leave()
            await self.finish()
            return 0
        self.paused = True
        self.wake()
        await self._leave()
        back = list(self.waiting)
        self.waiting.clear()
        with suppress(MillstreamError):
            for raw in back:
                await self.settle(raw, Settlement.NACK, None)
        return len(back)

    async def close(self) -> None:
        self._stop_tasks()
        await super().close()

    def _stop_tasks(self) -> None:
        for task in (self._keeper, self._healing):
            if task is not None and task is not asyncio.current_task():
                task.cancel()


def _sequence(reply: str) -> int:
    return int(ack_tokens(reply)[3])
