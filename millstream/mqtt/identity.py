"""Client identifiers: stable over restarts where a session hangs on them, and never used twice."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from pathlib import Path

from ..log import TARGET_VARIABLE, WORKER_VARIABLE
from ..message import new_id

#: Identifiers in use in this process, with the server they are used at.
_used: set[tuple[str, str]] = set()


def program() -> str:
    """What this process runs, as it will be called after a restart as well."""
    target = os.environ.get(TARGET_VARIABLE)
    if target:
        return target
    words = [Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "python"]
    if words[0] == "__main__":
        words = [Path(sys.argv[0]).parent.name]
    for word in sys.argv[1:3]:
        if word.startswith("-"):
            break
        words.append(word)
    return " ".join(words)


def host() -> str:
    """The name of this machine."""
    return socket.gethostname().partition(".")[0] or "localhost"


def passing_host() -> bool:
    """Whether this machine's name looks as if the next one of its kind had another."""
    name = host()
    return bool(
        re.fullmatch(r"[0-9a-f]{12}", name)
        or (
            re.search(r"-[a-z0-9]{8,10}-[a-z0-9]{5}$", name)
            and "KUBERNETES_SERVICE_HOST" in os.environ
        )
    )


def worker() -> str:
    """What tells this process from the others of its supervisor."""
    number = os.environ.get(WORKER_VARIABLE, "")
    return f"-w{number}" if number else ""


def session_id(client_id: str, filter: str) -> str:
    """The client identifier of the session that a topic filter has.

    It is made of letters, digits, ``-`` and ``_``: servers may refuse others, and Mosquitto's
    access rules take no ``/``, ``+`` and ``#`` in it.
    """
    owner = client_id or f"{host()} {program()}"
    mark = hashlib.sha256(f"{owner}\n{filter}".encode()).hexdigest()[:8]
    return f"{_plain(owner, 40)}-{_plain(filter, 40)}-{mark}{worker()}"


def passing_id() -> str:
    """An identifier that nobody else has, and nothing hangs on."""
    return f"ms-{new_id()}"


def _plain(text: str, limit: int) -> str:
    text = text.replace("+", "any").replace("#", "all")
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[-limit:].strip("-")


def take(server: str, name: str) -> str:
    """The identifier, or where this process uses it already the next one of its kind."""
    number, chosen = 1, name
    while (server, chosen) in _used:
        number += 1
        chosen = f"{name}-{number}"
    _used.add((server, chosen))
    return chosen


def give_back(server: str, name: str) -> None:
    """Others may use the identifier again."""
    _used.discard((server, name))
