"""What goes wrong while it runs: lost connections, deleted consumers and streams."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest

from millstream.ack import Settlement
from millstream.errors import ConnectError, NotConnected, PublishTimeout, SetupError
from millstream.nats import JStream, KvWatch
from millstream.nats.connection import addresses
from millstream.nats.driver import NatsDriver
from millstream.nats.options import NatsPublish, NatsSubscription
from millstream.security import without_secrets
from tests.faults.proxy import Proxy
from tests.helpers import eventually, unique
from tests.servers import NatsServer, free_port


async def asks(bench):
    """Wait until the server has the request for more messages."""

    async def waiting():
        return (await bench.driver.js.consumer_info("S", "d")).num_waiting

    await eventually(waiting)


async def test_core_and_requests_come_back_after_a_restart(own, nats_server):
    taken = await own.subscribe("a.*", "q")
    nats_server.restart()
    await eventually(lambda: own.heard("reconnected"))
    await own.publish("a.b", b"again")
    await taken.count(1)
    assert [event for event, _ in own.events].count("disconnected") == 1
    assert not own.heard("closed")


@pytest.mark.parametrize("kind", ["durable", "ephemeral", "push", "queue"])
async def test_a_stream_goes_on_after_a_restart(own, nats_server, kind):
    options = {
        "durable": {"durable": "d"},
        "ephemeral": {},
        "push": {"durable": "d", "push": True},
        "queue": {"queue": "q"},
    }[kind]
    taken = await own.subscribe("s", stream="S", **options)
    for i in range(5):
        await own.publish("s", b"%d" % i, stream="S")
    await taken.count(5)
    await own.driver.ping(1)
    nats_server.restart()
    await eventually(lambda: own.heard("reconnected"))
    for i in range(5, 10):
        await own.publish("s", b"%d" % i, stream="S")
    await eventually(lambda: {b"%d" % i for i in range(10)} <= set(taken.bodies), 10)
    assert not taken.lost


async def test_a_crash_loses_nothing(own, nats_server):
    taken = await own.subscribe("s", stream="S", durable="d")
    sent: list[bytes] = []
    for round_ in range(3):
        for i in range(20):
            body = b"%d-%d" % (round_, i)
            await own.publish("s", body, stream="S", message_id=body.decode(), timeout=10)
            sent.append(body)
        nats_server.kill()
        nats_server.start()
    await eventually(lambda: set(sent) <= set(taken.bodies), 15)
    await eventually(lambda: [event for event, _ in own.events].count("reconnected") == 3)
    assert (await own.driver.js.stream_info("S")).state.messages == len(sent)


async def test_a_deleted_consumer_is_made_again_where_it_was(own, caplog):
    taken = await own.subscribe("s", stream="S", durable="d")
    for i in range(5):
        await own.publish("s", b"%d" % i, stream="S")
    await taken.count(5)
    await asks(own)
    await own.driver.js.delete_consumer("S", "d")
    for i in range(5, 8):
        await own.publish("s", b"%d" % i, stream="S")
    await taken.count(8)
    assert taken.bodies == [b"%d" % i for i in range(8)]  # and nothing a second time
    assert "is made again, from message 6" in caplog.text


async def test_what_was_not_settled_comes_again_from_a_new_consumer(own):
    taken = await own.subscribe("s", stream="S", durable="d", settle=None)
    for i in range(3):
        await own.publish("s", b"%d" % i, stream="S")
    await taken.count(3)
    await taken.intake.settle(taken.raws[0], Settlement.ACK, None)
    await taken.intake.settle(taken.raws[1], Settlement.NACK, 60)
    await asks(own)
    await own.driver.js.delete_consumer("S", "d")
    await eventually(lambda: taken.bodies.count(b"1") == 2, 10)
    assert taken.bodies.count(b"0") == 1


async def test_a_deleted_stream_is_made_again(own):
    taken = await own.subscribe("s", stream="S", durable="d")
    for i in range(5):
        await own.publish("s", b"%d" % i, stream="S")
    await taken.count(5)
    await asks(own)
    await own.driver.js.delete_stream("S")

    async def back():
        return (await own.driver.js.streams_info())[0:1]

    await eventually(back, 10)
    await own.publish("s", b"new", stream="S")
    await taken.count(6)
    assert taken.bodies[-1] == b"new"


async def test_a_deleted_stream_that_is_not_ours_ends_the_subscription(own):
    await own.driver.js.add_stream(name="S", subjects=["s"])
    taken = await own.subscribe("s", stream=JStream("S", declare=False), durable="d")
    await asks(own)
    await own.driver.js.delete_stream("S")
    await eventually(lambda: taken.lost, 10)
    assert isinstance(taken.lost[0], SetupError) and "'S' does not exist" in str(taken.lost[0])
    await taken.intake.close()


@pytest.mark.parametrize("options", [{"durable": "d"}, {}])
async def test_a_deleted_push_consumer_is_noticed(own, options):
    taken = await own.subscribe("s", stream="S", push=True, idle_heartbeat=0.2, **options)
    await own.publish("s", b"0", stream="S")
    await taken.count(1)
    await own.driver.ping(1)
    await own.driver.js.delete_consumer("S", taken.intake.consumer.name)
    taken.intake.consumer.ack_wait = 0.3  # so that somebody looks at it soon
    await own.publish("s", b"1", stream="S")
    await taken.count(2, 15)
    assert taken.bodies == [b"0", b"1"]


async def test_a_missing_heartbeat_is_noticed(own, monkeypatch):
    for module in ("jetstream", "pull"):
        monkeypatch.setattr(f"millstream.nats.{module}.HEARTBEAT", 0.2)
    taken = await own.subscribe("s", stream="S", durable="d")
    # The server forgets the request for messages without a word, as after a lost leader.
    inbox = taken.intake.inbox
    await taken.intake._sub.unsubscribe()
    taken.intake.inbox = "_INBOX." + unique()
    await taken.intake.attach()
    assert inbox != taken.intake.inbox
    await own.publish("s", b"x", stream="S")
    await taken.count(1, 10)


async def test_a_frozen_server_is_noticed(nats_server):
    driver = NatsDriver(nats_server.url, ping_interval=0.1, reconnect_time_wait=0.2)
    await driver.connect()
    events: list[str] = []
    driver.notify = lambda event, reason: events.append(event)
    nats_server.suspend()
    await eventually(lambda: "disconnected" in events)
    assert not await driver.ping(0.2)
    nats_server.resume()
    await eventually(lambda: driver.connected)
    await driver.close()


async def test_publishing_waits_for_the_connection(own, nats_server):
    taken = await own.subscribe("a")
    nats_server.stop()
    await eventually(lambda: own.heard("disconnected"))
    waiting = [asyncio.create_task(own.publish("a", b"%d" % i, timeout=20)) for i in range(20)]
    nats_server.start()
    await asyncio.gather(*waiting)
    await taken.count(20)


async def test_publishing_gives_up_after_the_timeout(own, nats_server):
    nats_server.stop()
    await eventually(lambda: own.heard("disconnected"))
    started = time.monotonic()
    with pytest.raises(NotConnected, match=r"is not connected for 0\.3 s") as caught:
        await own.publish("a", timeout=0.3)
    assert 0.25 < time.monotonic() - started < 2
    assert nats_server.url in str(caught.value)
    with pytest.raises(NotConnected):
        await own.request("a", timeout=0.2)
    own.driver.publish_timeout = 0.2
    with pytest.raises(NotConnected):
        await own.publish("a")


async def test_no_confirmation(own, nats_server):
    await own.driver.js.add_stream(name="S", subjects=["s"])
    nats_server.suspend()
    with pytest.raises(PublishTimeout, match=r"within 0\.3 s"):
        await own.publish("s", stream="S", timeout=0.3)
    nats_server.resume()


async def test_a_server_that_takes_nothing_is_no_bottomless_buffer(own, nats_server):
    nats_server.suspend()
    body = b"x" * 500_000
    with pytest.raises(NotConnected, match="takes no data"):
        for _ in range(100):
            await own.publish("a", body, timeout=0.3)
    assert own.driver.client.pending_data_size < 10_000_000
    nats_server.resume()


async def test_acknowledgements_of_an_outage_are_sent_afterwards(own, nats_server):
    gate = asyncio.Event()
    taken = await own.subscribe("s", stream="S", durable="d", work=lambda raw: gate.wait())
    await own.publish("s", b"x", stream="S")
    await taken.count(1)
    nats_server.stop()
    await eventually(lambda: own.heard("disconnected"))
    gate.set()
    nats_server.start()

    async def acked():
        return (await own.driver.js.consumer_info("S", "d")).num_ack_pending == 0

    await eventually(lambda: own.heard("reconnected"))
    await eventually(acked)


async def test_a_watch_misses_nothing_over_a_restart(own, nats_server):
    kv = await own.driver.stores.key_value("b", storage="file")
    taken = await own.subscribe(">", kv_watch=KvWatch("b"))
    await kv.put("a", b"1")
    await taken.count(1)
    nats_server.restart()
    await eventually(lambda: own.heard("reconnected"))
    await (await own.driver.stores.key_value("b")).put("a", b"2")
    await eventually(lambda: [e.value for e in taken.raws] == [b"1", b"2"], 10)


async def test_thrown_out_by_the_server_it_comes_back(tmp_path):
    config = 'authorization { users = [{user: u, password: "one"}, {user: v, password: "v"}] }'
    with NatsServer(config=config) as server:
        url = server.url.replace("//", "//u:one@")
        driver = NatsDriver(url, reconnect_time_wait=0.2)
        await driver.connect()
        taken: list[bytes] = []

        async def sink(raw):
            taken.append(raw.data)

        await driver.subscribe(NatsSubscription("a"), sink, lambda error: None)
        # nats-py closes for good on an error that it does not know.
        await driver.client._process_err("'user authentication expired'")
        await eventually(lambda: driver.client.is_closed)
        await eventually(lambda: driver.connected)
        await driver.publish(NatsPublish(subject="a"), b"back", None)
        await eventually(lambda: taken == [b"back"])
        await driver.close()


async def test_giving_up_if_that_is_asked_for(nats_server):
    driver = NatsDriver(nats_server.url, max_reconnect_attempts=1, reconnect_time_wait=0.01)
    await driver.connect()
    events: list[tuple[str, str]] = []
    driver.notify = lambda event, reason: events.append((event, reason))
    nats_server.stop()
    await eventually(lambda: any(event == "closed" for event, _ in events))
    with pytest.raises(NotConnected):
        await driver.publish(NatsPublish(subject="a", timeout=0.1), b"", None)
    await driver.close()


async def test_a_subscription_that_is_not_permitted(tmp_path):
    config = """authorization {{ users = [{{user: u, password: p,
        permissions: {{subscribe: [{}, "_INBOX.>"], publish: ">"}}}}] }}"""
    with NatsServer(config=config.format('"Some.>"')) as server:
        driver = NatsDriver(server.url.replace("//", "//u:p@"), reconnect_time_wait=0.2)
        await driver.connect()
        lost: list[Exception] = []

        async def sink(raw):
            return None

        with pytest.raises(SetupError, match="permissions violation"):
            await driver.subscribe(NatsSubscription("Other"), sink, lost.append)
        await driver.subscribe(NatsSubscription("Some.Thing"), sink, lost.append)
        assert not lost
        server.config = config.format('"nothing"')
        server.restart()
        await eventually(lambda: lost)
        assert "permissions violation" in str(lost[0])
        await driver.close()


async def test_a_cluster_with_a_dead_server(nats_server):
    dead = f"nats://127.0.0.1:{free_port()}"
    for servers in ([dead, nats_server.url], f"{nats_server.url},{dead}"):
        driver = NatsDriver(servers, dont_randomize=True)
        await driver.connect()
        assert await driver.ping(1)
        await driver.close()


async def test_the_other_server_takes_over():
    with NatsServer() as one, NatsServer() as two:
        driver = NatsDriver([one.url, two.url], dont_randomize=True, reconnect_time_wait=0.2)
        await driver.connect()
        assert driver.client.connected_url.port == one.port
        one.stop()
        await eventually(lambda: driver.connected and driver.client.connected_url.port == two.port)
        await driver.close()


async def test_an_unreachable_server_fails_at_once_with_the_reason():
    url = f"nats://user:secret@127.0.0.1:{free_port()}"
    driver = NatsDriver(url)
    started = time.monotonic()
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1") as caught:
        await driver.connect()
    assert time.monotonic() - started < 3
    assert not caught.value.permanent
    assert "secret" not in str(caught.value) + repr(caught.value) + driver.describe()


async def test_callbacks_of_the_user(nats_server):
    calls: list[str] = []

    def callback(name):
        async def call(*args):
            calls.append(name)

        return call

    names = ["disconnected_cb", "reconnected_cb", "closed_cb", "error_cb"]
    driver = NatsDriver(
        nats_server.url, reconnect_time_wait=0.1, **{name: callback(name) for name in names}
    )
    await driver.connect()
    nats_server.restart()
    await eventually(lambda: "reconnected_cb" in calls)
    await driver.close()
    assert set(calls) == set(names)


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("localhost", ["nats://localhost"]),
        ("a:1, b:2", ["nats://a:1", "nats://b:2"]),
        (["tls://u:p@a:1"], ["tls://u:p@a:1"]),
    ],
)
def test_addresses(given, urls):
    assert addresses(given) == urls


@pytest.mark.parametrize(
    "given", ["", [], "http://x", "nats://", "nats://h:port", "nats://h:99999"]
)
def test_what_is_no_address(given):
    with pytest.raises(SetupError) as caught:
        addresses(given)
    assert caught.value.fix


def test_no_secret_in_an_address():
    assert without_secrets("nats://u:p@s@h:1/x") == "nats://h:1/x"
    with pytest.raises(SetupError) as caught:
        NatsDriver("http://user:secret@h")
    assert "secret" not in str(caught.value)


async def test_a_reconnect_that_dies_is_taken_up_again(nats_server, monkeypatch):
    proxy = await Proxy(nats_server.port).start()
    driver = NatsDriver(f"nats://127.0.0.1:{proxy.port}", reconnect_time_wait=0.1)
    await driver.connect()
    taken: list[str] = []
    driver.notify = lambda event, reason: taken.append(event)
    died: list[bool] = []

    async def dies(client):
        died.append(True)
        raise RuntimeError("the handler is closed")  # uvloop's word; nats-py does not expect it

    monkeypatch.setattr(driver.client, "_process_connect_init", partial(dies, driver.client))
    proxy.reset()
    await eventually(lambda: died and driver.connected)
    assert taken == ["disconnected", "reconnected"]
    assert await driver.ping(2)
    await driver.close()
    await proxy.stop()
