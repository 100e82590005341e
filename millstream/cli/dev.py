"""``millstream dev``: reload, links, and a broker that starts by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

from ..embedded import Embedded, missing_server
from ..errors import ConnectError, MissingExtra
from .child import Hello
from .options import RunOptions
from .output import note, styled
from .sockets import Doorman

log = logging.getLogger("millstream.dev")


class DevDoorman(Doorman):
    """Starts brokers before the first child connects, if nobody else runs them."""

    def __init__(self, options: RunOptions) -> None:
        super().__init__(options)
        self.servers: dict[str, Embedded] = {}
        self._told: set[str] = set()

    async def welcome(self, hello: Hello) -> socket.socket | None:
        """Start the brokers where they are missing, then answer."""
        for address in hello.brokers:
            if address not in self.servers:
                await asyncio.to_thread(self._start_broker, address)
        return await super().welcome(hello)

    def _start_broker(self, address: str) -> None:
        missing = missing_server(address)
        if missing is None:
            return
        kind, port = missing
        store = Path(self.options.app_dir, ".millstream", f"{kind.schemes[0]}-{port}")
        try:
            _ignored_by_git(store.parent)
            self.servers[address] = kind(port, store=store).start()
            log.info("%s runs on port %d, %s are kept in %s", kind.program, port, kind.keeps, store)
        except MissingExtra as error:
            if address not in self._told:
                log.warning("nothing answers at %s, and %s: %s", address, error.what, error.fix)
            self._told.add(address)
        except (ConnectError, OSError) as error:
            log.error("%s", error)

    def up(self, hello: Hello, how: str) -> None:
        """Print the links."""
        lines = [("app", hello.title)]
        if self.url:
            lines.append(("http", self.url))
            if hello.docs:
                lines.append(("docs", self.url + hello.docs))
        lines += [("broker", address) for address in hello.brokers]
        lines.append(("reload", "on every save; Ctrl+C stops"))
        note("")
        for name, value in lines:
            note(f"  {styled(f'{name:<8}', '2')}{styled(value, '1')}")
        note("")

    def close(self) -> None:
        """Stop the brokers that were started here."""
        super().close()
        for server in self.servers.values():
            server.stop()


def _ignored_by_git(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / ".gitignore"
    if not marker.exists():
        marker.write_text("*\n")
