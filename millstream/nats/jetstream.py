"""JetStream subscriptions: a pull engine, and push where it is asked for.

The pull engine does what nats.go's ``Consume`` does (ADR-37): one inbox, requests for more
messages with an expiry and an idle heartbeat, refilled when half of what is wanted has been
used up. A missing heartbeat is how a consumer that died is noticed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ..ack import Settlement
from ..errors import MillstreamError, SetupError
from ..intake import Window, reconnect_delay
from ..letters import REPLAY_TO
from .connection import NoJetStream
from .consumer import HEARTBEAT, Consumer
from .flow import Flow, Tap, log
from .message import ack_tokens
from .stores import entry_of, object_of

ACK, NAK, TERM, PROGRESS = b"+ACK", b"-NAK", b"+TERM", b"+WPI"
#: The most messages held ready where the user set no number.
MOST = 256
#: Unsettled messages from which on it pays to look for repeated ones.
CROWD = 4096
#: Messages taken one by one after one came that a process began and did not finish. If it takes
#: this process down too, nothing that was only fetched ahead is counted as delivered with it.
CAREFUL = 4
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
                await self.driver.ask(reply, ACK, options.get("timeout"))
            else:
                await self.driver.acknowledge(reply)
        elif how is Settlement.NACK:
            self.returned.add(_sequence(reply))
            await self.driver.send(
                reply, NAK if not delay else b'%b {"delay": %d}' % (NAK, delay * 1e9)
            )
            self.open.pop(reply, None)
            return
        elif how is Settlement.REJECT:
            reason = str(options.get("reason") or "")
            await self.driver.send(reply, f"+TERM {reason}".encode() if reason else TERM)
        else:
            return
        self.open.pop(reply, None)
        if self.returned:
            self.returned.discard(_sequence(reply))

    async def touch(self, raw: Any, /) -> None:
        if self.acknowledged:
            await self.driver.send(raw.reply, PROGRESS)

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
                await self.driver.clock.sleep(reconnect_delay(self._failures, PATIENCE))
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


class PullFlow(StreamFlow):
    """Fetches: never more than the handlers can use, never less than keeps them busy."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        spec = self.spec
        self.inbox = self.driver.inbox(spec.inbox_prefix)
        fixed = spec.pull is not None and spec.pull.batch_size is not None
        least = spec.prefetch
        most = least if fixed or spec.batch else max(least, MOST)
        if spec.pending_msgs_limit:
            most = min(most, spec.pending_msgs_limit)
        # The first request is for what is begun at once: see CAREFUL.
        self.window = Window(spec.lanes * (spec.batch.size if spec.batch else 1), least, most)
        #: Messages asked for that have not come yet, and when to ask for more: from so few on.
        self.pending, self.low = 0, -1
        #: Messages to be taken one by one before anything is fetched ahead again.
        self.careful = 0
        #: How the address of a message that is delivered for the first time begins.
        self._fresh = " "
        # Without acknowledgements a gap shows in the consumer's own numbers.
        self._ordered = spec.watch is not None or spec.ordered_consumer
        self._deliver, self.sink = self.sink, self._refilled
        if spec.watch is not None:
            self._watcher, self._deliver = self._deliver, self._in_view
        self._expected = 1

    async def start(self) -> None:
        await super().start()
        await self._pull()

    async def attach(self) -> None:
        self._sub = await self.driver.client.subscribe(self.inbox, future=Tap(self._arrived))

    async def _pull(self) -> None:
        """Ask for as much as is missing."""
        if not self.driver.connected:
            return  # healing after the reconnect asks again
        consumer, window, now = self.consumer, self.window, self.driver.clock.now()
        window.adapt(now, self.given)
        if self.careful:
            window.target = min(window.least, self.spec.lanes)
        target = window.target
        if self.acknowledged and consumer.max_ack_pending:
            target = min(target, consumer.max_ack_pending)
        self.low = -1 if self.careful else target // 2
        wanted = target - self.pending - len(self.waiting)
        if consumer.max_batch:
            wanted = min(wanted, consumer.max_batch)
        if wanted < 1 or self.paused:
            return
        if not self.pending:
            self.heard = now
        self.pending += wanted
        beat = min(HEARTBEAT, consumer.expires / 2)
        request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}'
        await self.driver.send(
            f"{self.driver.prefix}.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}",
            request % (wanted, consumer.expires * 1e9, beat * 1e9),
            self.inbox,
        )

    def _arrived(self, msg: Msg) -> None:
        if msg.subject == self.inbox:
            self._status(msg.headers or {})
            return
        if self._ordered and not self._in_order(msg):
            return
        if self.pending:
            self.pending -= 1
        self._latest = msg
        self._failures = 0
        msg.unusual = msg.headers is not None and REPLAY_TO in msg.headers  # type: ignore[attr-defined]
        if self.acknowledged:
            self.open[msg.reply] = None
            if not msg.reply.startswith(self._fresh):
                self._repeated(msg)
        self.waiting.append(msg)
        if self._idle is not None:
            self.wake()

    def _repeated(self, msg: Msg) -> None:
        """Be careful with a message that a process had before and this one did not hand back."""
        _, consumer, count, sequence, *_ = ack_tokens(msg.reply)
        if count == "1":
            head = f".{consumer}.1."
            self._fresh = msg.reply[: msg.reply.index(head) + len(head)]
            return
        msg.unusual = True  # type: ignore[attr-defined]
        if int(sequence) not in self.returned:
            self.careful, self.low = CAREFUL, -1

    def _in_order(self, msg: Msg) -> bool:
        tokens = ack_tokens(msg.reply)
        if tokens[1] != self.consumer.name:
            return False
        if int(tokens[4]) != self._expected:
            self._restart()
            return False
        self._expected += 1
        return True

    def _restart(self) -> None:
        """Read on behind the last message that came in order, by a consumer made for that."""
        self.consumer.renew()
        self.heal("")

    def reconnected(self) -> None:
        # Without acknowledgements, what was on its way when the connection broke is missing.
        self._anew()
        if self._ordered:
            self._restart()
        else:
            self.heal("")

    def _announce(self, reason: str, resume: int | None) -> None:
        if not self._ordered:
            super()._announce(reason, resume)

    async def _in_view(self, msg: Msg) -> None:
        raw = self._view(msg)
        if raw is not None:
            await self._watcher(raw)

    def _view(self, msg: Msg) -> Any:
        """What the watcher of a store gets to see; None for what it does not want."""
        spec = self.spec
        if spec.kv is not None:
            return entry_of(msg, spec.kv)
        return object_of(msg, spec.obj) if spec.obj is not None else msg

    async def _refilled(self, raw: Any) -> None:
        if self.pending + len(self.waiting) <= self.low:
            await self.refill()
        await self._deliver(raw)
        if self.careful:
            self.careful -= 1
            if not (self.waiting and self.careful):
                await self.refill()

    async def refill(self) -> None:
        """Ask for more, if that is possible now; healing asks otherwise."""
        try:
            await self._pull()
        except MillstreamError as error:
            log.debug("no request for more messages while %s", error)

    def _status(self, headers: dict[str, str]) -> None:
        """A message of the server about our requests (ADR-13, ADR-37)."""
        self.heard = self.driver.clock.now()
        # nats-py takes the headers behind a bare code for its description.
        code, text = headers.get("Status", ""), headers.get("Description", "").lower()
        text = text.partition("\n")[0].strip()
        if code == "100":  # idle heartbeat
            self._failures = 0
            return
        left = headers.get("Nats-Pending-Messages")
        self.pending = max(self.pending - int(left), 0) if left is not None else 0
        if code in ("404", "408") or (code == "409" and _is_over(text)):
            if not self.paused:
                self.driver.spawn(self.refill())
        elif code == "400":
            self._fail(
                SetupError(f"the server refuses to deliver: {text}", fix="check the consumer")
            )
        else:
            # 409 deleted, leadership change, shutdown, too many requests; 503 nobody there.
            self._failures = max(self._failures, 1)
            self.heal(text or "no consumer answers")

    def _silent(self) -> bool:
        # Busy with what waits, nothing is asked for and nothing comes.
        return self.pending > 0 and self.driver.clock.now() - self.heard > 2 * HEARTBEAT + 1

    async def _continue(self, made: bool) -> None:
        self.pending = 0
        if made:
            self._expected = 1
        await self._pull()


def _is_over(text: str) -> bool:
    """Whether a 409 only ends one request, and the next may follow at once."""
    return text.startswith(("batch completed", "message size exceeds"))


def _sequence(reply: str) -> int:
    return int(ack_tokens(reply)[3])


class _FlowControl(msgspec.Struct):
    """A question of the server whether what it sent before has been handled."""

    reply: str


class PushFlow(StreamFlow):
    """The server sends by itself, up to ``max_ack_pending`` and its flow control."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._deliver, self.sink = self.sink, self._controlled
        self._count = 0

    async def start(self) -> None:
        await super().start()
        if self.consumer.bound and not self.consumer.deliver_group:
            await self.close()
            raise SetupError(
                f"consumer {self.consumer.name!r} of stream {self.consumer.stream!r} has a reader",
                fix="give queue= in every process, so that they share it",
            )

    async def attach(self) -> None:
        self.heard = self.driver.clock.now()
        self._sub = await self.driver.client.subscribe(
            self.consumer.deliver_subject or "",
            queue=self.consumer.deliver_group,
            future=Tap(self._arrived),
        )

    def _arrived(self, msg: Msg) -> None:
        self.heard = self.driver.clock.now()
        headers = msg.headers
        if headers is not None and headers.get("Status") == "100" and not msg.data:
            # Answered when what came before it has been handled: that is the control.
            if asked := headers.get("Nats-Consumer-Stalled") or msg.reply:
                self.put(_FlowControl(asked))
            return
        if most := self.spec.max_msgs:
            # Counted here: nats-py would count the heartbeats too.
            self._count += 1
            if self._count > most:
                return
            if self._count == most:
                self.driver.spawn(self._leave())
        self._failures = 0
        self._latest = msg
        marked = headers is not None and REPLAY_TO in headers
        msg.unusual = marked or ack_tokens(msg.reply)[2] != "1"  # type: ignore[attr-defined]
        if self.acknowledged:
            self.open[msg.reply] = None
        self.put(msg)

    async def _controlled(self, raw: Any) -> None:
        if isinstance(raw, _FlowControl):
            with suppress(MillstreamError):
                await self.driver.send(raw.reply, b"")
        else:
            await self._deliver(raw)

    def _silent(self) -> bool:
        beat = self.consumer.heartbeat
        return beat > 0 and self.driver.clock.now() - self.heard > 2 * beat + 1

    async def _continue(self, made: bool) -> None:
        if made:
            await self._leave()
            await self.attach()
        self.heard = self.driver.clock.now()
