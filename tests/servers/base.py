"""A server process: started on loopback, on a free port, stopped by its own pid."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

#: Below what systems hand out to outgoing connections. A client that reconnects to a port of
#: that range while the server is down can end up connected to itself and hold the port.
PORTS = range(12_000, 32_000)


def free_port() -> int:
    """A loopback port nobody listens on; only its later owner can know that it still is free."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def missing(what: str) -> None:
    """Skip the test because ``what`` is not there; in CI, where it must be, fail."""
    import pytest  # the benchmarks, which use these servers as well, do without

    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{what} (and CI must not skip this)", pytrace=False)
    pytest.skip(what)


class ServerFailed(RuntimeError):
    """The server did not come up; the text holds the end of its log."""


class Server(ABC):
    """One server process.

    Its folder, and so what it stores, lives from the first ``start`` to ``remove``; its port
    stays the same for all of that time, so that clients find a restarted server again.
    """

    name: str
    #: Seconds from start to the first answer that are still normal.
    patience = 20.0

    def __init__(self, *, folder: Path | None = None, port: int | None = None) -> None:
        self.folder = folder if folder is not None else Path(tempfile.mkdtemp(prefix="ms-"))
        self._given_port = port
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    # What a kind of server provides

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """The command line that serves on ``port``."""

    @abstractmethod
    def answers(self, port: int) -> bool:
        """Whether this very process answers on ``port``; OSError counts as no."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect to."""

    # Common

    @property
    def port(self) -> int:
        assert self._port is not None, "the server was never started"
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything the server said so far."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> Self:
        """Start and return once our own process answers; a port lost to others is replaced."""
        assert not self.running, "the server runs already"
        chosen = self._port is not None
        for _ in range(20):
            port = self._port if self._port is not None else free_port()
            if self._attempt(port):
                self._port = port
                return self
            if chosen:
                # The same port is wanted again: whoever holds it may let go.
                time.sleep(0.1)
        raise ServerFailed(f"{self.name} does not start:\n{self.log[-2000:]}")

    def _attempt(self, port: int) -> bool:
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if process.poll() is not None:
                return False
            try:
                if self.answers(port):
                    self._process = process
                    return True
            except OSError:
                pass
            time.sleep(0.005)
        process.kill()
        process.wait()
        raise ServerFailed(f"{self.name} does not answer:\n{self.log[-2000:]}")

    def stop(self, timeout: float = 10.0) -> None:
        """End it in its own orderly way; what it stores is kept."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End it as a crash would; what it stores is kept."""
        self._end(signal.SIGKILL, 10.0)

    def suspend(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        state = Path(f"/proc/{self.pid}/stat")
        while state.exists() and ") T" not in state.read_text():
            time.sleep(0.001)  # the kernel stops its threads one by one

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> Self:
        """Stop and start on the same port with the same store."""
        self.stop()
        return self.start()

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, how: signal.Signals, timeout: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()
