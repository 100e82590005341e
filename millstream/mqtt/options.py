"""What can be said about a subscription on MQTT, a publication and one message."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..address import AddressSyntax
from ..driver import Bindings, Capability, PublicationSpec, PublishCommand, SubscriptionSpec
from ..errors import SetupError
from ..message import Message
from .message import MqttMessage, properties_of
from .wire import text

#: Topic filters (MQTT 5.0, 4.7): ``+`` is one level, ``#`` all that remain, or none.
SYNTAX = AddressSyntax(separator="/", one="+", rest="#", rest_empty=True)
SHARE = "$share/"
#: Messages that a subscription may hold; what Mosquitto sends at once by default is 20.
HOLD = 50
#: Seconds after which a session ends that never does.
FOREVER = 0xFFFFFFFF


class QoS(enum.IntEnum):
    """How surely a message arrives (MQTT 5.0, 4.3)."""

    AT_MOST_ONCE = 0
    AT_LEAST_ONCE = 1
    EXACTLY_ONCE = 2


class WillProperties(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of a :class:`Will` by their names in MQTT 5, each of which may be left out."""

    will_delay_interval: int | None = None
    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: Sequence[tuple[str, str]] = ()


class Will(msgspec.Struct, frozen=True):
    """What the server publishes when the connection ends without a farewell.

    Fields:
        topic: where to.
        payload: the body.
        qos: 0, 1 or 2.
        retain: keep it for those that subscribe later.
        delay: seconds to wait for the connection to come back (MQTT 5).
        headers: its headers (MQTT 5).
        expiry: seconds for which it is of use (MQTT 5).
        properties: instead of ``delay``, ``headers`` and ``expiry``, under the names that MQTT
            has for them.
    """

    topic: str
    payload: bytes | str = b""
    qos: int = 1
    retain: bool = False
    delay: float = 0.0
    headers: Mapping[str, str] | None = None
    expiry: float | None = None
    properties: WillProperties | None = None

    def packed(self, v5: bool) -> tuple[str, bytes, int, bool, dict[str, Any]]:
        """What CONNECT says of it.

        Raises:
            SetupError: MQTT has no such will.
        """
        own, given = (self.delay, self.headers, self.expiry), self.properties
        if not v5 and (given or any(own)):
            raise SetupError(
                "MQTT 3.1.1 knows a will's topic, payload, qos and retain alone",
                fix='use version="5.0"',
            )
        if given and any(own):
            raise SetupError("Will: properties beside delay, headers or expiry", fix="give one")
        body = self.payload.encode() if isinstance(self.payload, str) else self.payload
        if given is None:
            try:
                properties = properties_of(self.headers, "", self.expiry)
            except ValueError as error:
                raise SetupError(f"Will: {error}") from None
            properties["will_delay_interval"] = int(self.delay) or None
        else:
            properties = msgspec.structs.asdict(given)
            properties["user_property"] = properties.pop("user_properties")
        return self.topic, body, check_qos(self.qos, "Will"), self.retain, properties


def check_qos(qos: int, what: str) -> int:
    """A quality of service that there is.

    Raises:
        SetupError: there is no such thing.
    """
    if qos not in (0, 1, 2):
        raise SetupError(f"{what}: qos={qos!r}", fix="0, 1 or 2")
    return int(qos)


def check_session_expiry(seconds: float, what: str) -> None:
    """Whether a session may last so long.

    Raises:
        SetupError: it may not.
    """
    if not 1 <= seconds <= FOREVER:
        raise SetupError(
            f"{what}: session_expiry={seconds:g}",
            fix=f"seconds, 1 to {FOREVER:,} (for ever), or clean_session=True for no session",
        )


def check_receive_maximum(most: int) -> None:
    """A number of messages that a server may send ahead.

    Raises:
        SetupError: it is none.
    """
    if not 1 <= most <= 65_535:
        raise SetupError(f"receive_maximum={most}", fix="1 to 65,535")


class MqttOptions(SubscriptionSpec, frozen=True, kw_only=True):
    """Options of a subscription on MQTT, besides its topic.

    Fields:
        qos: 1 by default: the server keeps each message until it is acknowledged; 2 says in
            addition that the server sends none twice; 0 is at most once.
        shared: subscriptions of the same name share the messages.
        session: the client identifier of the session that keeps the messages; by default made
            of the broker's ``client_id``, the topic and ``shared``.
        session_expiry: seconds for which the server keeps the session while nobody is connected;
            the broker's by default. MQTT 3.1.1 knows no end.
        clean_session: end the session with its connection, and with it what it kept; False by
            default.
        receive_maximum: messages that the server may send before they are acknowledged; twice
            the concurrency, and 50 at least, by default.
        retained: of the messages that the server kept, ``send`` all at each subscribing, only to
            a ``new`` subscription, or ``never``; ``new`` by default where there is a session,
            else ``send`` (MQTT 5).
        retain_as_published: let messages that somebody wanted kept say so as they come (MQTT 5).
        no_local: leave out what this very subscription's connection published (MQTT 5).
    """

    qos: int = 1
    shared: str | None = None
    session: str | None = None
    session_expiry: float | None = None
    clean_session: bool | None = None
    receive_maximum: int | None = None
    retained: Literal["send", "new", "never"] | None = None
    retain_as_published: bool = False
    no_local: bool = False


class MqttSubscription(MqttOptions, frozen=True):
    """A subscription on MQTT.

    Fields:
        topic: a topic such as ``sensors/{room}/temperature``; ``+`` is one level, ``#`` the rest.
            ``$share/group/topic`` says ``shared`` too.
    """

    topic: str

    def __post_init__(self) -> None:
        if self.topic.startswith(SHARE):
            group, _, topic = self.topic[len(SHARE) :].partition("/")
            msgspec.structs.force_setattr(self, "topic", topic)
            if self.shared is None:
                msgspec.structs.force_setattr(self, "shared", group)

    def prefixed(self, prefix: str) -> MqttSubscription:
        return msgspec.structs.replace(self, topic=prefix + self.topic)

    @property
    def destination(self) -> str:
        return self.topic

    @property
    def bindings(self) -> Bindings:
        return {"operation": {"mqtt": {"qos": int(self.qos), **_VERSION}}}

    @property
    def filter(self) -> str:
        """What the server is asked for."""
        pattern = SYNTAX.compile(self.topic).pattern
        return f"{SHARE}{self.shared}/{pattern}" if self.shared else pattern

    @property
    def kept(self) -> bool:
        """Whether it has a session that outlives its connection."""
        return self.qos > 0 and not self.clean_session

    @property
    def envelope(self) -> type[Message[Any]]:
        return MqttMessage

    @property
    def capabilities(self) -> Capability:
        can = Capability.HEADERS | Capability.REPLY | Capability.GROUPS
        if self.qos:
            can |= Capability.ACK | Capability.NACK | Capability.NACK_DELAY | Capability.REJECT
        return can | Capability.PERSISTENT | Capability.DELIVERY_COUNT if self.kept else can

    @property
    def guarantee(self) -> str:
        return super().guarantee if self.kept else "at-most-once"

    @property
    def prefetch(self) -> int:
        return self.receive_maximum or max(super().prefetch, HOLD)

    def check(self) -> None:
        check_qos(self.qos, f"the subscription of {self.topic!r}")
        address = SYNTAX.compile(self.topic)
        levels = address.pattern.split("/")
        mixed = [level for level in levels if level not in "+#" and ("+" in level or "#" in level)]
        if not self.topic or mixed:
            raise SetupError(
                f"{self.topic!r} is no topic filter", fix="'+' and '#' stand for whole levels"
            )
        for what in (self.filter, self.session or ""):
            try:
                text(what)
            except ValueError as error:
                raise SetupError(f"{what[:40]!r}: {error}") from None
        if self.retained not in (None, "send", "new", "never"):
            raise SetupError(f"retained={self.retained!r}", fix="'send', 'new' or 'never'")
        if self.shared is not None and (not self.shared or set("/+#") & set(self.shared)):
            raise SetupError(f"shared={self.shared!r}", fix="a name without '/', '+' and '#'")
        if self.shared and self.no_local:
            raise SetupError("no_local with shared", fix="MQTT forbids that: leave out one of them")
        if self.shared and self.retained == "send":
            raise SetupError(
                "retained='send' with shared", fix="members of a group get no kept messages"
            )
        if self.receive_maximum is not None:
            check_receive_maximum(self.receive_maximum)
        if not self.kept and (self.session is not None or self.session_expiry is not None):
            raise SetupError(
                "session or session_expiry without a session",
                fix="use qos=1 or 2 without clean_session=True",
            )
        if self.session_expiry is not None:
            check_session_expiry(self.session_expiry, f"the subscription of {self.topic!r}")


_VERSION = {"bindingVersion": "0.2.0"}


class MqttPublication(PublicationSpec, frozen=True):
    """A declared publication on MQTT.

    Fields:
        topic: where the messages go.
        qos: 1 by default: each is confirmed by the server.
        retain: keep the newest message for those that subscribe later.
        expiry: seconds for which a message is of use; the server then forgets it (MQTT 5).
    """

    topic: str
    qos: int = 1
    retain: bool = False
    expiry: float | None = None

    def prefixed(self, prefix: str) -> MqttPublication:
        return msgspec.structs.replace(self, topic=prefix + self.topic)

    @property
    def destination(self) -> str:
        return self.topic

    @property
    def bindings(self) -> Bindings:
        said = {"qos": int(self.qos), "retain": self.retain, **_VERSION}
        if self.expiry is not None:
            said["messageExpiryInterval"] = int(self.expiry)
        return {"operation": {"mqtt": said}}

    def check(self) -> None:
        check_qos(self.qos, f"the publication to {self.topic!r}")
        if self.expiry is not None and self.expiry <= 0:
            raise SetupError(f"{self.topic!r}: expiry={self.expiry:g}", fix="seconds, more than 0")


class MqttPublishOptions(PublishCommand, kw_only=True):
    """Options of one published message, besides its body and topic.

    Fields:
        qos: 1 by default: ``publish`` returns when the server has confirmed it.
        retain: keep it for those that subscribe later; an empty body ends that.
        expiry: seconds for which it is of use; the server then forgets it (MQTT 5).
    """

    qos: int = 1
    retain: bool = False
    expiry: float | None = None


class MqttPublish(MqttPublishOptions):
    """One message to be published.

    Fields:
        message: the body before encoding.
        topic: where it goes.
    """

    message: Any = None
    topic: str = ""

    @property
    def destination(self) -> str:
        return self.topic

    @destination.setter
    def destination(self, value: str) -> None:
        self.topic = value


class MqttRequest(MqttPublish, kw_only=True):
    """One request.

    Fields:
        message: the body before encoding.
        topic: where it goes.
        reply_to: where the answer is waited for; a topic of this connection's own by default,
            which MQTT 3.1.1 cannot tell the other side.
        response_model: the type of the answer's body; without it the answer is a message.
    """

    response_model: Any = None
