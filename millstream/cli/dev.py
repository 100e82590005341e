"""``millstream dev``: reload, links, and a broker that starts by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ..embedded import EmbeddedNats, answers
from ..errors import ConnectError, MissingExtra
from .child import Answer, Hello
from .options import RunOptions
from .output import note, styled
from .reload import watch
from .workers import Doorman

log = logging.getLogger("millstream.dev")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class DevDoorman(Doorman):
    """Starts a NATS server before the first child connects, if nobody else runs one."""

    def __init__(self, options: RunOptions) -> None:
        super().__init__(options)
        self.server: EmbeddedNats | None = None
        self._told = False

    async def welcome(self, hello: Hello) -> tuple[Answer, socket.socket | None]:
        """Start the broker where it is missing, then answer."""
        if self.server is None:
            await asyncio.to_thread(self._start_broker, hello.brokers)
        return await super().welcome(hello)

    def _start_broker(self, brokers: Sequence[str]) -> None:
        for address in brokers:
            port = missing_nats(address)
            if port is None:
                continue
            store = Path(self.options.app_dir, ".millstream", f"nats-{port}")
            try:
                _ignored_by_git(store.parent)
                self.server = EmbeddedNats(port, store=store).start()
                log.info("nats-server runs on port %d, streams are kept in %s", port, store)
            except MissingExtra as error:
                if not self._told:
                    log.warning("nothing answers at %s, and %s: %s", address, error.what, error.fix)
                self._told = True
            except (ConnectError, OSError) as error:
                log.error("%s", error)
            return

    def close(self) -> None:
        """Stop the broker that was started here."""
        super().close()
        if self.server is not None:
            self.server.stop()


def missing_nats(address: str) -> int | None:
    """The port at which a NATS server of our own would help: all of the broker's addresses are
    on this machine, need no TLS, and none answers."""
    ports: list[int] = []
    for url in address.split(","):
        parts = urlsplit(url.strip() if "://" in url else f"nats://{url.strip()}")
        if parts.scheme != "nats" or parts.hostname not in _LOOPBACK:
            return None
        port = parts.port or 4222
        if answers(parts.hostname or "127.0.0.1", port):
            return None
        ports.append(port)
    return ports[0] if ports else None


def _ignored_by_git(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / ".gitignore"
    if not marker.exists():
        marker.write_text("*\n")


def develop(
    options: RunOptions, *, directories: Sequence[str] = (), extensions: Sequence[str] = ()
) -> int:
    """Run the target for its developer; returns the exit code."""
    doorman = DevDoorman(options)

    def links(hello: Hello) -> None:
        lines = [("app", hello.title)]
        if doorman.url:
            lines.append(("http", doorman.url))
            if hello.docs:
                lines.append(("docs", doorman.url + hello.docs))
        lines += [("broker", address) for address in hello.brokers]
        lines.append(("reload", "on every save; Ctrl+C stops"))
        note("")
        for name, value in lines:
            note(f"  {styled(f'{name:<8}', '2')}{styled(value, '1')}")
        note("")

    return watch(
        options,
        directories=directories,
        extensions=extensions,
        doorman=doorman,
        on_ready=links,
    )
