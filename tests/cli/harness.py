"""Runs the command line as users do: as processes, watched through what they print."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.helpers import eventually_sync

ROOT = Path(__file__).parents[2]
#: Every line of the plain format, whoever wrote it.
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) +[\w.]+  .+"
)
PATIENCE = 20.0


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The process's environment, without settings of the user who runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "NO_COLOR": "1"} | dict(extra or {})


class Process:
    """One running command; its whole output, errors included, is in ``output``."""

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "millstream"),
    ) -> None:
        self.arguments, self.folder = arguments, folder
        self._log = folder / f"output-{id(self)}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=folder,
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.output, re.MULTILINE))

    def expect(self, pattern: str, *, times: int = 1, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait until the output matches, ``times`` times, and return the last match."""

        def enough() -> bool:
            return self.count(pattern) >= times or self.process.poll() is not None

        with suppress(AssertionError):
            eventually_sync(enough, timeout)
        found = list(re.finditer(pattern, self.output, re.MULTILINE))
        assert len(found) >= times, (
            f"no {pattern!r} in the output of {self.arguments}:\n{self.output}"
        )
        return found[-1]

    def until(self, condition: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Wait for something that this process brings about."""
        try:
            eventually_sync(condition, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from error

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} does not end:\n{self.output}") from None

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send a signal and wait for the end."""
        self.send(number)
        return self.wait(timeout)

    def get(self, url: str) -> str:
        """The answer of an HTTP server that may still be starting."""
        answers: list[str] = []

        def ask() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=5) as response:
                    answers.append(response.read().decode())
            except urllib.error.HTTPError as error:
                answers.append(error.read().decode())
            except OSError:
                return False
            return True

        self.until(ask)
        return answers[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()  # its children notice, and stop
                self.process.wait()


def command(
    *arguments: str, folder: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end: a CompletedProcess with text."""
    return subprocess.run(
        [sys.executable, "-m", "millstream", *arguments],
        cwd=folder,
        env=environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=50,
    )


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()


def write(folder: Path, **files: str) -> None:
    """Write modules: ``main="..."`` becomes main.py."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


def listening(port: int) -> bool:
    """Whether somebody accepts connections on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
