"""JetStream by pull.

Does what nats.go's ``Consume`` does (ADR-37): one inbox, requests for more messages with an expiry
and an idle heartbeat, refilled when half of what is wanted has been used up. A missing heartbeat is
how a consumer that died is noticed.
"""

from __future__ import annotations

from typing import Any

from nats.aio.msg import Msg

from ..base import Window
from ..errors import MillstreamError, SetupError
from ..letters import REPLAY_TO
from .consumer import HEARTBEAT
from .flow import Tap, log
from .jetstream import StreamFlow
from .message import ack_tokens
from .stores import entry_of, object_of

#: The most messages held ready where the user set no number.
MOST = 256
#: Messages taken one by one after one came that a process began and did not finish. If it takes
#: this process down too, nothing that was only fetched ahead is counted as delivered with it.
CAREFUL = 4


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
        # More than one from the start: the server drops without a word a request that comes as the
        # consumer is deleted, and answers one that waits.
        self.window = Window(least, least, most)
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
        await self.driver.outbox.send(
            f"{self.driver.outbox.prefix}.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}",
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
        self.came_again(msg)
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
        if self._ordered:
            self.consumer.renew()
        super().reconnected()

    def _announce(self, reason: str, resume: int | None) -> None:
        if not self._ordered:
            super()._announce(reason, resume)

    async def _in_view(self, msg: Msg) -> None:
        """Give the watcher of a store what it wants to see."""
        kv, obj = self.spec.kv, self.spec.obj
        raw = entry_of(msg, kv) if kv is not None else object_of(msg, obj) if obj else None
        if raw is not None:
            await self._watcher(raw)

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
