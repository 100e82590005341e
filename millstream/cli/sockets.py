"""Listening sockets: of HTTP targets, and Unix sockets."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat

from ..errors import MillstreamError
from .child import Hello
from .options import RunOptions

log = logging.getLogger("millstream.run")


class BindError(MillstreamError):
    """The address cannot be listened on."""

    code = "MS502"


def listen(options: RunOptions) -> socket.socket:
    """A socket that listens on a TCP port or, with ``--uds``, at the path of a Unix socket.

    Raises:
        BindError: the address is in use, not allowed, or not of this machine.
    """
    if options.uds:
        return listen_unix(options.uds, 0o666, "--uds")  # as uvicorn: others' proxies reach it
    host = options.host or "127.0.0.1"
    port = 8000 if options.port is None else options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise BindError(f"--host {host}: no such address ({error})") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        reasons = {
            errno.EADDRINUSE: "is in use; choose another with --port",
            errno.EACCES: "is not allowed for this user; choose a port above 1023 with --port",
            errno.EADDRNOTAVAIL: "is no address of this machine; choose another with --host",
        }
        reason = reasons.get(error.errno or 0, f"cannot be used: {error.strerror}")
        raise BindError(f"{host}:{port} {reason}") from None
    return sock


def listen_unix(path: str, mode: int, option: str) -> socket.socket:
    """A socket that listens at a path; ``option`` is what the user calls it.

    Raises:
        BindError: somebody listens there, or it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise BindError(f"{option} {path}: exists and is no socket")
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
                raise BindError(f"{option} {path}: is in use")
            os.unlink(path)  # left behind by a process that was killed
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise BindError(f"{option} {path}: {error.strerror or error}") from None
    except BindError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Where people reach the socket; an address that means "all" is shown as loopback."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{port}"


class Doorman:
    """Holds the listening socket that children share, bound when the first one asks for it."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.socket: socket.socket | None = None
        self.url = ""

    async def welcome(self, hello: Hello) -> socket.socket | None:
        """The socket for a child that wants one.

        Raises:
            BindError: the address cannot be listened on.
        """
        if not hello.asgi:
            return None
        if self.socket is None:
            self.socket = listen(self.options)
            self.url = url_of(self.socket)
        return self.socket

    def up(self, hello: Hello, how: str) -> None:
        """The target is up for the first time."""
        log.info("%s%s, %s", hello.title, f" on {self.url}" if self.url else "", how)

    def close(self) -> None:
        """Give the address free."""
        if self.socket is not None:
            self.socket.close()
            if self.options.uds:
                with contextlib.suppress(OSError):
                    os.unlink(self.options.uds)
