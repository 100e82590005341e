"""What is special to MQTT: sessions, order of acknowledgements, retained messages, answers."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from millstream.errors import (
    AddressError,
    CapabilityError,
    ConnectError,
    NotConnected,
    PublishError,
    RemoteError,
    SetupError,
)
from millstream.letters import replay
from millstream.mqtt import (
    MqttBroker,
    MqttMessage,
    MqttResponse,
    QoS,
    Receipt,
    TestMqttBroker,
    Will,
    WillProperties,
    wire,
)
from millstream.mqtt.connection import Connection
from millstream.mqtt.fastapi import MqttRouter
from millstream.mqtt.letters import look
from millstream.retry import Retry
from millstream.security import SASLPlaintext
from tests.helpers import eventually
from tests.servers.mqtt import MosquittoServer


async def test_a_session_brings_what_was_left_to_the_next_process(mqtt: Any, name: str) -> None:
    got: list[tuple[int, bool]] = []
    gate = asyncio.Event()

    def application() -> MqttBroker:
        broker = MqttBroker(mqtt.url, client_id=f"app-{name}", graceful_timeout=0.1)

        @broker.subscriber(name)
        async def handler(body: int, message: MqttMessage) -> None:
            got.append((body, message.raw.dup))
            await gate.wait()

        return broker

    first = application()
    await first.start()
    for n in range(3):
        await first.publish(n, name)
    await eventually(lambda: got)
    await first.stop()
    assert got == [(0, False)]
    gate.set()
    second = application()
    await second.start()
    await eventually(lambda: len(got) == 4)
    assert got[1:] == [(0, True), (1, True), (2, True)]
    await second.stop()


async def test_acknowledgements_leave_in_the_order_of_the_messages(
    mqtt: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    done: list[int] = []
    first = asyncio.Event()
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name, concurrency=4)
    async def handler(body: int) -> None:
        if body == 0:
            await first.wait()
        done.append(body)

    write = Connection.write

    def noted(self: Connection, data: bytes) -> None:
        if data[0] == 0x40:
            order.append(data[2] << 8 | data[3])
        write(self, data)

    monkeypatch.setattr(Connection, "write", noted)
    await broker.start()
    for n in range(4):
        await broker.publish(n, name)
    await eventually(lambda: len(done) == 3)
    assert order == []
    first.set()
    await eventually(lambda: len(order) == 4)
    assert order == sorted(order)
    await broker.stop()


async def test_a_message_that_waits_for_its_next_attempt_holds_up_nobody(
    mqtt: Any, name: str
) -> None:
    got: list[int] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name, retry=Retry(delay=0.5), receive_maximum=2)
    async def handler(body: int, message: MqttMessage) -> None:
        if body == 0 and message.attempt == 1:
            raise ValueError("not yet")
        got.append(body)

    await broker.start()
    for n in range(6):
        await broker.publish(n, name)
    await eventually(lambda: len(got) == 6)
    assert got == [1, 2, 3, 4, 5, 0]
    await broker.stop()


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_runs_when_the_connection_breaks_is_not_handled_twice(
    mqtt: Any, name: str, qos: int
) -> None:
    got: list[int] = []
    gate = asyncio.Event()
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name, qos=qos)
    async def handler(body: int) -> None:
        got.append(body)
        await gate.wait()

    await broker.start()
    for n in range(3):
        await broker.publish(n, name, qos=qos)
    await eventually(lambda: got)
    [flow] = broker.driver.flows
    assert flow.connection is not None
    flow.connection.close("cut")
    await eventually(lambda: flow.up.is_set())
    gate.set()
    await broker.publish(3, name, qos=qos)
    await eventually(lambda: len(got) == 4)
    assert got == [0, 1, 2, 3]
    await broker.stop()


async def test_what_is_published_while_the_server_is_away_is_confirmed_later(
    mqtt_server: MosquittoServer, name: str
) -> None:
    got: list[int] = []
    broker = MqttBroker(mqtt_server.url, publish_timeout=10.0, reconnect_max=0.3)

    @broker.subscriber(name)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await asyncio.to_thread(mqtt_server.stop)
    outbox = broker.driver.outbox
    assert outbox is not None
    await eventually(lambda: not outbox.up.is_set())
    publishing = asyncio.create_task(broker.publish(1, name))
    with pytest.raises(NotConnected):
        await broker.publish(2, name, timeout=0.2)
    await asyncio.to_thread(mqtt_server.start)
    assert isinstance(await publishing, Receipt)
    await eventually(lambda: got == [1])
    await broker.stop()


async def test_retained_messages_and_their_end(mqtt: Any, name: str) -> None:
    got: list[tuple[str, bool]] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(f"{name}/#", qos=0)
    async def handler(body: str, message: MqttMessage) -> None:
        got.append((body, message.retain))

    async with broker:
        await broker.publish("on", f"{name}/lamp", retain=True)
        await broker.start()
        await eventually(lambda: got == [("on", True)])
        await broker.publish(b"", f"{name}/lamp", retain=True)


async def test_the_will_is_sent_when_the_connection_breaks(mqtt: Any, name: str) -> None:
    got: list[str] = []
    watching = MqttBroker(mqtt.url)

    @watching.subscriber(f"{name}/state")
    async def handler(body: str, message: MqttMessage) -> None:
        got.append(f"{body} {message.headers['who']}")

    await watching.start()
    will = Will(f"{name}/state", "gone", headers={"who": "me", "content-type": "text/plain"})
    dying = MqttBroker(mqtt.url, will=will, reconnect_max=0.1)
    await dying.connect()
    assert dying.driver.outbox is not None and dying.driver.outbox.connection is not None
    dying.driver.outbox.connection.close("cut")
    await eventually(lambda: got == ["gone me"])
    await dying.stop()
    await watching.stop()
    assert got == ["gone me"]


async def test_expiry_and_response_options_travel(mqtt: Any, name: str) -> None:
    got: list[Any] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name)
    @broker.publisher(f"{name}/out", expiry=60)
    async def handler(body: int) -> Any:
        return MqttResponse(body, headers={"a": "b"}, qos=2)

    @broker.subscriber(f"{name}/out", qos=2)
    async def out(body: int, message: MqttMessage) -> None:
        got.append((message.qos, message.headers["a"], message.properties))

    await broker.start()
    await broker.publish(1, name)
    await eventually(lambda: got)
    qos, header, properties = got[0]
    assert (qos, header) == (2, "b")
    assert 55 <= properties["message_expiry_interval"] <= 60
    await broker.stop()


@pytest.mark.parametrize("real", [True, False])
async def test_an_answer_takes_the_options_of_its_response(
    mqtt: Any, name: str, real: bool
) -> None:
    got: list[Any] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name)
    async def handler(body: int) -> Any:
        return MqttResponse(body + 1, headers={"a": "b"}, qos=2, retain=True, expiry=60)

    @broker.subscriber(f"{name}/answers", qos=2)
    async def answered(body: int, message: MqttMessage) -> None:
        got.append((body, message.qos, message.raw.retain, message.headers["a"]))
        if real:
            assert 55 <= message.properties["message_expiry_interval"] <= 60

    async with TestMqttBroker(broker, with_real=real):
        await broker.publish(1, name, reply_to=f"{name}/answers")
        await eventually(lambda: got == [(2, 2, False, "b")])
        # It is kept for those that come later, as it was asked for.
        late = await broker.subscriber(f"{name}/+").get_one(timeout=5)
        assert late is not None and await late.decode() == 2 and late.raw.retain


@pytest.mark.parametrize("named", [None, "dead"])
async def test_dead_letters_are_retained_and_do_not_come_back(
    mqtt: Any, name: str, named: str | None
) -> None:
    got: list[str] = []
    broker = MqttBroker(mqtt.url, **({"dead_letter": f"{name}/{named}"} if named else {}))

    @broker.subscriber(f"{name}/#", retry=Retry(attempts=1))
    async def handler(body: str, message: MqttMessage) -> None:
        got.append(message.destination)
        raise ValueError("never")

    await broker.start()
    await broker.publish("x", f"{name}/a")
    letters = broker.driver.letters(f"{name}/{named or 'all/dlq'}")
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    [letter] = [one async for one in letters.read()]
    assert (letter.origin, letter.error, letter.message.body) == (f"{name}/a", "never", b"x")
    assert got == [f"{name}/a"]
    assert await replay(letters, letter)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 2)
    [letter] = [one async for one in letters.read()]
    assert letter.replays == 1
    assert await letters.remove(letter.id) and not await letters.remove(letter.id)
    await broker.stop()


async def test_version_311_says_what_it_cannot(mqtt: Any, name: str) -> None:
    broker = MqttBroker(mqtt.url, version="3.1.1")
    got: list[int] = []

    @broker.subscriber(name)
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, name)
    await eventually(lambda: got == [1])
    for options in ({"headers": {"a": "b"}}, {"reply_to": "x"}, {"expiry": 5}):
        with pytest.raises(CapabilityError, match=r"3\.1\.1"):
            await broker.publish(1, name, **options)
    with pytest.raises(CapabilityError, match=r"3\.1\.1"):
        await broker.request(1, name)
    await broker.stop()


@pytest.mark.parametrize("version", ["5.0", "3.1.1"])
async def test_an_answer_at_an_agreed_topic(mqtt: Any, name: str, version: str) -> None:
    asking, answering = MqttBroker(mqtt.url, version=version), MqttBroker(mqtt.url)

    async def handler(body: int) -> int:
        return body + 1

    if version == "5.0":  # the question says where
        answering.subscriber(name)(handler)
    else:
        answering.subscriber(name)(answering.publisher(f"{name}/answers")(handler))
    await answering.start()
    async with asking:
        for n in range(3):
            answer = asking.request(n, name, reply_to=f"{name}/answers", response_model=int)
            assert await answer == n + 1

        async def left() -> bool:
            receipt = await answering.publish(0, f"{name}/answers")
            return receipt == Receipt(heard=False)

        await eventually(left)  # nothing more is sent to where nobody waits
    await answering.stop()


async def test_foreign_clients_both_ways(mqtt: Any, name: str) -> None:
    got: list[tuple[str, str | None]] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name)
    async def handler(body: str, message: MqttMessage) -> str:
        got.append((body, message.headers.get("tenant")))
        return body.upper()

    await broker.start()
    port = mqtt.url.rpartition(":")[2]
    tail = ["-p", port, "-V", "5"]
    sent = ["mosquitto_pub", *tail, "-q", "1", "-t", name, "-m", "hello"]
    sent += ["-D", "publish", "user-property", "tenant", "acme"]
    await asyncio.to_thread(subprocess.run, sent, check=True, timeout=10)
    await eventually(lambda: got == [("hello", "acme")])
    asked = ["mosquitto_rr", *tail, "-W", "5", "-t", name, "-e", f"{name}/re", "-m", "ask"]
    answer = await asyncio.to_thread(subprocess.run, asked, capture_output=True, timeout=10)
    assert answer.stdout.strip() == b"ASK"
    await broker.stop()


async def test_a_wrong_password_is_told_at_once(name: str) -> None:
    with MosquittoServer(anonymous=False) as server:
        security = SASLPlaintext("me", "secret-word", use_ssl=False)
        broker = MqttBroker(server.url, security=security)
        with pytest.raises(ConnectError, match=r"not authorized|bad user") as caught:
            await broker.connect()
        assert caught.value.permanent
        assert "secret-word" not in str(caught.value)


async def test_sharing_a_session_is_told(mqtt: Any, name: str) -> None:
    said: list[str] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(name, session=f"s-{name}")
    async def handler(body: int) -> None: ...

    await broker.start()
    broker.driver.notify = lambda event, reason: said.append(reason)
    [flow] = broker.driver.flows
    port = mqtt.url.rpartition(":")[2]
    thief = ["mosquitto_sub", "-p", port, "-V", "5", "-i", f"s-{name}", "-t", "x", "-E"]

    def back(lost: Connection | None) -> bool:
        return flow.connection is not lost and flow.up.is_set()

    for _ in range(3):
        connection = flow.connection
        await asyncio.to_thread(subprocess.run, thief, check=True, timeout=10)
        await eventually(partial(back, connection))
    assert any("its own client_id=" in text for text in said)
    await broker.stop()


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"qos": 3}, SetupError, "qos=3"),
        ({"headers": {"a": "\x1b[31m"}}, PublishError, r"U\+001B"),
        ({"headers": {"a": "\ud800"}}, PublishError, r"U\+D800"),
        ({"headers": {"a": "x" * 70_000}}, PublishError, "65,535"),
        ({"headers": {"a": 1}}, PublishError, "header 'a' is 1, and headers are texts"),
        ({"expiry": "soon"}, PublishError, "expiry='soon' is no number"),
        ({"expiry": -1}, PublishError, "more than 0"),
        ({"expiry": 1e10}, PublishError, "message_expiry_interval"),
        ({"reply_to": "a/+"}, AddressError, "wildcards"),
    ],
)
async def test_a_publication_that_cannot_be_is_told_and_disturbs_nobody(
    mqtt: Any, name: str, options: dict[str, Any], error: type[Exception], why: str
) -> None:
    for broker in (MqttBroker(mqtt.url), MqttBroker()):
        tested = TestMqttBroker(broker, with_real=broker.driver.settings.where == mqtt.url)
        async with tested:
            driver = broker.driver
            connection = getattr(getattr(driver, "outbox", None), "connection", None)
            with pytest.raises(error, match=why):
                await broker.publish(1, name, **options)
            assert await broker.publish(1, name) == Receipt(heard=False)
            if connection is not None:
                assert broker.driver.outbox is not None
                assert broker.driver.outbox.connection is connection  # it lives


async def test_an_error_that_says_anything_ends_as_a_dead_letter(mqtt: Any, name: str) -> None:
    said = "\x1b[31mred\x1b[0m\t\0 \ud800 \uffff"
    broker = MqttBroker(mqtt.url, logger=None)  # what is captured could not be reported

    @broker.subscriber(name, retry=Retry(attempts=1))
    async def handler(body: int) -> None:
        raise ValueError(said)

    await broker.start()
    await broker.publish(1, name)
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    [letter] = [one async for one in broker.driver.letters(f"{name}/dlq").read()]
    assert letter.error == said
    with pytest.raises(RemoteError, match="red"):
        await broker.request(1, name)
    await broker.stop()


async def test_a_server_without_qos_2(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with MosquittoServer(listener=["max_qos 1"]) as server:
        broker = MqttBroker(server.url)
        got: list[int] = []

        @broker.subscriber(name, qos=2)
        async def handler(body: int) -> None:
            got.append(body)

        await broker.start()
        assert broker.connection_info["maximum_qos"] == 1
        with pytest.raises(PublishError, match="takes 1 at most"):
            await broker.publish(1, name, qos=2)
        await broker.publish(2, name)
        await eventually(lambda: got == [2])
        await broker.stop()
    assert f"{name!r}: the server gives QoS 1 where 2 was wanted" in caplog.text


@asynccontextmanager
async def welcoming(welcome: bytes) -> AsyncIterator[str]:
    """A server that says this to CONNECT, and yes to SUBSCRIBE; its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(welcome)
        while packet := await reader.read(1000):
            if packet[0] == wire.SUBSCRIBE | 2:
                writer.write(wire.write_packet(wire.SUBACK, packet[2:4], b"\0\1"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_server_that_speaks_311_alone_is_told_of_at_once() -> None:
    async with welcoming(b"\x20\2\0\1") as url:
        with pytest.raises(ConnectError, match=r'try version="3\.1\.1"') as caught:
            await MqttBroker(url).connect()
        assert caught.value.permanent


async def test_a_server_that_keeps_sessions_for_less_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    granted = wire.write_properties({"session_expiry_interval": 60})
    async with welcoming(wire.write_packet(wire.CONNACK, b"\0\0", granted)) as url:
        broker = MqttBroker(url, session_expiry=3600)

        @broker.subscriber("a")
        async def handler(body: int) -> None: ...

        await broker.start()
        await broker.stop()
    assert "keeps the session for 60 s where 3600 were wanted" in caplog.text


async def test_the_server_says_how_often_it_wants_to_hear_of_us(name: str) -> None:
    with MosquittoServer(settings=["max_keepalive 10"]) as server:
        async with MqttBroker(server.url, keepalive=60) as broker:
            assert broker.connection_info["server_keep_alive"] == 10
            assert broker.driver.outbox is not None and broker.driver.outbox.connection is not None
            assert broker.driver.outbox.connection.keepalive == 10


@pytest.mark.parametrize(
    ("missing", "topic"), [("shared", "$share/g/a"), ("wildcard", "a/+"), ("wildcard", "#")]
)
async def test_a_server_without_such_subscriptions_is_told_of_at_the_start(
    missing: str, topic: str
) -> None:
    welcome = wire.write_packet(
        wire.CONNACK, b"\0\0", wire.write_properties({f"{missing}_subscription_available": 0})
    )

    async with welcoming(welcome) as url:
        broker = MqttBroker(url)

        @broker.subscriber(topic)
        async def handler(body: int) -> None: ...

        with pytest.raises(SetupError, match=f"knows no {missing} subscriptions"):
            await broker.start()
        await broker.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"no_local": True},
        {"retained": "never"},
        {"retain_as_published": True},
        {"receive_maximum": 5},
        {"session_expiry": 60},
    ],
)
async def test_options_that_311_has_not_are_refused_at_the_start(
    mqtt: Any, name: str, options: dict[str, Any]
) -> None:
    for real in (True, False):
        broker = MqttBroker(mqtt.url, version="3.1.1")

        @broker.subscriber(name, **options)
        async def handler(body: int) -> None: ...

        with pytest.raises(CapabilityError, match=f"has no {next(iter(options))}"):
            async with TestMqttBroker(broker, with_real=real):
                pass
    broker = MqttBroker(mqtt.url, version="3.1.1")
    broker.publisher(name, expiry=5)
    with pytest.raises(CapabilityError, match=r"3\.1\.1 has no expiry"):
        await broker.start()
    await broker.stop()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"will": Will("a/#")}, "wildcards"),
        ({"will": Will("a", b"x" * 70_000)}, "65,535"),
        ({"will": Will("a", qos=3)}, "qos=3"),
        ({"will": Will("a", delay=-1)}, "will_delay_interval"),
        ({"will": Will("a", expiry=0)}, "more than 0"),
        ({"will": Will("a", delay=3), "version": "3.1.1"}, r"3\.1\.1"),
        ({"will": Will("a", delay=3, properties=WillProperties())}, "properties beside"),
        ({"client_id": "a\0"}, r"U\+0000"),
        ({"user_properties": [1]}, "user_property"),
        ({"user_properties": {"a": "b"}, "version": "3.1.1"}, "no user_properties"),
        ({"maximum_packet_size": 0}, "maximum_packet_size=0"),
        ({"session_expiry": 0}, "clean_session=True"),
        ({"session_expiry": 1e11}, "for ever"),
        ({"receive_maximum": 0}, "65,535"),
        ({"reply_prefix": "a/+"}, "wildcards"),
        ({"keepalive": -1}, "keepalive=-1"),
        ({"keepalive": "20"}, "MqttBroker: keepalive='20' is str, not int"),
        ({"clean_session": 1}, "clean_session=1 is int, not bool"),
        ({"port": 70_000}, "port=70000"),
        ({"version": "4"}, "version='4'"),
        ({"reconnect": object()}, "reconnect_max="),
        ({"on_connection_recovery_failed": print}, "no attempt is the last"),
    ],
)
def test_options_of_a_broker_that_cannot_be(options: dict[str, Any], why: str) -> None:
    with pytest.raises(SetupError, match=why):
        MqttBroker(**options)


def test_host_and_port_instead_of_the_address() -> None:
    assert MqttBroker("localhost", port=2883).driver.describe() == "mqtt://localhost:2883"
    assert MqttBroker(host="sea.example").driver.describe() == "mqtt://sea.example:1883"
    assert MqttBroker("mqtts://a", host="b").driver.describe() == "mqtts://b:8883"
    assert MqttBroker(port=None, keepalive=None).driver.settings.keepalive == 20  # type: ignore[arg-type]
    assert MqttRouter("mqtt://a:1", port=2).broker.driver.describe() == "mqtt://a:2"


async def test_options_under_the_names_of_other_frameworks(mqtt: Any, name: str) -> None:
    got: list[str] = []
    gone = WillProperties(
        content_type="text/plain", user_properties=[("who", "me")], message_expiry_interval=60
    )
    options: dict[str, Any] = {
        "keepalive": 60,
        "clean_session": False,
        "mqtt_connect_timeout": 3.0,
        "session_expiry_interval": 77,
        "receive_maximum": 7,
        "maximum_packet_size": 100_000,
        "user_properties": (("a", "b"),),
        "reconnect": None,
        "request_response_information": True,
        "request_problem_information": True,
        "session_replay_buffer_size": 10,
        "session_replay_timeout": 3.0,
        "stripped_prefixes": ("$queue/",),
    }
    will = Will(f"{name}/gone", b"bye", qos=QoS.AT_LEAST_ONCE, retain=False, properties=gone)
    broker = MqttBroker(mqtt.url, client_id=f"c-{name}", will=will, **options)

    @broker.subscriber(f"{name}/gone", qos=QoS.AT_LEAST_ONCE, max_workers=1)
    async def handler(body: str, message: MqttMessage) -> None:
        got.append(f"{body} {message.headers['who']}")

    await broker.start()
    [flow] = broker.driver.flows
    assert (flow.expiry, flow.receive_maximum) == (77, 7)
    assert broker.driver.settings.connect_timeout == 3.0
    assert broker.driver.outbox is not None and broker.driver.outbox.connection is not None
    broker.driver.outbox.connection.close("cut")
    await eventually(lambda: got == ["bye me"])
    await broker.stop()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"topic": "a/b+"}, "whole levels"),
        ({"topic": "a\0"}, r"U\+0000"),
        ({"topic": "a" * 70_000}, "65,535"),
        ({"topic": "a", "retained": "x"}, "retained='x'"),
        ({"topic": "a", "session_expiry": 0}, "session_expiry=0"),
        ({"topic": "a", "session": "a\tb"}, r"U\+0009"),
        ({"topic": "a", "qos": 3}, "qos=3"),
        ({"topic": "$share/g/a", "no_local": True}, "forbids"),
        ({"topic": "a", "qos": 0, "session": "s"}, "without a session"),
        ({"topic": "a", "receive_maximum": 0}, "65,535"),
    ],
)
async def test_options_that_cannot_be(options: dict[str, Any], why: str) -> None:
    broker = MqttBroker()

    @broker.subscriber(**options)
    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match=why):
        broker.compile()


async def test_in_memory() -> None:
    broker = MqttBroker()
    got: list[tuple[str, bool]] = []

    @broker.subscriber("rooms/{room}/lamp")
    async def lamp(body: str, room: str, message: MqttMessage) -> None:
        got.append((f"{room} {body}", message.retain))

    async with TestMqttBroker(broker):
        assert await broker.publish("on", "rooms/hall/lamp") == Receipt(heard=True)
        assert await broker.publish("on", "elsewhere") == Receipt(heard=False)
        assert got == [("hall on", False)]


async def test_a_session_outlives_the_server_and_what_has_expired_does_not(
    mqtt_server: MosquittoServer, name: str
) -> None:
    got: list[str] = []

    def application() -> MqttBroker:
        broker = MqttBroker(mqtt_server.url, client_id="app", reconnect_max=0.2)

        @broker.subscriber(name)
        async def handler(body: str) -> None:
            got.append(body)

        return broker

    first = application()
    await first.start()
    await first.stop()
    async with MqttBroker(mqtt_server.url) as sender:
        assert (await sender.publish("stays", name)).heard
        await sender.publish("passes", name, expiry=1)
    await asyncio.to_thread(mqtt_server.stop)
    await asyncio.sleep(2.2)  # Mosquitto counts in whole seconds
    await asyncio.to_thread(mqtt_server.start)
    second = application()
    await second.start()
    await second.publish("new", name)
    await eventually(lambda: got[-1:] == ["new"])
    assert got == ["stays", "new"]
    await second.stop()


async def test_what_an_earlier_process_left_is_counted_and_forgotten_when_done(
    mqtt: Any, name: str
) -> None:
    counts: list[int] = []
    gate = asyncio.Event()

    def application() -> MqttBroker:
        broker = MqttBroker(mqtt.url, client_id=f"app-{name}", graceful_timeout=0.05)

        @broker.subscriber(name)
        async def handler(body: int, message: MqttMessage) -> None:
            counts.append(message.attempt)
            await gate.wait()

        return broker

    async def noted(broker: MqttBroker) -> list[bytes]:
        return [m.payload for m in await look(broker.driver, f"{name}/dlq-attempts", "+")]

    for count in (1, 2, 3):
        broker = application()
        await broker.start()
        if count == 1:
            await broker.publish(7, name)
        await eventually(lambda count=count: counts == list(range(1, count + 1)))  # type: ignore[misc]
        # A message that nobody left behind costs no note.
        assert len(await noted(broker)) == (count > 1)
        await broker.stop()
    gate.set()
    broker = application()
    await broker.start()
    await eventually(lambda: counts == [1, 2, 3, 4])

    async def forgotten() -> bool:
        return not await noted(broker)

    await eventually(forgotten)
    await broker.stop()


async def test_foreign_subscribers_get_headers_and_properties(mqtt: Any, name: str) -> None:
    port = mqtt.url.rpartition(":")[2]
    format = "%t %p %q %r %C %D %P"
    listening = ["mosquitto_sub", "-p", port, "-V", "5", "-q", "1", "-t", name, "-C", "1"]
    async with MqttBroker(mqtt.url) as broker:
        await broker.publish(
            "hello",
            name,
            retain=True,
            headers={"tenant": "acme", "correlation_id": "c1", "content-type": "text/plain"},
        )
        ran = await asyncio.to_thread(
            subprocess.run, [*listening, "-F", format, "-W", "5"], capture_output=True, timeout=10
        )
        assert ran.stdout.decode() == f"{name} hello 1 1 text/plain c1 tenant:acme\n"
        await broker.publish(b"", name, retain=True)
