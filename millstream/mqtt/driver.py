"""MQTT behind the driver contract."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from ..base import BaseDriver, Questions, disconnected, not_yet_connected
from ..driver import Intake, PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    AddressError,
    CapabilityError,
    NoResponders,
    NotConnected,
    PublishTimeout,
    RequestTimeout,
    SetupError,
)
from ..message import Message, new_id
from .connection import Settings
from .flow import Flow
from .identity import give_back, host, passing_host, passing_id, session_id, take, worker
from .letters import MqttLetters, dead_letters_of, letter_id
from .line import Line
from .message import MqttMessage, packed
from .options import (
    SYNTAX,
    MqttPublish,
    MqttSubscription,
    Will,
    check_qos,
    check_receive_maximum,
    check_session_expiry,
)
from .outbox import Outbox, Receipt
from .wire import V5, Incoming, reason_of, topic_bytes, write_subscribe, write_unsubscribe

log = logging.getLogger("millstream.mqtt")

#: Seconds for which a session is kept while nobody is connected, where nothing else is said.
SESSION_EXPIRY = 7 * 86_400


class MqttDriver(BaseDriver):
    """The connections to one server: one that publishes, and one for each subscription.

    Args:
        settings: how to reach the server.
        client_id: the publishing connection's, and what those of sessions begin with.
        clean_session: end every session with its connection.
        session_expiry: seconds for which the server keeps a session while nobody is connected.
        receive_maximum: for all subscriptions that do not say otherwise.
        will: what the server publishes when the publishing connection ends without a farewell.
        reply_prefix: where the topics of answers lie, unless the server says where.
        publish_timeout: seconds for a publication that says nothing else.
    """

    name: ClassVar[str] = "mqtt"
    syntax: ClassVar = SYNTAX
    command: ClassVar[type[PublishCommand]] = MqttPublish
    control_headers: ClassVar[str | tuple[str, ...]] = ""

    def __init__(
        self,
        settings: Settings,
        *,
        client_id: str = "",
        clean_session: bool = False,
        session_expiry: float = SESSION_EXPIRY,
        receive_maximum: int | None = None,
        will: Will | None = None,
        reply_prefix: str = "ms/reply",
        publish_timeout: float = 5.0,
    ) -> None:
        super().__init__(log, publish_timeout=publish_timeout)
        self.settings, self.client_id = settings, client_id
        #: Whether it speaks MQTT 5, which has headers and reply topics.
        self.v5 = settings.version == V5
        self.clean_session, self.session_expiry = clean_session, session_expiry
        topic_bytes(reply_prefix)
        check_session_expiry(session_expiry, "the broker")
        if receive_maximum is not None:
            check_receive_maximum(receive_maximum)
        self.receive_maximum = receive_maximum
        self.will = will.packed(self.v5) if will is not None else None
        try:
            self._outbox(client_id).hello()
        except (TypeError, ValueError) as error:
            raise SetupError(f"{settings.where} cannot be told: {error}") from error
        self.reply_prefix = reply_prefix
        self.outbox: Outbox | None = None
        self._down: set[Line] = set()
        #: Addresses of dead letters that were asked for.
        self._letters: set[str] = set()
        self.asked: Questions[str, Incoming] = Questions()
        self._inbox, self._questions = "", itertools.count(1)
        self._inbox_lock = asyncio.Lock()

    # Life

    def describe(self) -> str:
        return self.settings.where

    async def connect(self) -> None:
        name = self.client_id + worker() if self.client_id else passing_id()
        name = take(self.settings.where, name)
        outbox = self._outbox(name)
        outbox.take = self._answered
        try:
            await outbox.open()
        except BaseException:
            give_back(self.settings.where, name)
            raise
        self.outbox = outbox

    def _outbox(self, name: str) -> Outbox:
        return Outbox(self.settings, name, self.changed, self.report, will=self.will)

    async def close(self) -> None:
        await self.end()
        outbox, self.outbox, self._inbox = self.outbox, None, ""
        if outbox is not None:
            try:
                await outbox.flush()
            finally:
                await outbox.close()
                give_back(self.settings.where, outbox.client_id)
        self._down.clear()

    async def ping(self, timeout: float) -> bool:
        connection = self.outbox.connection if self.outbox is not None else None
        if connection is None:
            return False
        try:
            async with asyncio.timeout(timeout):
                await connection.ping()
        except (OSError, TimeoutError):
            return False
        return True

    def changed(self, line: Line, up: bool, reason: str) -> None:
        """A line was lost, or is there."""
        if not up:
            self._down.add(line)
            self.notify("disconnected", reason)
        elif line in self._down:
            self._down.discard(line)
            if not self._down:
                self.notify("reconnected", self.settings.where)

    def report(self, text: str) -> None:
        """Tell people what goes wrong; not more often than the core lets through."""
        self.notify("error", text)

    def _connected(self) -> Outbox:
        if self.outbox is None:
            raise not_yet_connected(self.settings.where)
        return self.outbox

    # Subscriptions

    async def declare(self, specs: Sequence[Spec]) -> None:
        if not self.v5:
            for spec in specs:
                refuse_311(spec)
        kept = [s for s in specs if isinstance(s, MqttSubscription) and s.kept and not s.session]
        if kept and not self.client_id and not self.clean_session and passing_host():
            log.warning(
                "no client_id: the sessions are named after this machine (%s), whose name looks "
                "as if it changed with each start; what the server keeps for it would be left "
                "behind. Give the broker a client_id that stays",
                host(),
            )

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> Intake:
        assert isinstance(spec, MqttSubscription)
        self._connected()
        if spec.kept and not self.clean_session:
            name = spec.session and spec.session + worker()
            name = name or session_id(self.client_id, spec.filter)
        else:
            name = passing_id()
        flow = Flow(self, spec, sink, lost, take(self.settings.where, name))
        await self.begin(flow)
        return flow

    def gone(self, flow: Flow) -> None:
        """A flow ended."""
        if flow in self.flows:
            self.flows.discard(flow)
            give_back(self.settings.where, flow.client_id)
        if flow in self._down:
            self.changed(flow, True, "")

    # Publishing

    async def publish(
        self, command: MqttPublish, data: bytes, headers: dict[str, str] | None
    ) -> Receipt | None:
        topic, retain, qos = command.topic, command.retain, command.qos
        if qos not in (0, 1, 2):
            check_qos(qos, f"a message to {topic!r}")
        if topic in self._letters:
            # Each letter has a topic of its own, where the server keeps it.
            topic, retain, qos = f"{topic}/{letter_id()}", True, max(qos, 1)
        if self.v5:
            properties = b"\0"
            if headers or command.reply_to or command.expiry is not None:
                properties = packed(command, headers)
        else:
            refuse_311(command)
            properties = b""
        timeout = self.publish_timeout if command.timeout is None else command.timeout
        outbox = self._connected()
        return await outbox.publish(topic, data, qos, retain, properties, timeout)

    async def request(
        self, command: MqttPublish, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Incoming:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        own = command.reply_to
        if not own and not self.v5:
            raise CapabilityError(
                "MQTT 3.1.1 cannot tell the other side where the answer is wanted",
                fix='use version="5.0", or agree on a topic and give it as reply_to=',
            )
        if own:
            topic_bytes(own)
        topic = own or (f"{self._inbox or await self._open_inbox(end)}/{next(self._questions):x}")
        if topic in self.asked:
            raise CapabilityError(
                f"another request waits for its answer at {topic!r} already",
                fix="leave out reply_to, or ask one after the other",
            )
        try:
            with self.asked.ask(topic, command.topic, timeout, end) as answer:
                if own:
                    await self._listen(topic, end)
                asked = MqttPublish(
                    topic=command.topic,
                    qos=command.qos,
                    expiry=command.expiry,
                    reply_to=topic if self.v5 else "",
                    timeout=timeout,
                )
                asked.headers = command.headers
                receipt = await self.publish(asked, data, headers)
                if receipt is not None and not receipt.heard:
                    raise NoResponders(f"nobody has subscribed to {command.topic!r}")
                return await answer
        except PublishTimeout as error:
            late = f"no reply from {command.topic!r} within {timeout:g} s"
            raise RequestTimeout(late) from error
        finally:
            outbox = self.outbox
            if own and outbox is not None and topic in outbox.inboxes:
                del outbox.inboxes[topic]
                with suppress(NotConnected):
                    outbox.ask(lambda mid: write_unsubscribe(self.settings.version, mid, topic))

    async def _open_inbox(self, end: float) -> str:
        """Subscribe to the topics of this connection's answers; where they lie."""
        async with self._inbox_lock:
            if not self._inbox:
                prefix = self._connected().limits.get("response_information") or self.reply_prefix
                inbox = f"{prefix.rstrip('/')}/{new_id()}"
                await self._listen(f"{inbox}/+", end)
                self._inbox = inbox
        return self._inbox

    async def _listen(self, topic: str, end: float) -> None:
        outbox, version = self._connected(), self.settings.version
        try:
            async with asyncio.timeout_at(end):
                await outbox.up.wait()
                codes, reason = await outbox.ask(
                    lambda mid: write_subscribe(version, mid, [(topic, 1)])
                )
        except TimeoutError:
            raise disconnected(self.settings.where, outbox.reason) from None
        if codes[0] >= 128:
            raise AddressError(
                f"the server refuses a subscription to {topic!r}, where the answer would come: "
                + reason_of(codes[0], reason),
                fix="grant the user the right, or give another reply_prefix=",
            )
        outbox.inboxes[topic] = 1

    def _answered(self, message: Incoming) -> None:
        self.asked.answer(message.topic, message)

    def reply_envelope(self) -> type[Message[Any]]:
        return MqttMessage

    # Dead letters

    def letters_at(self, spec: SubscriptionSpec, name: str | None) -> str:
        return name or dead_letters_of(spec)

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        address = self.letters_at(spec, name)
        if declare:
            topic_bytes(address)
            self._letters.add(address)
        return address

    def letters(self, address: str) -> MqttLetters:
        return MqttLetters(self, address)


_ONLY_V5 = (
    *("headers", "reply_to", "expiry"),
    *("session_expiry", "receive_maximum", "retained", "retain_as_published", "no_local"),
)


def refuse_311(what: Any) -> None:
    """Refuse what MQTT 3.1.1 has no place for, in a declaration or a message.

    Raises:
        CapabilityError: something of that was asked for.
    """
    for name in _ONLY_V5:
        if getattr(what, name, None):
            raise CapabilityError(
                f"MQTT 3.1.1 has no {name}, which {what.topic!r} was given",
                fix='use version="5.0", or do without',
            )
