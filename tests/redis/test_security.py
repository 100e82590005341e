"""Who gets in, and by which way: users, TLS, sockets, Sentinel, clusters."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream.errors import ConnectError, PublishError, SetupError
from millstream.redis import (
    ListSub,
    RedisBroker,
    RedisClusterBroker,
    RedisSentinelBroker,
    StreamSub,
)
from millstream.security import BaseSecurity, SASLPlaintext, SASLScram256
from tests.helpers import eventually, unique
from tests.servers import free_port, missing
from tests.servers.redis import RedisServer


async def works(broker: Any, name: str = "") -> None:
    """Every kind of source, a publication and a request."""
    name, got = name or unique(), list[str]()

    @broker.subscriber(f"{name}:{{x}}")
    async def channel(body: str) -> str:
        got.append("channel")
        return body

    @broker.subscriber(stream=StreamSub(f"{name}-s", group="g"))
    async def stream(body: str) -> None:
        got.append("stream")

    @broker.subscriber(list=ListSub(f"{name}-l"))
    async def list_(body: str) -> None:
        got.append("list")

    await broker.start()
    try:
        await broker.publish("a", stream=f"{name}-s")
        await broker.publish("a", list=f"{name}-l")
        assert await broker.request("a", f"{name}:1", response_model=str) == "a"
        await eventually(lambda: sorted(got) == ["channel", "list", "stream"])
    finally:
        await broker.stop()


async def keeps_out(broker: Any) -> str:
    """The error, which is permanent and tells no secret."""
    with pytest.raises(ConnectError) as caught:
        await broker.connect()
    assert caught.value.permanent
    text = str(caught.value)
    assert "s3cret" not in text and "wrong" not in text
    return text


async def test_a_password() -> None:
    with RedisServer(args=["--requirepass", "s3cret"], user=("default", "s3cret")) as server:
        await works(RedisBroker(server.url, password="s3cret"))
        await works(RedisBroker(server.url.replace("//", "//:s3cret@")))
        assert "credentials" in await keeps_out(RedisBroker(server.url, password="wrong"))
        assert "credentials" in await keeps_out(RedisBroker(server.url))


#: What a user needs for everything on keys and channels that begin with ``app``.
RIGHTS = (
    "~app* ~{app* &* -@all +@pubsub +@stream +@list +@sortedset +@hash +@connection "
    "+@scripting +type +expire +time +exists +client|unblock"
)


async def test_a_user_with_the_rights_of_the_documentation() -> None:
    with RedisServer() as server:
        async with Redis.from_url(server.url) as admin:
            await admin.execute_command(
                *("ACL", "SETUSER", "worker", "on", ">s3cret", *RIGHTS.split())
            )
        await works(RedisBroker(server.url, security=SASLPlaintext("worker", "s3cret")), "app")
        await works(RedisBroker(server.url, username="worker", password="s3cret"), "app2")
        broker = RedisBroker(server.url, username="worker", password="s3cret")

        @broker.subscriber(stream=StreamSub("other", group="g"))
        async def handler(body: str) -> None: ...

        with pytest.raises(SetupError, match=r"refuses.*permissions"):
            await broker.start()


def test_what_redis_does_not_know_is_said() -> None:
    with pytest.raises(SetupError, match="SASLScram256"):
        RedisBroker(security=SASLScram256("u", "p"))
    with pytest.raises(SetupError, match=r"did you mean 'password'"):
        RedisBroker(pasword="x")  # type: ignore[call-arg]
    with pytest.raises(SetupError, match="redis://"):
        RedisBroker("http://localhost")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server's certificate of it."""
    if shutil.which("openssl") is None:
        missing("no openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test")
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-keyout", "other.key", "-out", "other.pem")
    ask = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost")
    openssl(*ask, "-keyout", "key.pem", "-out", "ask.pem")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    sign = ("x509", "-req", "-in", "ask.pem", "-CA", "ca.pem", "-CAkey", "ca.key")
    openssl(*sign, "-CAcreateserial", "-days", "2", "-extfile", "san", "-out", "cert.pem")
    return folder


def tls_settings(certificates: Path) -> list[str]:
    """What a server needs to speak TLS."""
    files = {"cert": "cert.pem", "key": "key.pem", "ca-cert": "ca.pem"}
    args = [w for n, f in files.items() for w in (f"--tls-{n}-file", str(certificates / f))]
    return [*args, "--tls-auth-clients", "no"]


def trusting(certificates: Path) -> BaseSecurity:
    """TLS by a context of one's own."""
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    return BaseSecurity(ssl_context=context)


async def test_tls(certificates: Path) -> None:
    ca = str(certificates / "ca.pem")
    with RedisServer(args=tls_settings(certificates), tls=True) as server:
        await works(RedisBroker(server.url, ssl_ca_certs=ca))
        plain = server.url.replace("rediss", "redis")
        await works(RedisBroker(plain, security=trusting(certificates)))
        await works(RedisBroker(plain, ssl=True, ssl_ca_certs=ca))
        wrong = RedisBroker(server.url, ssl_ca_certs=str(certificates / "other.pem"))
        assert "not trusted" in await keeps_out(wrong)


async def test_tls_of_a_cluster(certificates: Path) -> None:
    settings = [*tls_settings(certificates), *_node(), "--tls-cluster", "yes"]
    ca = str(certificates / "ca.pem")
    with RedisServer(args=settings, tls=True) as server:
        async with Redis.from_url(server.url, ssl_ca_certs=ca) as admin:
            await admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

            async def ready() -> bool:
                return b"cluster_state:ok" in await admin.execute_command("CLUSTER", "INFO")

            await eventually(ready)
        plain = server.url.replace("rediss", "redis")
        await works(RedisClusterBroker(server.url, ssl_ca_certs=ca))
        await works(RedisClusterBroker(plain, ssl=True, ssl_ca_certs=ca))
        await works(RedisClusterBroker(plain, security=trusting(certificates)))
        strict = RedisClusterBroker(plain, security=SASLPlaintext("u", "s3cret", use_ssl=True))
        assert "not trusted" in await keeps_out(strict)


async def test_tls_of_what_a_sentinel_names(certificates: Path) -> None:
    settings = tls_settings(certificates)
    pairs = zip(settings[::2], settings[1::2], strict=True)
    lines = ["tls-replication yes", *(f"{name[2:]} {value}" for name, value in pairs)]
    with RedisServer(args=settings, tls=True) as master, Sentinel(master, lines) as sentinel:
        where = [("127.0.0.1", sentinel.port)]
        options: Any = {"sentinel_master_name": "main"}
        ca = str(certificates / "ca.pem")
        await works(RedisSentinelBroker(where, ssl=True, ssl_ca_certs=ca, **options))
        await works(RedisSentinelBroker(where, security=trusting(certificates), **options))


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(args=["--unixsocket", str(path), "--unixsocketperm", "700"]):
        await works(RedisBroker(f"unix://{path}"))
        await works(RedisBroker(unix_socket_path=str(path)))


async def test_a_database_and_host_and_port_by_themselves() -> None:
    with RedisServer() as server:
        broker = RedisBroker(host="127.0.0.1", port=server.port, db=3)
        await broker.connect()
        await broker.publish(1, list="l")
        async with Redis.from_url(f"{server.url}/3") as client:
            assert await client.llen("l") == 1
        await broker.stop()
        assert "DB index" in await keeps_out(RedisBroker(f"{server.url}/99"))


# Sentinel


class Sentinel(RedisServer):
    """A sentinel that watches one master."""

    name = "redis-sentinel"
    question = b"INFO server"

    def __init__(self, master: RedisServer, settings: Sequence[str] = ()) -> None:
        super().__init__()
        self.master, self.settings = master, settings

    def command(self, port: int) -> list[str]:
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor main 127.0.0.1 {self.master.port} 1\n"
            "sentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 2000\n" + "\n".join(self.settings)
        )
        return [self.binary(), str(config), "--sentinel"]


@pytest.fixture
def watched() -> Iterator[tuple[RedisServer, RedisServer, Sentinel]]:
    """A master, its replica and a sentinel."""
    at_once = ["--repl-diskless-sync-delay", "0"]
    with RedisServer(args=at_once) as master:
        follow = ["--replicaof", f"127.0.0.1 {master.port}", *at_once]
        with RedisServer(args=follow) as replica, Sentinel(master) as sentinel:
            yield master, replica, sentinel


async def test_sentinel_and_a_failover(
    watched: tuple[RedisServer, RedisServer, Sentinel], name: str
) -> None:
    master, replica, sentinel = watched
    where = [("127.0.0.1", sentinel.port)]
    await works(RedisSentinelBroker(where, sentinel_master_name="main"))
    broker = RedisSentinelBroker(where, sentinel_master_name="main", reconnect_max=0.3)
    got: list[int] = []

    @broker.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    await broker.start()
    await broker.publish(1, stream=name)
    await eventually(lambda: got == [1])

    async def replicated() -> bool:
        async with Redis.from_url(replica.url) as client:
            return bool(await client.exists(name))

    async with Redis.from_url(f"redis://127.0.0.1:{sentinel.port}") as client:

        async def knows_replica() -> bool:
            found = await client.execute_command("SENTINEL", "REPLICAS", "main")
            return bool(found)

        await eventually(replicated)
        await eventually(knows_replica, 15)
    await asyncio.to_thread(master.kill)
    assert await broker.publish(2, stream=name, timeout=20)
    await eventually(lambda: got == [1, 2], 10)
    await broker.stop()


async def test_a_sentinel_that_knows_no_such_master(
    watched: tuple[RedisServer, RedisServer, Sentinel],
) -> None:
    broker = RedisSentinelBroker(
        [("127.0.0.1", watched[2].port)], sentinel_master_name="nobody", startup_timeout=0.2
    )
    with pytest.raises(ConnectError, match="nobody"):
        await broker.connect()


# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    """Three nodes that share the slots."""
    if shutil.which("redis-cli") is None:
        missing("no redis-cli: Debian's package redis-tools brings it")
    nodes = [RedisServer(port=free_port(), args=_node()) for _ in range(3)]
    try:
        for node in nodes:
            node.start()
        places = [f"127.0.0.1:{node.port}" for node in nodes]
        command = ["redis-cli", "--cluster", "create", *places, "--cluster-yes"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert "All 16384 slots covered" in made.stdout, made.stdout + made.stderr
        yield nodes
    finally:
        for node in nodes:
            node.remove()


def _node() -> list[str]:
    return [*("--cluster-enabled", "yes", "--cluster-port", str(free_port()))]


@pytest.fixture
async def clustered(cluster: list[RedisServer]) -> AsyncIterator[RedisClusterBroker]:
    broker = RedisClusterBroker(cluster[0].url)
    yield broker
    await broker.stop()


async def test_a_cluster(cluster: list[RedisServer]) -> None:
    for _ in range(4):  # names that lie on different nodes
        await works(RedisClusterBroker(cluster[0].url))
    nodes = [("127.0.0.1", node.port) for node in cluster]
    await works(RedisClusterBroker(cluster[0].url, startup_nodes=nodes))
    await works(RedisClusterBroker(startup_nodes=nodes, protocol=3))
    await works(RedisClusterBroker(host="127.0.0.1", port=cluster[1].port))


async def test_what_is_no_cluster_and_what_is_one(
    cluster: list[RedisServer], redis: Any, name: str
) -> None:
    for url, text in ((redis.url, "not enabled"), ("redis://127.0.0.1:1", "Connect call failed")):
        with pytest.raises(ConnectError, match=text):
            await RedisClusterBroker(url, startup_timeout=0.1).connect()
    async with RedisBroker(cluster[0].url) as broker:
        with pytest.raises(PublishError, match="RedisClusterBroker"):
            for i in range(100):
                await broker.publish(1, list=f"{name}-{i}")


async def test_publications_find_their_nodes(
    clustered: RedisClusterBroker, cluster: list[RedisServer]
) -> None:
    name = unique()
    await clustered.connect()
    await asyncio.gather(*(clustered.publish(i, stream=f"{name}-{i % 7}") for i in range(70)))
    lengths = [await clustered.client.xlen(f"{name}-{i}") for i in range(7)]
    assert lengths == [10] * 7


async def test_a_slot_that_moves_to_another_node(
    clustered: RedisClusterBroker, cluster: list[RedisServer]
) -> None:
    name, got = unique(), list[int]()

    @clustered.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    @clustered.subscriber(list=f"{{{name}}}-l")
    async def list_(body: int) -> None:
        got.append(body)

    await clustered.start()
    await clustered.publish(1, stream=name)
    await eventually(lambda: got == [1])
    client: Any = clustered.client
    slot, owner = client.keyslot(name), client.get_node_from_key(name)
    target = next(node for node in cluster if node.port != owner.port)
    await asyncio.to_thread(_move, slot, owner.port, target.port, cluster)
    await clustered.publish(2, stream=name)
    await clustered.publish(3, list=f"{{{name}}}-l")
    await eventually(lambda: sorted(got) == [1, 2, 3], 15)


async def test_a_slot_that_is_on_its_way(
    clustered: RedisClusterBroker, cluster: list[RedisServer]
) -> None:
    """What its old node has no more is asked of the new one, and read alike."""
    name, got = unique(), list[int]()

    @clustered.subscriber(stream=StreamSub(name, group="g"))
    async def handler(body: int) -> None:
        got.append(body)

    await clustered.connect()
    client: Any = clustered.client
    slot, owner = client.keyslot(name), client.get_node_from_key(name)
    target = next(node for node in cluster if node.port != owner.port)
    ids = await asyncio.to_thread(_begin, slot, owner.port, target.port)
    id = await clustered.publish(1, stream=name)
    async with Redis.from_url(target.url) as new:
        assert await new.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
    found = [letter async for letter in clustered.driver.letters(f"stream://{name}").read()]
    assert [(letter.id, letter.message.body) for letter in found] == [(id, b"1")]
    for node in cluster:
        await asyncio.to_thread(_cli, node.port, *("CLUSTER", "SETSLOT", str(slot), "NODE", ids[1]))
    await clustered.start()
    await eventually(lambda: got == [1], 15)


def _begin(slot: int, source: int, target: int) -> tuple[str, str]:
    """Begin to move a slot; the ids of both nodes."""
    ids = _cli(source, "CLUSTER", "MYID"), _cli(target, "CLUSTER", "MYID")
    _cli(target, "CLUSTER", "SETSLOT", str(slot), "IMPORTING", ids[0])
    _cli(source, "CLUSTER", "SETSLOT", str(slot), "MIGRATING", ids[1])
    return ids


def _move(slot: int, source: int, target: int, nodes: list[RedisServer]) -> None:
    ids = _begin(slot, source, target)
    keys = _cli(source, "CLUSTER", "GETKEYSINSLOT", str(slot), "100").split()
    if keys:
        _cli(source, "MIGRATE", "127.0.0.1", str(target), "", "0", "5000", "KEYS", *keys)
    for node in nodes:
        _cli(node.port, "CLUSTER", "SETSLOT", str(slot), "NODE", ids[1])


def _cli(port: int, *args: str) -> str:
    command = ["redis-cli", "-p", str(port), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
