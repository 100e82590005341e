"""Packets: written and read again, cut at every byte, and what is no packet at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.errors import AddressError, PublishError, PublishTimeout
from millstream.letters import UNFIT
from millstream.message import Link
from millstream.mqtt import MqttBroker, MqttMessage, wire
from millstream.mqtt.broker import settings_of
from millstream.mqtt.connection import Connection
from millstream.mqtt.line import Line
from millstream.mqtt.outbox import Outbox
from millstream.mqtt.wire import V5, V311, Incoming, Malformed

VERSIONS = [V311, V5]
mids = st.integers(1, 65_535)
codes = st.integers(0, 255)
_FIT = st.characters(exclude_categories=["Cs", "Cc"]).filter(lambda c: not UNFIT.search(c))
texts = st.text(_FIT, max_size=40)
topics = texts.filter(lambda t: bool(t) and not set("+#{") & set(t))
blobs = st.binary(max_size=300)
versions = st.sampled_from(VERSIONS)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "byte": st.integers(0, 255),
    "two": st.integers(0, 0xFFFF),
    "four": st.integers(0, 0xFFFFFFFF),
    "variable": st.integers(0, wire.LARGEST),
    "text": texts,
    "data": blobs,
    "pair": st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
}
#: All properties, each with any value.
properties = st.fixed_dictionaries(
    {}, optional={name: _VALUES[kind] for name, (_, kind) in wire.PROPERTIES.items()}
)


class Recording(Line):
    """Notes what a connection tells it."""

    def __init__(self) -> None:
        self.told_of: list[Any] = []

    def welcomed(self, connection: Connection, present: bool, limits: dict[str, Any]) -> None:
        self.told_of.append(("welcome", present, limits))

    def received(self, message: Incoming) -> None:
        fields = (message.topic, message.payload, message.flags, message.mid, message.properties)
        self.told_of.append(("message", *fields))

    def acknowledged(self, kind: int, mid: int, code: int, reason: str) -> None:
        self.told_of.append(("ack", kind, mid, code, reason))

    def told(self, code: int) -> None:
        self.told_of.append(("told", code))

    def lost(self, connection: Connection, reason: str) -> None:
        self.told_of.append(("lost", reason))


class Transport:
    """Takes what is written, and knows whether it was closed."""

    def __init__(self) -> None:
        self.written, self.closed = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed


def connected(
    version: int, *, welcomed: bool = True, largest: int | None = None
) -> tuple[Connection, Recording, Transport]:
    line, transport = Recording(), Transport()
    connection = Connection(line, version, 60, largest)
    connection.connection_made(cast(asyncio.BaseTransport, transport))
    if welcomed:
        connection.data_received(connack(version))
        line.told_of.clear()
    return connection, line, transport


def connack(version: int, present: bool = False, code: int = 0, **limits: Any) -> bytes:
    tail = wire.write_properties(limits) if version == V5 else b""
    return wire.write_packet(wire.CONNACK, bytes((present, code)), tail)


def in_loop(test: Callable[..., None]) -> None:
    """A loop for what makes futures, inside a test that hypothesis calls many times."""

    async def run() -> None:
        test()

    asyncio.run(run())


# Values


@given(st.integers(0, wire.LARGEST))
def test_a_variable_integer_comes_back(number: int) -> None:
    data = wire.variable(number)
    assert len(data) == 1 + (number > 127) + (number > 16_383) + (number > 2_097_151)
    assert wire.read_variable(b"?" + data + b"?", 1) == (number, 1 + len(data))


@given(properties)
def test_properties_come_back(given_: dict[str, Any]) -> None:
    data = wire.write_properties(given_)
    size, at = wire.read_variable(data, 0)
    found = wire.read_properties(data[at:])
    assert len(data) == at + size
    if "subscription_identifier" in given_:
        given_ |= {"subscription_identifier": [given_["subscription_identifier"]]}
    assert found == given_


@given(properties, st.data())
def test_properties_that_are_cut_off_are_none(given_: dict[str, Any], data: st.DataObject) -> None:
    packed = wire.write_properties(given_)
    body = packed[wire.read_variable(packed, 0)[1] :]
    cut = body[: data.draw(st.integers(0, len(body)))]
    try:
        found = wire.read_properties(cut)
    except Malformed:
        return
    # Cut between two of them.
    assert found.keys() <= given_.keys()


@given(blobs)
def test_any_bytes_are_properties_or_malformed(data: bytes) -> None:
    with suppress(Malformed):
        wire.read_properties(data)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "a/{b}", "x" * 70_000])
def test_no_topic(topic: str) -> None:
    with pytest.raises(AddressError):
        wire.topic_bytes(topic)


# Packets that we send: read as a server does, byte by byte by the standard


class Reader:
    """A body, read from the front."""

    def __init__(self, packet: bytes, head: int, version: int) -> None:
        length, at = wire.read_variable(packet, 1)
        assert packet[0] == head and len(packet) == at + length
        self.data, self.version = packet[at:], version

    def take(self, count: int) -> bytes:
        found, self.data = self.data[:count], self.data[count:]
        assert len(found) == count
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def blob(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        return self.blob().decode()

    def properties(self) -> dict[str, Any]:
        if self.version != V5:
            return {}
        size, at = wire.read_variable(self.data, 0)
        self.take(at)
        return wire.read_properties(self.take(size))


@given(
    version=versions,
    client_id=texts,
    clean=st.booleans(),
    keepalive=st.integers(0, 65_535),
    username=st.none() | texts,
    password=st.none() | texts,
    expiry=st.none() | st.integers(0, 0xFFFFFFFF),
    will=st.none()
    | st.tuples(
        topics,
        blobs,
        st.integers(0, 2),
        st.booleans(),
        st.fixed_dictionaries({"content_type": texts}),
    ),
)
def test_connect(
    version: int,
    client_id: str,
    clean: bool,
    keepalive: int,
    username: str | None,
    password: str | None,
    expiry: int | None,
    will: tuple[str, bytes, int, bool, dict[str, Any]] | None,
) -> None:
    packet = wire.write_connect(
        version,
        client_id,
        clean=clean,
        keepalive=keepalive,
        username=username,
        password=password,
        properties={"session_expiry_interval": expiry},
        will=will,
    )
    read = Reader(packet, wire.CONNECT, version)
    assert (read.text(), read.number(1)) == ("MQTT", version)
    flags = read.number(1)
    assert flags & 1 == 0 and flags >> 1 & 1 == clean
    assert read.number(2) == keepalive
    said = {} if expiry is None or version != V5 else {"session_expiry_interval": expiry}
    assert read.properties() == said
    assert read.text() == client_id
    assert bool(flags & 0x04) is (will is not None)
    if will is not None:
        topic, body, qos, retain, given_ = will
        assert read.properties() == (given_ if version == V5 else {})
        assert (read.text(), read.blob()) == (topic, body)
        assert (flags >> 3 & 3, flags >> 5 & 1) == (qos, retain)
    for flag, value in ((0x80, username), (0x40, password)):
        assert bool(flags & flag) is (value is not None)
        if value is not None:
            assert read.text() == value
    assert not read.data


@given(versions, mids, st.lists(st.tuples(topics, st.integers(0, 63)), min_size=1, max_size=5))
def test_subscribe(version: int, mid: int, filters: list[tuple[str, int]]) -> None:
    read = Reader(wire.write_subscribe(version, mid, filters), wire.SUBSCRIBE | 2, version)
    assert (read.number(2), read.properties()) == (mid, {})
    found = []
    while read.data:
        found.append((read.text(), read.number(1)))
    assert found == filters


@given(versions, mids, topics)
def test_unsubscribe(version: int, mid: int, topic: str) -> None:
    read = Reader(wire.write_unsubscribe(version, mid, topic), wire.UNSUBSCRIBE | 2, version)
    assert (read.number(2), read.properties(), read.text()) == (mid, {}, topic)
    assert not read.data


def test_packets_without_a_body() -> None:
    assert wire.PING == b"\xc0\0" and wire.FAREWELL == b"\xe0\0"
    assert wire.write_disconnect(V5, 0x82) == b"\xe0\1\x82"
    assert wire.write_disconnect(V311, 0x82) == b""  # its DISCONNECT would be a good farewell


@given(versions, topics, blobs, st.integers(0, 2), st.booleans(), mids, properties)
def test_publish(
    version: int,
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    mid: int,
    given_: dict[str, Any],
) -> None:
    given_.pop("subscription_identifier", None)
    props = wire.write_properties(given_) if version == V5 else b""
    flags = qos << 1 | retain
    packet = wire.write_publish(wire.topic_bytes(topic), payload, flags, mid if qos else 0, props)
    _, start = wire.read_variable(packet, 1)
    # What stands before and behind it is not touched.
    around = b"\xff" + packet + b"\xff"
    found = wire.read_publish(around, start + 1, len(around) - 1, packet[0] & 15, version)
    assert (found.topic, found.payload, found.qos, found.retain) == (topic, payload, qos, retain)
    assert found.mid == (mid if qos else 0) and not found.dup
    assert found.properties == (given_ if version == V5 else {})
    again = wire.sent_again(packet)
    assert again[1:] == packet[1:] and again[0] & wire.DUP


# Packets that we get: what a connection makes of them


def packets(version: int) -> st.SearchStrategy[tuple[bytes, Any]]:
    """A packet from the server, and what is told of it."""

    def message(topic: str, payload: bytes, qos: int, dup: bool, mid: int, type: str) -> Any:
        props = {"content_type": type} if version == V5 else {}
        data = wire.write_properties(props) if version == V5 else b""
        flags, mid = qos << 1 | (dup and qos > 0) << 3, mid if qos else 0
        packet = wire.write_publish(wire.topic_bytes(topic), payload, flags, mid, data)
        return packet, ("message", topic, payload, flags, mid, props)

    def ack(kind: int, mid: int, code: int, reason: str) -> Any:
        tail = b""
        if version == V5 and (code or reason):
            tail = bytes((code,))
            tail += wire.write_properties({"reason_string": reason}) if reason else b""
        elif version != V5:
            code, reason = 0, ""
        head = kind | (2 if kind == wire.PUBREL else 0)
        return wire.write_packet(head, mid.to_bytes(2), tail), ("ack", kind, mid, code, reason)

    kinds = st.sampled_from([wire.PUBACK, wire.PUBREC, wire.PUBREL, wire.PUBCOMP])
    return st.one_of(
        st.builds(message, topics, blobs, st.integers(0, 2), st.booleans(), mids, texts),
        st.builds(ack, kinds, mids, codes, texts),
    )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(VERSIONS).flatmap(
        lambda v: st.tuples(st.just(v), st.lists(packets(v), min_size=1, max_size=4))
    )
)
def test_packets_arrive_whole_wherever_they_are_cut(case: tuple[int, list[Any]]) -> None:
    version, some = case
    stream = b"".join(packet for packet, _ in some)

    def check() -> None:
        for cut in range(len(stream)):
            connection, line, _ = connected(version)
            connection.data_received(stream[:cut])
            connection.data_received(stream[cut:])
            assert line.told_of == [told for _, told in some]
        connection, line, _ = connected(version)
        for at in range(len(stream)):
            connection.data_received(stream[at : at + 1])
        assert line.told_of == [told for _, told in some]

    in_loop(check)


@pytest.mark.parametrize("version", VERSIONS)
@given(st.booleans(), st.integers(0, 65_535))
@settings(deadline=None, max_examples=20)
def test_connack(version: int, present: bool, most: int) -> None:
    def check() -> None:
        connection, line, _ = connected(version, welcomed=False)
        packet = connack(version, present, receive_maximum=most)
        for at in range(len(packet)):
            connection.data_received(packet[at : at + 1])
        limits = {"receive_maximum": most} if version == V5 else {}
        assert line.told_of == [("welcome", present, limits)]
        assert connection.welcome.result() == (present, 0, limits)

    in_loop(check)


@pytest.mark.parametrize("version", VERSIONS)
async def test_answers_find_who_asked(version: int) -> None:
    connection, _, _ = connected(version)
    loop = asyncio.get_running_loop()
    waiting = {mid: loop.create_future() for mid in (1, 2)}
    connection.answers.update(waiting)
    ping = asyncio.create_task(connection.ping())
    await asyncio.sleep(0)
    tail = wire.write_properties({"reason_string": "no"}) if version == V5 else b""
    suback = wire.write_packet(wire.SUBACK, b"\0\2", tail, b"\x80\1")
    unsuback = wire.write_packet(wire.UNSUBACK, b"\0\1", tail, b"\0" if version == V5 else b"")
    for byte in suback + unsuback + bytes((wire.PINGRESP, 0)):
        connection.data_received(bytes((byte,)))
    reason = "no" if version == V5 else ""
    assert waiting[2].result() == (b"\x80\1", reason)
    assert waiting[1].result() == (b"\0" if version == V5 else b"", reason)
    await asyncio.wait_for(ping, 1)


async def test_a_farewell_of_the_server_ends_it_with_its_reason() -> None:
    connection, line, transport = connected(V5)
    reason = wire.write_properties({"reason_string": "tonight"})
    farewell = wire.write_packet(wire.DISCONNECT, b"\x8b", reason)
    ping = wire.write_packet(wire.PUBACK, b"\0\1")
    connection.data_received(farewell + ping)
    assert line.told_of == [("told", 0x8B), ("lost", "the server shuts down (0x8B): tonight")]
    assert transport.closed


async def test_a_server_that_names_another_is_quoted() -> None:
    connection, line, _ = connected(V5)
    other = wire.write_properties({"server_reference": "b.example:1883"})
    connection.data_received(wire.write_packet(wire.DISCONNECT, b"\x9c", other))
    reason = "use another server (0x9C): (it names b.example:1883)"
    assert line.told_of == [("told", 0x9C), ("lost", reason)]


# What is no MQTT

_SHORT = wire.write_packet(wire.PUBLISH, b"")
_BAD: dict[str, tuple[bytes, int]] = {
    "a length of five bytes": (b"\x30\xff\xff\xff\xff\x7f", 0x81),
    "an empty message": (_SHORT, 0x81),
    "a message without a topic": (wire.write_packet(wire.PUBLISH, b"\0\0\0"), 0x82),
    "a topic longer than its packet": (wire.write_packet(wire.PUBLISH, b"\0\x09ab"), 0x81),
    "a topic that is no text": (wire.write_packet(wire.PUBLISH, b"\0\2\xff\xfe\0"), 0x81),
    "QoS 3": (wire.write_packet(wire.PUBLISH | 6, b"\0\1a\0\1\0"), 0x81),
    "packet identifier 0": (wire.write_packet(wire.PUBLISH | 2, b"\0\1a\0\0\0"), 0x81),
    "no packet identifier": (wire.write_packet(wire.PUBLISH | 2, b"\0\1a"), 0x81),
    "properties longer than their packet": (wire.write_packet(wire.PUBLISH, b"\0\1a\x7f"), 0x81),
    "an empty PUBACK": (wire.write_packet(wire.PUBACK, b""), 0x81),
    "half a PUBACK": (wire.write_packet(wire.PUBACK, b"\0"), 0x81),
    "a PUBACK with properties cut off": (wire.write_packet(wire.PUBACK, b"\0\1\0\x05\x1f"), 0x81),
    "a PUBACK with an unknown property": (wire.write_packet(wire.PUBACK, b"\0\1\0\1\x7e"), 0x81),
    "a PUBACK with flags": (wire.write_packet(wire.PUBACK | 1, b"\0\1"), 0x81),
    "a PUBREL without flags": (wire.write_packet(wire.PUBREL, b"\0\1"), 0x81),
    "a SUBACK without codes": (wire.write_packet(wire.SUBACK, b"\0\1\0"), 0x81),
    "an empty SUBACK": (wire.write_packet(wire.SUBACK, b""), 0x81),
    "an empty UNSUBACK": (wire.write_packet(wire.UNSUBACK, b""), 0x81),
    "a second CONNACK": (connack(V5), 0x82),
    "a CONNECT": (wire.write_packet(wire.CONNECT, b""), 0x82),
    "a SUBSCRIBE": (wire.write_packet(wire.SUBSCRIBE | 2, b"\0\1"), 0x81),
    "a PINGREQ": (wire.PING, 0x82),
    "an AUTH": (wire.write_packet(wire.AUTH, b""), 0x82),
    "kind 0": (b"\0\0", 0x82),
    "a DISCONNECT cut off": (wire.write_packet(wire.DISCONNECT, b"\0\x09"), 0x81),
}


#: MQTT 3.1.1 has no properties.
_V5 = {what for what in _BAD if "propert" in what or "codes" in what or "cut off" in what}


@pytest.mark.parametrize(
    ("what", "version"),
    [(what, version) for what in _BAD for version in VERSIONS if version == V5 or what not in _V5],
)
@pytest.mark.parametrize("split", [False, True])
async def test_what_is_no_packet_ends_the_connection(what: str, version: int, split: bool) -> None:
    packet, code = _BAD[what]
    connection, line, transport = connected(version)
    asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    connection.answers[1] = asked
    # What stands behind it is none of its own.
    data = packet + wire.write_packet(wire.PUBACK, b"\0\1")
    for chunk in [data[i : i + 1] for i in range(len(data))] if split else [data]:
        if not transport.closed:
            connection.data_received(chunk)
    [(event, reason)] = line.told_of
    assert event == "lost" and reason.startswith("the server sent what is not MQTT: ")
    assert len(reason) > len("the server sent what is not MQTT: ") + 5
    assert transport.closed
    assert transport.written == wire.write_disconnect(version, code)
    assert asked.done() and asked.exception() is not None  # nobody waits for ever


@pytest.mark.parametrize("version", VERSIONS)
async def test_nothing_comes_before_connack(version: int) -> None:
    tail = b"\0" if version == V5 else b""
    for packet in (
        wire.write_packet(wire.PUBLISH, b"\0\1a", tail),
        wire.write_packet(wire.PUBACK, b"\0\1"),
        bytes((wire.PINGRESP, 0)),
    ):
        connection, line, transport = connected(version, welcomed=False)
        connection.data_received(packet)
        assert transport.closed and line.told_of[0][0] == "lost"
        assert transport.written == wire.write_disconnect(version, 0x82)
        assert isinstance(connection.welcome.exception(), OSError)


async def test_a_packet_may_be_too_large() -> None:
    connection, line, transport = connected(V5, largest=1000)
    connection.data_received(b"\x30" + wire.variable(1001))
    assert transport.written == wire.write_disconnect(V5, 0x95)
    assert line.told_of == [("lost", "the server sent what is not MQTT: a packet of 1,001 bytes")]


@settings(deadline=None, max_examples=300)
@given(versions, st.binary(max_size=60), st.booleans())
def test_any_bytes_are_packets_or_end_the_connection(
    version: int, data: bytes, welcomed: bool
) -> None:
    def check() -> None:
        connection, line, transport = connected(version, welcomed=welcomed)
        connection.data_received(data)
        ends = [reason for event, *reason in line.told_of if event == "lost"]
        assert len(ends) == transport.closed

    in_loop(check)


def test_headers_that_are_none_cost_the_message_nothing_else() -> None:
    message = MqttMessage(Incoming("a", b"x", 0, 0, props=b"\x7e"), Link(MqttBroker().driver, None))
    assert message.headers == {} and message.body == b"x"
    with pytest.raises(Malformed):
        _ = message.properties


# What is published


class Publishing:
    """An outbox whose connections are fed by hand."""

    def __init__(self) -> None:
        self.outbox = Outbox(settings_of("mqtt://nowhere", {}), "c", lambda *_: None, print)

    async def connect(self, present: bool, **limits: Any) -> tuple[Connection, Transport]:
        connection, transport = Connection(self.outbox, V5, 60), Transport()
        connection.connection_made(cast(asyncio.BaseTransport, transport))
        connection.data_received(connack(V5, present, **limits))
        self.outbox.up.set()
        await asyncio.sleep(0)
        return connection, transport

    def publish(self, qos: int, timeout: float = 5.0) -> asyncio.Task[Any]:
        return asyncio.create_task(self.outbox.publish("a", b"x", qos, False, b"\0", timeout))


@pytest.mark.parametrize("present", [True, False])
async def test_qos_2_goes_on_where_it_was_or_begins_anew(present: bool) -> None:
    publishing = Publishing()
    connection, transport = await publishing.connect(False)
    message = publishing.publish(2)
    await asyncio.sleep(0.01)
    packet = transport.written
    assert packet == wire.write_publish(b"\0\1a", b"x", 4, 1, b"\0")
    connection.data_received(wire.write_packet(wire.PUBREC, b"\0\1\x10"))
    await asyncio.sleep(0)
    pubrel = wire.write_packet(wire.PUBREL | 2, b"\0\1")
    assert transport.written == packet + pubrel
    # Without its session the server may have forgotten what it had not passed on.
    connection, transport = await publishing.connect(present)
    assert transport.written == (pubrel if present else packet)
    if not present:
        connection.data_received(wire.write_packet(wire.PUBREC, b"\0\1"))
    # 0x92, the server does not know the identifier: it had ended the exchange before.
    connection.data_received(wire.write_packet(wire.PUBCOMP, b"\0\1\x92" if present else b"\0\1"))
    receipt = await message
    assert receipt is not None and receipt.heard is not present  # the last PUBREC said it


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_publication_given_up_keeps_its_identifier_while_the_server_may_know_it(
    qos: int,
) -> None:
    publishing = Publishing()
    _, transport = await publishing.connect(False)
    with pytest.raises(PublishTimeout):
        await publishing.publish(qos, 0.01)
    packet = transport.written
    connection, transport = await publishing.connect(True)
    assert transport.written == (wire.sent_again(packet) if qos == 2 else b"")
    assert publishing.outbox.in_use(1) is (qos == 2)
    for kind in (wire.PUBREC, wire.PUBCOMP):
        connection.data_received(wire.write_packet(kind, b"\0\1"))
    assert not publishing.outbox.in_use(1)


async def test_there_is_always_an_identifier_for_a_subscription() -> None:
    publishing = Publishing()
    await publishing.connect(False, receive_maximum=65_535)
    sent = [publishing.publish(1) for _ in range(65_535)]
    await asyncio.sleep(0)
    publishing.outbox.ask(lambda mid: mid.to_bytes(2))
    connection = publishing.outbox.connection
    assert connection is not None and len(connection.answers) == 1
    assert not set(connection.answers) & {m for m in range(65_536) if publishing.outbox.in_use(m)}
    for task in sent:
        task.cancel()
    await asyncio.gather(*sent, return_exceptions=True)


async def test_a_quality_of_service_that_the_server_has_not_is_refused_before_it_is_sent() -> None:
    publishing = Publishing()
    _, transport = await publishing.connect(False, maximum_qos=1)
    with pytest.raises(PublishError, match="takes 1 at most"):
        await publishing.publish(2)
    assert transport.written == b""


@pytest.mark.parametrize("bad", ["\0", "\t", "\x1b", "\x7f", "\x85", "\ud800", "\ufdd0", "\uffff"])
def test_characters_that_servers_refuse_are_not_written(bad: str) -> None:
    for properties in ({"content_type": f"a{bad}"}, {"user_property": [("a", bad)]}):
        with pytest.raises(ValueError, match=r"U\+"):
            wire.write_properties(properties)
    with pytest.raises(AddressError, match=r"U\+"):
        wire.topic_bytes(f"a/{bad}")
