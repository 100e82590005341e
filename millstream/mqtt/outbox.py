"""What is published: kept until the server has confirmed it, and sent again if need be."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from ..base import disconnected
from ..errors import MessageTooLarge, NotConnected, PublishError, PublishTimeout
from .connection import Connection
from .line import Line
from .wire import (
    LARGEST,
    NO_TAKER,
    PUBACK,
    PUBCOMP,
    PUBREC,
    PUBREL,
    QOS_2,
    V311,
    Incoming,
    reason_of,
    sent_again,
    topic_bytes,
    write_packet,
    write_publish,
    write_subscribe,
)

#: Messages on their way at once where the server does not say how many it takes; Mosquitto drops
#: those of a 3.1.1 client that go beyond 20 (mosquitto.conf, max_inflight_messages).
WINDOW = 20
#: And at most: some packet identifiers stay free for subscriptions.
MOST = 65_000
#: Seconds for which the server remembers what it got of a QoS 2 message while we are away.
EXPIRY = 300


class Receipt(msgspec.Struct, frozen=True):
    """The server's confirmation of a message.

    Fields:
        heard: False if the server says that nobody has subscribed to it; some servers, and those
            that speak 3.1.1, do not say.
    """

    heard: bool = True


_HEARD, _UNHEARD = Receipt(), Receipt(heard=False)


class _Sent:
    """A message that is not confirmed yet."""

    __slots__ = ("done", "heard", "packet", "released", "topic")

    def __init__(self, topic: str, packet: bytes, done: asyncio.Future[Receipt]) -> None:
        self.topic, self.packet, self.done = topic, packet, done
        #: PUBREC came: the server has it, and PUBREL is what is sent from now on.
        self.released = False
        #: What PUBREC said of subscribers.
        self.heard = _HEARD


class Outbox(Line):
    """The line that publishes, and that replies come in by."""

    clean = False
    expiry = EXPIRY

    def __init__(self, *args: Any, will: Any = None) -> None:
        super().__init__(*args)
        self.will = will
        self._sent: dict[int, _Sent] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._window, self._largest, self._best = WINDOW, LARGEST, 2
        #: Topic filters of replies, and who takes what arrives.
        self.inboxes: dict[str, int] = {}
        self.take: Callable[[Incoming], None] = lambda message: None

    # The line

    def welcomed(self, connection: Connection, present: bool, limits: dict[str, Any]) -> None:
        super().welcomed(connection, present, limits)
        self._window = min(limits.get("receive_maximum", MOST), MOST)
        if connection.version == V311:
            self._window = WINDOW
        self._largest = limits.get("maximum_packet_size", LARGEST)
        self._best = limits.get("maximum_qos", 2)
        for mid, sent in list(self._sent.items()):
            if sent.released and present:
                connection.write(_pubrel(mid))
            elif sent.done.done() and not (present and sent.packet[0] & QOS_2):
                # Its sender waits no more. Of QoS 2 the server may know the identifier: another
                # message under it would be taken for this one.
                del self._sent[mid]
            else:
                # Without its session the server may have forgotten what it had not passed on.
                sent.released = False
                connection.write(sent_again(sent.packet) if present else sent.packet)
        self._make_room()

    async def established(self, present: bool) -> None:
        version = self.settings.version
        filters = list(self.inboxes.items())
        if filters and not present:
            await self.ask(lambda mid: write_subscribe(version, mid, filters))

    def dropped(self) -> None:
        self._make_room()

    def received(self, message: Incoming) -> None:
        connection = self.connection
        if connection is not None and message.mid:
            connection.write(write_packet(PUBACK, message.mid.to_bytes(2)))
        self.take(message)

    def in_use(self, mid: int) -> bool:
        return mid in self._sent

    # Publishing

    async def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        properties: bytes,
        timeout: float,
    ) -> Receipt | None:
        """Send a message; of QoS 1 and 2, return when the server has confirmed it.

        Raises:
            NotConnected: the connection did not come back within the timeout.
            PublishTimeout: no confirmation came within the timeout.
            MessageTooLarge: the server does not take so much.
            PublishError: the server refuses it, or said that it would.
        """
        name = topic_bytes(topic)
        size = len(name) + len(payload) + len(properties) + 7
        if size > self._largest:
            raise MessageTooLarge(
                f"{size:,} bytes to {topic!r}: the server takes {self._largest:,} at most"
            )
        if qos > self._best:
            raise PublishError(
                f"qos={qos} to {topic!r}: {self.settings.where} takes {self._best} at most"
            )
        if retain and self.limits.get("retain_available") == 0:
            raise PublishError(f"{topic!r}: {self.settings.where} keeps no retained messages")
        connection = self.connection
        if (
            connection is None
            or not self.up.is_set()
            or len(self._sent) >= self._window
            or self._waiting
            or not connection.writable.is_set()
        ):
            loop = asyncio.get_running_loop()
            end = loop.time() + timeout
            connection = await self._room(topic, end, timeout)
            timeout = max(end - loop.time(), 0.001)
        flags = qos << 1 | retain
        if not qos:
            connection.write(write_publish(name, payload, flags, 0, properties))
            return None
        mid = self.next_mid()
        packet = write_publish(name, payload, flags, mid, properties)
        done: asyncio.Future[Receipt] = connection.loop.create_future()
        self._sent[mid] = _Sent(topic, packet, done)
        connection.write(packet)
        timer = connection.loop.call_later(timeout, self._late, topic, timeout, done)
        try:
            return await done
        finally:
            timer.cancel()

    async def _room(self, topic: str, end: float, timeout: float) -> Connection:
        """Wait for the line, for its turn and for room on the way."""
        loop, queue, first = asyncio.get_running_loop(), self._waiting, True
        try:
            async with asyncio.timeout_at(end):
                while True:
                    await self.up.wait()
                    connection = self.connection
                    if connection is None:
                        continue
                    if not connection.writable.is_set():
                        await connection.writable.wait()
                    elif len(self._sent) >= self._window or (first and queue):
                        turn: asyncio.Future[None] = loop.create_future()
                        # Whoever had its turn and found no room keeps its place.
                        (queue.append if first else queue.appendleft)(turn)
                        first = False
                        await turn
                    else:
                        return connection
        except BaseException as error:
            self._make_room()  # the turn may have been ours
            if not isinstance(error, TimeoutError):
                raise
        if self.up.is_set():
            raise PublishTimeout(
                f"no room for a message to {topic!r} within {timeout:g} s: "
                f"{len(self._sent)} are not confirmed yet"
            )
        raise disconnected(self.settings.where, self.reason)

    def _make_room(self) -> None:
        """Let as many go on as there is room for."""
        room = self._window - len(self._sent)
        while self._waiting and room > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

    def _late(self, topic: str, timeout: float, done: asyncio.Future[Receipt]) -> None:
        if not done.done():
            state = "" if self.up.is_set() else f" ({self.reason})"
            done.set_exception(
                PublishTimeout(
                    f"no confirmation of a message to {topic!r} in {timeout:.3g} s{state}"
                )
            )

    def _finish(self, mid: int, outcome: Receipt | Exception) -> None:
        sent = self._sent.pop(mid, None)
        if sent is not None and not sent.done.done():
            if isinstance(outcome, Exception):
                sent.done.set_exception(outcome)
            else:
                sent.done.set_result(outcome)
        if self._waiting:
            self._make_room()

    def acknowledged(self, kind: int, mid: int, code: int, reason: str) -> None:
        sent, connection = self._sent.get(mid), self.connection
        if kind == PUBREC and code < 128 and connection is not None:
            if sent is not None:
                sent.released, sent.heard = True, _UNHEARD if code == NO_TAKER else _HEARD
            connection.write(_pubrel(mid))
        elif sent is not None:
            if code >= 128 and kind != PUBCOMP:  # which says at most that it had ended before
                error = PublishError(f"{sent.topic!r} was not published: {reason_of(code, reason)}")
                self._finish(mid, error)
            else:
                self._finish(mid, _UNHEARD if code == NO_TAKER else sent.heard)

    async def flush(self) -> None:
        """Return when everything that was published is confirmed."""
        waiting = [sent.done for sent in self._sent.values() if not sent.done.done()]
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        await super().close()
        gone = NotConnected(f"{self.settings.where}: the broker was stopped", state="closed")
        for mid in list(self._sent):
            self._finish(mid, gone)


def _pubrel(mid: int) -> bytes:
    return write_packet(PUBREL | 2, mid.to_bytes(2))
