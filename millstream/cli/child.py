"""A process of the supervisor's: what runs in it, and what the two say to each other.

They speak lines of JSON over a socket pair: options (parent), hello (child: what the target
is), an empty line with the listening socket, if one is wanted (parent), ready (child). When the
parent is gone, the pair closes and the child stops as after SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ..log import WORKER_VARIABLE
from .options import RunOptions

#: The grace a child gets beyond the one its brokers ask for, in seconds.
MARGIN = 5.0


class Hello(msgspec.Struct):
    """What the child found.

    Fields:
        title: the target, for people.
        asgi: it wants a listening socket.
        brokers: addresses of its brokers.
        grace: seconds it needs at most to stop.
        docs: the path of its API documentation, or an empty string.
    """

    title: str
    asgi: bool = False
    brokers: list[str] = []
    grace: float = 15.0
    docs: str = ""


class Channel:
    """The child's end."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._buffer = b""

    def receive(self) -> tuple[bytes, socket.socket | None]:
        """The next line, and the socket that came with it; ends the process without a parent."""
        sock: socket.socket | None = None
        while b"\n" not in self._buffer:
            data, fds, _, _ = socket.recv_fds(self._socket, 65536, 1)
            if not data:
                raise SystemExit(1)
            self._buffer += data
            if fds:
                sock = socket.socket(fileno=fds[0])
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line, sock

    def send(self, message: Any) -> None:
        """Send one line."""
        with contextlib.suppress(OSError):
            self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def hello(self, hello: Hello) -> socket.socket | None:
        """Introduce the target and wait until it may start; for HTTP, the socket to listen on."""
        self.send(hello)
        return self.receive()[1]

    def ready(self) -> None:
        """The target is up."""
        self.send("ready")

    def watch(self) -> None:
        """From now on, stop when the parent is gone."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self._socket)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(self._socket, gone)


def main() -> int:
    """The process's entry point; the argument is the file descriptor of the channel."""
    # Ctrl+C reaches the whole process group; what happens then is the parent's to decide.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    channel = Channel(int(sys.argv[1]))
    options = msgspec.json.decode(channel.receive()[0], type=RunOptions)
    from .run import execute

    return execute(options, channel)


class Child:
    """The parent's end: one process, from its start to its exit code."""

    def __init__(
        self,
        options: RunOptions,
        welcome: Callable[[Hello], Awaitable[socket.socket | None]],
    ) -> None:
        self.options = options
        self._welcome = welcome
        self._socket: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.hello: Hello | None = None
        #: Set once the target is up.
        self.ready = asyncio.Event()
        #: Set by ``welcome`` where it cannot go on; raised by :meth:`wait`.
        self.failure: Exception | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def grace(self) -> float:
        """Seconds that the process gets to stop."""
        return (self.hello.grace if self.hello is not None else 0.0) + MARGIN

    async def start(self) -> None:
        """Start the process."""
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        if self.options.worker_id is not None:
            environment[WORKER_VARIABLE] = str(self.options.worker_id)
        if self.options.dev:
            environment["MILLSTREAM_DEV"] = "1"
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"{__package__}.child", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        ours.setblocking(False)
        self._socket = ours
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(ours, msgspec.json.encode(self.options) + b"\n")
        self._reader = loop.create_task(self._listen(ours))

    async def _listen(self, sock: socket.socket) -> None:
        loop, buffer = asyncio.get_running_loop(), b""
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(sock, 65536):
                buffer += data
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    if line == b'"ready"':
                        self.ready.set()
                    else:
                        await self._greet(sock, msgspec.json.decode(line, type=Hello))

    async def _greet(self, sock: socket.socket, hello: Hello) -> None:
        self.hello = hello
        try:
            listener = await self._welcome(hello)
        except Exception as error:
            self.failure = error
            self.kill()
            return
        fds = [listener.fileno()] if listener is not None else []
        socket.send_fds(sock, [b"\n"], fds)

    async def wait(self) -> int:
        """The exit code; negative for the signal that killed it.

        Raises:
            Exception: what ``welcome`` raised.
        """
        assert self._process is not None
        code = await self._process.wait()
        self._reader.cancel()
        if self._socket is not None:
            self._socket.close()
        if self.failure is not None:
            raise self.failure
        return code

    def terminate(self) -> None:
        """Ask it to stop; the second time, to stop at once."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


async def either(*waits: Awaitable[Any]) -> None:
    """Wait until one of these is done; tasks among them go on, everything else is cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


def ended(code: int) -> str:
    """For people: how a process ended."""
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


if __name__ == "__main__":
    sys.exit(main())
