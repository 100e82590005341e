"""MQTT: a topic without a session, and one with sessions; members of a group in both."""

from __future__ import annotations

import threading
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from millstream.errors import NoResponders, PublishError
from millstream.mqtt import MqttBroker
from millstream.mqtt.options import MqttSubscription
from tests.faults.sources.base import Setup, Source
from tests.helpers import unique
from tests.servers.mqtt import MosquittoServer

#: Messages that a worker holds, and that may come again when its acknowledgements are lost.
FETCHED = 16
#: Seconds within which the server has to answer an onlooker.
PATIENCE = 5.0


class Insisting(MqttBroker):
    """Whoever wants a message kept has to look at the receipt: a Mosquitto that was restarted
    knows its sessions, but their shared subscriptions only when the sessions are back.
    """

    async def publish(self, *args: Any, **options: Any) -> Any:
        receipt = await super().publish(*args, **options)
        if receipt is not None and not receipt.heard:
            raise PublishError("nobody has subscribed")
        return receipt


class MqttTopic(Source):
    """A topic, QoS 0: at most once."""

    name = "mqtt-topic"
    separator = "/"
    confirms = False
    deadline = False
    resends = True
    capabilities = MqttSubscription("a", qos=0).capabilities
    max_message = 1_000_000
    nobody = NoResponders

    def server(self, setup: Setup) -> MosquittoServer:
        return MosquittoServer(durable=True)

    def url(self, port: int, user: str = "") -> str:
        return f"mqtt://127.0.0.1:{port}"

    broker_class: type[MqttBroker] = MqttBroker

    def broker(self, setup: Setup) -> MqttBroker:
        return self.broker_class(
            setup.url,
            graceful_timeout=setup.grace,
            publish_timeout=setup.publish_timeout,
            reconnect_max=setup.reconnect,
            # The server waits for one and a half of it, and knows no fractions.
            keepalive=max(round(2 * setup.ping), 1),
            connect_timeout=2.0,
        )

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"shared": "workers", "qos": int(self.confirms), "receive_maximum": FETCHED}

    def answering(self, setup: Setup) -> dict[str, Any]:
        return {"shared": "answering", "qos": 0}

    def asking(self, broker: Any) -> int:
        return len(broker.driver.asked)

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        found = _look(broker, unique(), f"{self.address(setup)}/dlq/+", keep=0)
        headers = [dict(getattr(m.properties, "UserProperty", ())) for m in found]
        return [(m.payload, h) for m, h in zip(found, headers, strict=True)]


class MqttSession(MqttTopic):
    """A session, QoS 1."""

    name = "mqtt-session"
    broker_class = Insisting
    confirms = True
    capabilities = MqttSubscription("a").capabilities
    nobody = None  # type: ignore[assignment]

    def results(self, setup: Setup) -> dict[str, Any]:
        # A topic keeps nothing for those who come later: somebody subscribes before.
        _look(self.broker(setup), f"{setup.name}-out", self.address(setup, "out"))
        return {}

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        found = _look(broker, f"{setup.name}-out", self.address(setup, "out"))
        return [m.payload for m in found]

    def wipe(self, server: Any) -> None:
        (server.folder / "mosquitto.db").unlink()


def _look(broker: MqttBroker, session: str, filter: str, keep: int = 600) -> list[Any]:
    """What the server has for a session, which stays so many seconds; with a foreign client."""
    found: list[Any] = []
    subscribed, all_there = threading.Event(), threading.Event()
    mark, end = f"{session}/mark", unique().encode()

    def arrived(client: Client, data: Any, message: Any) -> None:
        if message.topic != mark:
            found.append(message)
        elif message.payload == end:
            all_there.set()

    client = Client(
        CallbackAPIVersion.VERSION2,
        session,
        protocol=MQTTProtocolVersion.MQTTv5,
        manual_ack=True,  # and none is sent: what was there is there for the next look
    )
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = arrived
    expiry: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    expiry.SessionExpiryInterval = keep
    settings = broker.driver.settings
    client.connect(settings.host, settings.port, clean_start=False, properties=expiry)
    client.loop_start()
    try:
        options = SubscribeOptions(qos=1)
        client.subscribe([(filter, options), (mark, options)])
        assert subscribed.wait(PATIENCE)
        client.publish(mark, end, qos=1)  # it comes behind all that is there
        assert all_there.wait(PATIENCE)
    finally:
        client.disconnect()
        client.loop_stop()
    return found
