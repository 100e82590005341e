"""How a process without HTTP is asked for its health: a Unix socket that answers with JSON.

Whoever connects gets one document and the end of the stream. The sockets lie in a directory
of the user's own, one for each process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from ..app import Millstream
from .options import RunOptions
from .sockets import BindError, listen_unix

log = logging.getLogger("millstream.run")

#: Bytes that the path of a Unix socket can have on every system.
_LONGEST = 100


def directory() -> Path:
    """Where sockets are by default: under ``XDG_RUNTIME_DIR`` or else the temporary directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "millstream"
    return Path(tempfile.gettempdir()) / f"millstream-{os.getuid()}"


def _path(options: RunOptions) -> str:
    """Where this process has its socket.

    Raises:
        BindError: the default directory is not ours alone.
    """
    if options.health_socket is not None:
        number = options.worker_id
        return options.health_socket + ("" if number is None else f".{number}")
    place = directory()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BindError(f"{place}: belongs to others, or is open to them")
    _sweep(place)
    end = f"-{os.getpid()}.sock"
    name = re.sub(r"[^\w.-]+", "-", options.target)
    room = max(_LONGEST - len(f"{place}/{end}"), 0)
    return f"{place}/{name[:room]}{end}"


def _sweep(place: Path) -> None:
    """Remove what killed processes left behind."""
    for path in place.glob("*.sock"):
        try:
            os.kill(int(path.stem.rpartition("-")[2]), 0)
        except (ValueError, OverflowError, PermissionError):
            continue
        except ProcessLookupError:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                # Perhaps it runs where its number means nothing to us: in a container.
                if probe.connect_ex(str(path)):
                    path.unlink()


@contextlib.asynccontextmanager
async def answering(app: Millstream, options: RunOptions) -> AsyncIterator[None]:
    """Answer while the application runs.

    Raises:
        BindError: the path that was asked for cannot be used.
    """
    if options.no_health_socket or not hasattr(socket, "AF_UNIX"):
        yield
        return
    try:
        path = _path(options)
        sock = listen_unix(path, 0o600, "--health-socket")
    except (BindError, OSError) as error:
        if options.health_socket is not None:
            raise
        log.warning("`millstream health` will not see this process: %s", error)
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            who = {"target": options.target, "pid": os.getpid(), "worker": options.worker_id}
            writer.write(msgspec.json.encode(who | await app.full_health()))
            await writer.drain()

    server = await asyncio.start_unix_server(answer, sock=sock)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            os.unlink(path)
