"""What is special to MQTT: sessions, order of acknowledgements, retained messages, answers."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest

from millstream.errors import CapabilityError, ConnectError, NotConnected, SetupError
from millstream.letters import replay
from millstream.mqtt import MqttBroker, MqttMessage, MqttResponse, Receipt, TestMqttBroker, Will
from millstream.mqtt.connection import Connection
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


async def test_dead_letters_are_retained_and_do_not_come_back(mqtt: Any, name: str) -> None:
    got: list[str] = []
    broker = MqttBroker(mqtt.url)

    @broker.subscriber(f"{name}/#", retry=Retry(attempts=1))
    async def handler(body: str, message: MqttMessage) -> None:
        got.append(message.destination)
        raise ValueError("never")

    await broker.start()
    await broker.publish("x", f"{name}/a")
    letters = broker.driver.letters(f"{name}/all/dlq")
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
    for _ in range(3):
        await asyncio.to_thread(subprocess.run, thief, check=True, timeout=10)
        await eventually(lambda: flow.up.is_set())
    assert any("its own client_id=" in text for text in said)
    await broker.stop()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"topic": "a/b+"}, "whole levels"),
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
