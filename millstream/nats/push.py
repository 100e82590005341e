"""JetStream by push, where it is asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from nats.aio.msg import Msg

from ..errors import MillstreamError, SetupError
from ..letters import REPLAY_TO
from .flow import Tap
from .jetstream import StreamFlow
from .message import ack_tokens


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
        again = ack_tokens(msg.reply)[2] != "1"
        msg.unusual = marked or again  # type: ignore[attr-defined]
        if self.acknowledged:
            self.open[msg.reply] = None
            if again:
                self.came_again(msg)
        self.put(msg)

    async def _controlled(self, raw: Any) -> None:
        if isinstance(raw, _FlowControl):
            with suppress(MillstreamError):
                await self.driver.outbox.send(raw.reply, b"")
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
