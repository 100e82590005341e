"""The brokers of the system that start by themselves: Mosquitto and RabbitMQ."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from millstream import embedded
from millstream.embedded import (
    Embedded,
    EmbeddedMosquitto,
    EmbeddedRabbit,
    answers,
    missing_server,
)
from millstream.errors import ConnectError, MissingExtra
from millstream.mqtt import MqttBroker
from millstream.rabbit import QueueType, RabbitBroker, RabbitQueue
from tests.cli.conftest import Run, run  # noqa: F401
from tests.cli.harness import alive, command, listening, write
from tests.helpers import eventually
from tests.servers import free_port, missing

PLAIN = """
from millstream import Logger, Millstream
from millstream.mqtt import MqttBroker

broker = MqttBroker("mqtt://127.0.0.1:{port}")


@broker.subscriber("orders")
async def order(body: dict, logger: Logger) -> None:
    logger.info("order %s", body)


app = Millstream(broker)
"""


def need(kind: type[Embedded]) -> None:
    if kind.find() is None:
        missing(f"no {kind.program}")


def test_dev_starts_mosquitto_and_stops_it(run: Run, tmp_path: Path) -> None:  # noqa: F811
    need(EmbeddedMosquitto)
    port = free_port()
    write(tmp_path, main=PLAIN.format(port=port))
    process = run("dev", "main:app")
    process.expect(rf"mosquitto runs on port {port}, sessions are kept in \.millstream/mqtt-{port}")
    process.expect("reload  on every save")
    command("publish", "main:app", '{"id": 1}', "--topic", "orders", folder=tmp_path)
    process.expect(r"order \{'id': 1\}")
    assert process.stop(signal.SIGINT) == 0
    assert not listening(port)


async def test_mosquitto_keeps_all_that_waits_for_a_session(tmp_path: Path) -> None:
    """Also beyond the thousand messages of its usual limit, and over a restart."""
    need(EmbeddedMosquitto)
    got: list[int] = []

    def subscribed(url: str) -> MqttBroker:
        broker = MqttBroker(url, client_id="kept", logger=None)

        @broker.subscriber("numbers")
        async def number(body: int) -> None:
            got.append(body)

        return broker

    server = EmbeddedMosquitto(0, store=tmp_path / "store")
    with server:
        assert server.pid and alive(server.pid) and server.url.startswith("mqtt://127.0.0.1:")
        first = subscribed(server.url)
        await first.start()
        await first.stop()
        async with MqttBroker(server.url) as sender:
            await sender.publish_batch(*range(3000), topic="numbers")
    assert not answers("127.0.0.1", server.port)
    with server:
        second = subscribed(server.url)
        await second.start()
        await eventually(lambda: len(got) >= 3000, 20)
        await second.stop()
    assert got == list(range(3000))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_rabbitmq_keeps_its_queues_and_leaves_no_process(tmp_path: Path) -> None:
    need(EmbeddedRabbit)
    got: list[Any] = []
    queue = RabbitQueue("orders", QueueType.QUORUM)
    server = EmbeddedRabbit(0, store=tmp_path / "store")

    async def handled() -> None:
        broker = RabbitBroker(server.url, logger=None)

        @broker.subscriber(queue)
        async def order(body: Any) -> None:
            got.append(body)

        await broker.start()
        await eventually(lambda: got, 20)
        await broker.stop()

    with server:
        pid = server.pid
        assert pid and alive(pid)
        async with RabbitBroker(server.url) as sender:
            await sender.driver.declare([RabbitBroker().publisher(queue).spec])
            await sender.publish({"id": 1}, queue)
    assert not alive(pid) and not answers("127.0.0.1", server.port)
    mine = await asyncio.create_subprocess_exec(
        "pgrep", "-f", str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert (await mine.communicate())[0] == b""  # neither the node nor its helpers
    with server:
        await handled()
    assert got == [{"id": 1}]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    need(EmbeddedMosquitto)
    store = tmp_path / "store"
    store.mkdir()
    (store / "mosquitto.db").write_bytes(b"nonsense" * 100)
    with pytest.raises(ConnectError, match=r"mosquitto at mqtt://\S+ ended at once: Error"):
        EmbeddedMosquitto(0, store=store).start()


def test_a_broker_that_is_not_here_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded.shutil, "which", lambda *a, **k: None)
    for kind in (EmbeddedMosquitto, EmbeddedRabbit):
        with pytest.raises(MissingExtra, match=rf"install the package {kind.program}"):
            kind(0, store=tmp_path).start()


def test_who_would_help() -> None:
    port = free_port()
    assert missing_server(f"mqtt://localhost:{port}") == (EmbeddedMosquitto, port)
    assert missing_server(f"amqp://guest@127.0.0.1:{port}/") == (EmbeddedRabbit, port)
    assert missing_server(f"mqtts://localhost:{port}") is None
