"""The packets of MQTT 5.0 and 3.1.1 (OASIS standards): what they hold, and how they are written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..errors import AddressError
from ..letters import REPLAY_TO, UNFIT

V311, V5 = 4, 5

# Kinds of packets: the upper half of the first byte.
CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(0x10, 0x80, 0x10)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = range(
    0x80, 0x100, 0x10
)
PING, FAREWELL = bytes((PINGREQ, 0)), bytes((DISCONNECT, 0))
#: The flags of a PUBLISH.
DUP, QOS_2, RETAIN = 0x08, 0x04, 0x01
#: Reason codes.
NO_TAKER, MALFORMED, PROTOCOL_ERROR, TAKEN_OVER, TOO_LARGE = 0x10, 0x81, 0x82, 0x8E, 0x95
#: Bytes of the largest packet that the protocol knows.
LARGEST = 268_435_455

#: Property → its number and the kind of its value (MQTT 5.0, 2.2.2.2).
PROPERTIES: dict[str, tuple[int, str]] = {
    "payload_format_indicator": (0x01, "byte"),
    "message_expiry_interval": (0x02, "four"),
    "content_type": (0x03, "text"),
    "response_topic": (0x08, "text"),
    "correlation_data": (0x09, "data"),
    "subscription_identifier": (0x0B, "variable"),
    "session_expiry_interval": (0x11, "four"),
    "assigned_client_identifier": (0x12, "text"),
    "server_keep_alive": (0x13, "two"),
    "authentication_method": (0x15, "text"),
    "authentication_data": (0x16, "data"),
    "request_problem_information": (0x17, "byte"),
    "will_delay_interval": (0x18, "four"),
    "request_response_information": (0x19, "byte"),
    "response_information": (0x1A, "text"),
    "server_reference": (0x1C, "text"),
    "reason_string": (0x1F, "text"),
    "receive_maximum": (0x21, "two"),
    "topic_alias_maximum": (0x22, "two"),
    "topic_alias": (0x23, "two"),
    "maximum_qos": (0x24, "byte"),
    "retain_available": (0x25, "byte"),
    "user_property": (0x26, "pair"),
    "maximum_packet_size": (0x27, "four"),
    "wildcard_subscription_available": (0x28, "byte"),
    "subscription_identifier_available": (0x29, "byte"),
    "shared_subscription_available": (0x2A, "byte"),
}
_NAMES = {number: (name, kind) for name, (number, kind) in PROPERTIES.items()}
_SIZES = {"byte": 1, "two": 2, "four": 4}
_MARK = REPLAY_TO.encode()


class Malformed(Exception):
    """The other side sent what is not MQTT; ``code`` is the reason that it is told."""

    def __init__(self, text: str, code: int = MALFORMED) -> None:
        super().__init__(text)
        self.code = code


class Incoming(msgspec.Struct, eq=False):
    """A message from the server.

    Fields:
        topic: where it was sent to.
        payload: its bytes.
        flags: the flags of its packet: DUP, quality of service, RETAIN.
        mid: the packet identifier that its acknowledgement names; 0 for QoS 0.
        props: its properties as they were sent.
        marked: whether a header of the engine's own is among them.
        count: how many times this process got it, this time included.
        epoch: the connection that it came by, counted by whom it is for.
        done: settled, while an earlier message is not yet.
        parked: not waited for by the acknowledgements of later messages.
    """

    topic: str
    payload: bytes
    flags: int
    mid: int
    props: bytes = b""
    marked: bool = False
    count: int = 1
    epoch: int = 0
    done: bool = False
    parked: bool = False

    @property
    def qos(self) -> int:
        """The quality of service it was sent with."""
        return self.flags >> 1 & 3

    @property
    def retain(self) -> bool:
        """Whether the server had kept it."""
        return bool(self.flags & RETAIN)

    @property
    def dup(self) -> bool:
        """Whether the server sent it before."""
        return bool(self.flags & DUP)

    @property
    def properties(self) -> dict[str, Any]:
        """Its properties of MQTT 5, by name."""
        return read_properties(self.props)


# Values


def variable(number: int) -> bytes:
    """A variable byte integer."""
    if number < 128:
        return bytes((number,))
    parts = bytearray()
    while True:
        number, part = divmod(number, 128)
        if not number:
            parts.append(part)
            return bytes(parts)
        parts.append(part | 128)


def read_variable(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer, and where what follows it begins.

    Raises:
        IndexError: it is not all there.
        Malformed: it is longer than four bytes.
    """
    value = shift = 0
    while True:
        part = data[at]
        value |= (part & 127) << shift
        at += 1
        if part < 128:
            return value, at
        shift += 7
        if shift > 21:
            raise Malformed("a length of more than four bytes")


def text(value: str | bytes) -> bytes:
    """A string or binary data with its length in front.

    Raises:
        ValueError: it is too long, or MQTT has no such strings (MQTT 5.0, 1.5.4).
    """
    if isinstance(value, str):
        if not value.isprintable() and (bad := UNFIT.search(value)):
            raise ValueError(f"U+{ord(bad[0]):04X} is no character that servers take")
        value = value.encode()
    if len(value) > 65_535:
        raise ValueError(f"{len(value):,} bytes where MQTT takes 65,535 at most")
    return len(value).to_bytes(2) + value


@functools.lru_cache(maxsize=4096)
def topic_bytes(topic: str) -> bytes:
    """A topic as a PUBLISH names it.

    Raises:
        AddressError: nothing can be published to it.
    """
    if not topic or "+" in topic or "#" in topic or "{" in topic:
        raise AddressError(
            f"a message cannot be sent to {topic!r}", fix="give a topic without wildcards"
        )
    try:
        return text(topic)
    except ValueError as error:
        raise AddressError(f"a message cannot be sent to {topic[:40]!r}: {error}") from None


def write_properties(properties: Mapping[str, Any]) -> bytes:
    """Properties with their length in front; one that is None is left out.

    Raises:
        ValueError: one has no such values.
    """
    parts, name = bytearray(), ""
    try:
        for name, value in properties.items():
            if value is None:
                continue
            number, kind = PROPERTIES[name]
            if kind == "pair":
                for key, one in value:
                    parts.append(number)
                    parts += text(key) + text(one)
                continue
            parts.append(number)
            if kind in _SIZES:
                parts += int(value).to_bytes(_SIZES[kind])
            else:
                parts += variable(value) if kind == "variable" else text(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error
    return variable(len(parts)) + bytes(parts)


def read_properties(data: bytes) -> dict[str, Any]:
    """Properties by name; those that may come more than once are lists.

    Raises:
        Malformed: they are not what the standard says.
    """
    found: dict[str, Any] = {}
    at, end = 0, len(data)
    try:
        while at < end:
            name, kind = _NAMES[data[at]]
            at += 1
            value: Any
            if kind in _SIZES:
                value = int.from_bytes(data[at : at + _SIZES[kind]])
                at += _SIZES[kind]
            elif kind == "variable":
                value, at = read_variable(data, at)
            else:
                value, at = _read_data(data, at)
                if kind != "data":
                    value = value.decode()
                if kind == "pair":
                    other, at = _read_data(data, at)
                    found.setdefault(name, []).append((value, other.decode()))
                    continue
            if name == "subscription_identifier":
                found.setdefault(name, []).append(value)
            else:
                found[name] = value
    except (KeyError, IndexError, UnicodeDecodeError) as error:
        raise Malformed(f"a property that is none: {error!r}") from error
    if at != end:
        raise Malformed("a property that is longer than its packet")
    return found


def _read_data(data: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + (data[at] << 8 | data[at + 1])
    if end > len(data):
        raise IndexError("cut off")
    return data[at + 2 : end], end


# Packets that are sent


def write_packet(head: int, *parts: bytes) -> bytes:
    """A packet of its first byte and what follows its length."""
    body = b"".join(parts)
    return bytes((head,)) + variable(len(body)) + body


def write_connect(
    version: int,
    client_id: str,
    *,
    clean: bool,
    keepalive: int,
    username: str | None,
    password: str | bytes | None,
    properties: Mapping[str, Any],
    will: tuple[str, bytes, int, bool, Mapping[str, Any]] | None,
) -> bytes:
    """CONNECT; ``will`` is topic, payload, QoS, retain and properties."""
    flags = clean << 1
    payload = [text(client_id)]
    if will is not None:
        topic, body, qos, retain, will_properties = will
        flags |= 0x04 | qos << 3 | retain << 5
        if version == V5:
            payload.append(write_properties(will_properties))
        payload += [topic_bytes(topic), text(body)]
    if username is not None:
        flags |= 0x80
        payload.append(text(username))
    if password is not None:
        flags |= 0x40
        payload.append(text(password.encode() if isinstance(password, str) else password))
    head = text("MQTT") + bytes((version, flags)) + keepalive.to_bytes(2)
    if version == V5:
        head += write_properties(properties)
    return write_packet(CONNECT, head, *payload)


def write_publish(topic: bytes, payload: bytes, flags: int, mid: int, properties: bytes) -> bytes:
    """PUBLISH; ``topic`` as of :func:`topic_bytes`, no ``mid`` for QoS 0."""
    middle = mid.to_bytes(2) + properties if mid else properties
    size = len(topic) + len(middle) + len(payload)
    length = bytes((size,)) if size < 128 else variable(size)
    return b"".join((_PUBLISH[flags], length, topic, middle, payload))


_PUBLISH = [bytes((PUBLISH | flags,)) for flags in range(16)]


def sent_again(message: bytes) -> bytes:
    """A PUBLISH that the server may have got before."""
    return bytes((message[0] | DUP,)) + message[1:]


def write_subscribe(version: int, mid: int, filters: Sequence[tuple[str, int]]) -> bytes:
    """SUBSCRIBE; each topic filter with its options (MQTT 5.0, 3.8.3.1)."""
    properties = b"\0" if version == V5 else b""
    topics = (text(topic) + bytes((options,)) for topic, options in filters)
    return write_packet(SUBSCRIBE | 2, mid.to_bytes(2), properties, *topics)


def write_unsubscribe(version: int, mid: int, topic: str) -> bytes:
    """UNSUBSCRIBE."""
    return write_packet(
        UNSUBSCRIBE | 2, mid.to_bytes(2), b"\0" if version == V5 else b"", text(topic)
    )


# Packets that are received


def read_publish(data: bytes, start: int, end: int, flags: int, version: int) -> Incoming:
    """PUBLISH, whose body lies at ``data[start:end]``.

    Its properties are not read before somebody asks for them.

    Raises:
        Malformed: it is not what the standard says.
        IndexError, UnicodeDecodeError: the same.
    """
    at = start + 2 + (data[start] << 8 | data[start + 1])
    topic = data[start + 2 : at].decode()
    mid = 0
    if flags & 6:
        mid = data[at] << 8 | data[at + 1]
        at += 2
        if not mid or flags & 6 == 6:
            raise Malformed("a message without a packet identifier, or of QoS 3")
    props, marked = b"", False
    if version == V5:
        size = data[at]
        at += 1
        if size:
            if size > 127:
                size, at = read_variable(data, at - 1)
            props = data[at : at + size]
            at += size
            marked = _MARK in props
    if at > end:
        raise Malformed("a message that is longer than its packet")
    if not topic:
        raise Malformed("a message without a topic", PROTOCOL_ERROR)
    return Incoming(topic, data[at:end], flags, mid, props, marked)


def _read_block(body: bytes, at: int) -> tuple[dict[str, Any], int]:
    """Properties with their length in front, and where what follows them begins."""
    size, at = read_variable(body, at)
    if at + size > len(body):
        raise Malformed("properties that are longer than their packet")
    return read_properties(body[at : at + size]), at + size


def read_ack(body: bytes) -> tuple[int, int, str]:
    """PUBACK, PUBREC, PUBREL or PUBCOMP: identifier, reason code, reason for people."""
    mid, reason = body[0] << 8 | body[1], ""
    code = body[2] if len(body) > 2 else 0
    if len(body) > 3:
        reason = said(_read_block(body, 3)[0])
    return mid, code, reason


def read_suback(body: bytes, version: int) -> tuple[int, bytes, str]:
    """SUBACK or UNSUBACK: identifier, a reason code for each topic filter, reason for people."""
    mid, at, reason = body[0] << 8 | body[1], 2, ""
    if version == V5:
        properties, at = _read_block(body, at)
        reason = said(properties)
    return mid, body[at:], reason


def read_connack(body: bytes, version: int) -> tuple[bool, int, dict[str, Any]]:
    """CONNACK: whether there was a session, the reason code, and the properties."""
    properties = _read_block(body, 2)[0] if version == V5 and len(body) > 2 else {}
    return bool(body[0] & 1), body[1], properties


def write_disconnect(version: int, code: int) -> bytes:
    """DISCONNECT with a reason; of MQTT 3.1.1 nothing, where it would be a good farewell."""
    return write_packet(DISCONNECT, bytes((code,))) if version == V5 else b""


def read_disconnect(body: bytes) -> tuple[int, str]:
    """DISCONNECT from the server: reason code, reason for people."""
    code, reason = body[0] if body else 0, ""
    if len(body) > 1:
        reason = said(_read_block(body, 1)[0])
    return code, reason


def said(properties: Mapping[str, Any]) -> str:
    """What the server says of its reasons, for people."""
    reason, other = properties.get("reason_string", ""), properties.get("server_reference")
    return f"{reason} (it names {other})".strip() if other else reason


#: What a reason code of 128 and more means (MQTT 5.0, 2.4).
REASONS = {
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "the server's own rules",
    0x84: "the server does not know this version of MQTT",
    0x85: "the server does not take this client identifier",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "the server is not available",
    0x89: "the server is busy",
    0x8A: "banned",
    0x8B: "the server shuts down",
    0x8C: "bad authentication method",
    0x8D: "no sign of life in time",
    0x8E: "another client took the session over",
    0x8F: "the server does not take this topic filter",
    0x90: "the server does not take this topic",
    0x91: "the packet identifier is in use",
    0x92: "the server does not know the packet identifier",
    0x93: "more messages at once than the receive maximum",
    0x94: "topic alias invalid",
    0x95: "the packet is too large",
    0x96: "messages come too fast",
    0x97: "a quota is exceeded",
    0x98: "ended by an administrator",
    0x99: "the payload is not of the format that was said",
    0x9A: "the server keeps no retained messages",
    0x9B: "the server does not know this quality of service",
    0x9C: "use another server",
    0x9D: "the server has moved",
    0x9E: "the server knows no shared subscriptions",
    0x9F: "connections come too fast",
    0xA0: "the connection lasted too long",
    0xA1: "the server knows no subscription identifiers",
    0xA2: "the server knows no wildcards",
}


def reason_of(code: int, text: str = "") -> str:
    """A reason code for people."""
    return f"{REASONS.get(code, 'reason')} (0x{code:02X})" + (f": {text}" if text else "")
