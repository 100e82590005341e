"""Apache Kafka as one process that is broker and controller (KRaft).

Its jars come from Maven Central, once, into the user's cache folder; a class archive beside them
lets it start in two seconds instead of six.
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from tests.servers.base import Server, free_port, missing

VERSION = "4.1.2"
#: What its tools read their arguments with.
_ARGUMENTS = "net.sourceforge.argparse4j:argparse4j:0.7.0"
_POM = """<project><modelVersion>4.0.0</modelVersion>
 <groupId>millstream</groupId><artifactId>kafka-for-tests</artifactId><version>1</version>
 <dependencies>
  <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
   <version>{version}</version></dependency>
  <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
   <version>1.7.36</version></dependency>
 </dependencies></project>
"""
_SETTINGS: dict[str, str] = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "num.partitions": "1",
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "2",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "2",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "500",
    "group.consumer.regex.refresh.interval.ms": "10000",
    "num.network.threads": "1",
    "num.io.threads": "2",
    "log.cleaner.enable": "false",
    "file.delete.delay.ms": "1000",
    "controller.quorum.append.linger.ms": "5",
    "controlled.shutdown.enable": "false",
    # A node that was killed may come back as soon as its last session is over.
    "broker.heartbeat.interval.ms": "250",
    "broker.session.timeout.ms": "1000",
}
_JVM = (
    "-Xms96m",
    "-Xmx384m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)


def cache_folder() -> Path:
    """Where the jars are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "millstream-tests" / f"kafka-{VERSION}"


def java_binary() -> str | None:
    """The java on PATH."""
    return shutil.which("java")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time fills the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def need_kafka() -> Path:
    """The folder with everything that a start needs, fetched and made on first use.

    Skips the test where there is no Java, or no jars and no Maven to fetch them.
    """
    java = java_binary()
    if java is None:
        missing("no java on PATH, which Kafka runs on")
    folder = cache_folder()
    if (folder / "ready").exists():
        return folder
    with _locked(folder):
        if (folder / "ready").exists():
            return folder
        if not (folder / "libs").exists():
            _fetch(folder)
        _prepare(folder)
        (folder / "ready").touch()
    return folder


def _fetch(folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        missing(f"no Kafka jars in {folder / 'libs'}, and no mvn on PATH to fetch them")
    (folder / "pom.xml").write_text(_POM.format(version=VERSION))
    shutil.rmtree(folder / "fetched", ignore_errors=True)
    command = [str(maven), "-q", "-B", "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", "-DoutputDirectory=fetched"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        missing(f"the Kafka jars cannot be fetched: {done.stdout[-500:]}")
    (folder / "fetched").rename(folder / "libs")


def need_tools() -> str:
    """The class path of Kafka's command line tools, whose jars are fetched on first use."""
    folder = need_kafka()
    tools = folder / "tools"
    if not tools.exists():
        with _locked(folder):
            if not tools.exists():
                _fetch_tools(folder)
    return f"{folder}/libs/*:{tools}/*"


def _fetch_tools(folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        missing("no mvn on PATH to fetch Kafka's tools with")
    shutil.rmtree(folder / "fetched", ignore_errors=True)
    for artifact in (f"org.apache.kafka:kafka-tools:{VERSION}", _ARGUMENTS):
        command = [str(maven), "-q", "-B", "dependency:copy", f"-Dartifact={artifact}"]
        command.append("-DoutputDirectory=fetched")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if done.returncode:
            missing(f"Kafka's tools cannot be fetched: {done.stdout[-500:]}")
    (folder / "fetched").rename(folder / "tools")


def tool(name: str, *arguments: str, given: str = "", timeout: float = 60.0) -> str:
    """Run one of Kafka's tools, named by its class below ``org.apache.kafka.tools``.

    Args:
        name: such as ``consumer.ConsoleConsumer``.
        arguments: of its command line.
        given: what it reads from its standard input.
        timeout: seconds that it may take.

    Returns:
        What it printed.
    """
    done = subprocess.run(
        [
            str(java_binary()),
            "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=error",
            "-cp",
            need_tools(),
            f"org.apache.kafka.tools.{name}",
            *arguments,
        ],
        input=given,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _prepare(folder: Path) -> None:
    """Format a store to be copied, and have a first server write the class archive."""
    with tempfile.TemporaryDirectory(prefix="ms-") as place:
        settings = Path(place) / "kafka.properties"
        ports = free_port(), free_port()
        more = _listeners(ports[0], 1, {1: ports[1]}, {})
        settings.write_text(_properties(more, Path(place) / "data"))
        tool = [str(java_binary()), "-cp", f"{folder}/libs/*", "kafka.tools.StorageTool", "format"]
        subprocess.run(
            [*tool, "-t", _new_id(), "-c", str(settings)],
            check=True,
            capture_output=True,
            timeout=60,
        )
        shutil.copy(Path(place) / "data" / "bootstrap.checkpoint", folder)
    archive = folder / "kafka.jsa"
    with KafkaServer(_jvm=(f"-XX:ArchiveClassesAtExit={archive}",), _cache=folder) as server:
        server.stop(60)


def _new_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _properties(settings: Mapping[str, str], data: Path) -> str:
    merged = {**_SETTINGS, **settings, "log.dirs": str(data)}
    return "".join(f"{key}={value}\n" for key, value in merged.items())


class Listener(NamedTuple):
    """A further way to reach a node.

    Fields:
        protocol: ``PLAINTEXT``, ``SSL``, ``SASL_PLAINTEXT`` or ``SASL_SSL``.
        port: where it listens.
        advertised: where clients are told to connect to, if something stands between.
    """

    protocol: str
    port: int
    advertised: int | None = None


def _listeners(
    port: int, node: int, voters: Mapping[int, int], more: Mapping[str, Listener]
) -> dict[str, str]:
    ways = {"PLAINTEXT": Listener("PLAINTEXT", port), **more}
    own = [f"{name}://127.0.0.1:{way.port}" for name, way in ways.items()]
    told = [f"{name}://127.0.0.1:{way.advertised or way.port}" for name, way in ways.items()]
    protocols = [f"{name}:{way.protocol}" for name, way in ways.items()]
    return {
        "node.id": str(node),
        "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{p}" for n, p in voters.items()),
        "listeners": ",".join([*own, f"CONTROLLER://127.0.0.1:{voters[node]}"]),
        "advertised.listeners": ",".join(told),
        "listener.security.protocol.map": ",".join([*protocols, "CONTROLLER:PLAINTEXT"]),
    }


class KafkaServer(Server):
    """One Kafka node.

    Args:
        settings: further server properties.
        listeners: further listeners by their names; the first one is ``PLAINTEXT``.
        proxied: the protocol of one more listener, which tells clients to connect to
            ``outside``: somebody carries their bytes from there to ``inside``.
        node: its number, where it is one of several.
        voters: the controllers' ports of all nodes, by their numbers; this node only by default.
        cluster_id: of the cluster that it belongs to.
        folder: where it stores things; a new temporary folder by default.
        port: a fixed port; a free one by default.
    """

    name = "kafka"
    patience = 40.0

    def __init__(
        self,
        *,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, Listener] | None = None,
        proxied: str = "",
        node: int = 1,
        voters: Mapping[int, int] | None = None,
        cluster_id: str = "",
        folder: Path | None = None,
        port: int | None = None,
        _jvm: tuple[str, ...] = (),
        _cache: Path | None = None,
    ) -> None:
        super().__init__(folder=folder, port=port)
        self.settings, self.listeners = dict(settings or {}), dict(listeners or {})
        if proxied:
            self.inside, self.outside = free_port(), free_port()
            self.listeners["PROXIED"] = Listener(proxied, self.inside, self.outside)
        self.node, self.voters = node, dict(voters or {})
        self.cluster_id = cluster_id or _new_id()
        self._cache = _cache or need_kafka()
        archive = self._cache / "kafka.jsa"
        self._jvm = _jvm or ((f"-XX:SharedArchiveFile={archive}",) if archive.exists() else ())

    @property
    def data(self) -> Path:
        """Where its logs are."""
        return self.folder / "data"

    def format(self) -> None:
        """Make an empty store."""
        self.data.mkdir(parents=True)
        shutil.copy(self._cache / "bootstrap.checkpoint", self.data)
        node = {"version": "1", "cluster.id": self.cluster_id}
        node["node.id"] = str(self.node)
        node["directory.id"] = _new_id()
        text = "".join(f"{key}={value}\n" for key, value in node.items())
        (self.data / "meta.properties").write_text(text)

    def command(self, port: int) -> list[str]:
        if not self.data.exists():
            self.format()
        voters = self.voters or {self.node: free_port()}
        settings = _listeners(port, self.node, voters, self.listeners)
        path = self.folder / "kafka.properties"
        path.write_text(_properties({**settings, **self.settings}, self.data))
        libs = f"{self._cache}/libs/*"
        return [str(java_binary()), *_JVM, *self._jvm, "-cp", libs, "kafka.Kafka", str(path)]

    def answers(self, port: int) -> bool:
        """It tells its cluster's id, and that it has joined it as a broker."""
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(2.0)
            # A metadata request, version 2, of no topics.
            request = struct.pack(">hhih2si", 3, 2, 1, 2, b"ms", 0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            head = connection.recv(4, socket.MSG_WAITALL)
            if len(head) < 4:
                return False
            said = connection.recv(struct.unpack(">i", head)[0], socket.MSG_WAITALL)
        brokers = struct.unpack(">i", said[4:8])[0]
        return brokers > 0 and self.cluster_id.encode() in said

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"


class KafkaCluster:
    """Several nodes that are brokers and controllers, each topic copied to all of them."""

    def __init__(self, count: int = 3, *, settings: Mapping[str, str] | None = None) -> None:
        voters = {node: free_port() for node in range(1, count + 1)}
        copies = {
            name: str(count)
            for name in _SETTINGS
            if name.endswith("replication.factor") or name == "default.replication.factor"
        }
        more = {**copies, "min.insync.replicas": str(count // 2 + 1), **(settings or {})}
        identity = _new_id()
        self.nodes = [
            KafkaServer(settings=more, node=n, voters=voters, cluster_id=identity) for n in voters
        ]

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    def start(self) -> Self:
        """Start all nodes at once: none answers before most are there."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(KafkaServer.start, self.nodes))
        return self

    def remove(self) -> None:
        """Stop all nodes and delete what they stored."""
        for node in self.nodes:
            node.remove()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *_: object) -> None:
        self.remove()
