"""RabbitMQ servers, as Debian's package brings them: no service, a folder of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.servers.base import Server, free_port, missing

#: The real start script; the one on PATH changes the user and the folders.
SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"
#: Bytes of the largest message, so that a test can pass it.
MAX_MESSAGE = 1_000_000


def rabbit_script() -> str | None:
    """The start script, where RabbitMQ is installed."""
    return SCRIPT if os.path.exists(SCRIPT) and shutil.which("epmd") else None


class RabbitServer(Server):
    """A RabbitMQ node with its own Erlang port mapper, both on loopback only.

    Args:
        config: lines of ``rabbitmq.conf`` (TLS listeners, limits …).
        plugins: names of plugins to enable.
        folder: where it stores things; a new temporary folder by default.
        port: a fixed port; a free one by default.
    """

    name = "rabbitmq-server"
    patience = 90.0

    def __init__(
        self,
        *,
        config: str = "",
        plugins: tuple[str, ...] = (),
        folder: Path | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(folder=folder, port=port)
        self.config, self.plugins = config, plugins
        self.node = f"ms{secrets.token_hex(6)}@localhost"
        self._mapper_port, self._node_port = free_port(), free_port()
        self._mapper: subprocess.Popen[bytes] | None = None

    def environment(self, port: int) -> dict[str, str]:
        """What tells the scripts of RabbitMQ which node is meant."""
        folder = self.folder
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("RABBITMQ_")},
            "HOME": str(folder),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "env.conf"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def command(self, port: int) -> list[str]:
        if rabbit_script() is None:
            missing("no rabbitmq-server: apt-get install rabbitmq-server")
        self._map()
        (self.folder / "pid").unlink(missing_ok=True)
        (self.folder / "plugins").write_text(f"[{','.join(self.plugins)}].\n")
        (self.folder / "rabbitmq.conf").write_text(
            f"max_message_size = {MAX_MESSAGE}\nloopback_users = none\n{self.config}\n"
        )
        settings = [f"{k}={v}" for k, v in self.environment(port).items()]
        return ["/usr/bin/env", "-i", *settings, SCRIPT]

    def _map(self) -> None:
        """Start a port mapper that belongs to this node, so that it can be stopped with it."""
        if self._mapper is None or self._mapper.poll() is not None:
            self._mapper = subprocess.Popen(
                ["epmd", "-port", str(self._mapper_port), "-address", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def answers(self, port: int) -> bool:
        # Its first words carry the cluster's name, which begins with the node's.
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(b"AMQP\0\0\x09\x01")
            return self.node.partition("@")[0].encode() in connection.recv(4096)

    @property
    def pid(self) -> int:
        """The node's; the process that was started is a script around it."""
        return int((self.folder / "pid").read_text())

    def control(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run ``rabbitmqctl`` on this node and return what it says."""
        done = subprocess.run(
            ["/usr/lib/rabbitmq/bin/rabbitmqctl", "-q", *arguments],
            env=self.environment(self.port),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self) -> None:
        """End it as a crash would.

        The names of new quorum queues get to the disk only after three seconds; a crash before
        that leaves a queue that never has a leader again (seen with 3.10). So they go there first.
        """
        if self.running:
            self.control("eval", "[dets:sync(T) || T <- dets:all()].")
        super().kill()

    def remove(self) -> None:
        self._end(signal.SIGKILL, 10.0)
        super().remove()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()

    def _end(self, how: signal.Signals, timeout: float) -> None:
        if self._process is None:
            return
        # The script ends with its node, and a node that is killed leaves nothing behind.
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = self.pid
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, how)
            end = time.monotonic() + max(timeout, 30.0)
            while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
                time.sleep(0.02)
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        super()._end(signal.SIGKILL, timeout)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"
