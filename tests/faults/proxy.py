"""A TCP proxy in this process that does to connections what networks do.

Toxics are attributes, and may change at any time:

- ``latency``: seconds added to each piece that passes, in each direction;
- ``hold_up``, ``hold_down``: a black hole from the client to the server, or back. Like a
  network that loses every packet, it delays what TCP repeats until the hole is gone;
- ``refuse``: new connections are refused;
- ``half_open``: new connections are accepted and never answered;
- ``cut(n, up)``: break all connections after ``n`` more bytes in one direction;
- ``reset()``: break all connections with RST; ``drop()``: forget the peers without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self

from tests.servers import free_port

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds


class Link:
    """One client with its connection to the server."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.peer: asyncio.StreamWriter | None = None
        #: What passes from now on vanishes.
        self.silent = False

    async def run(self) -> None:
        """Carry bytes until one side ends."""
        proxy = self.proxy
        pumps: list[asyncio.Task[None]] = []
        try:
            if proxy.half_open:
                await asyncio.Event().wait()
            reader, self.peer = await asyncio.open_connection("127.0.0.1", proxy.target)
            pumps = [
                asyncio.create_task(self._pump(self.reader, self.peer, up=True)),
                asyncio.create_task(self._pump(reader, self.writer, up=False)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self.silent:
                await asyncio.Event().wait()  # nor does the end of one side reach the other
        except OSError:
            pass  # the server is away
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in self._writers():
                writer.close()
            for writer in self._writers():
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [writer for writer in (self.writer, self.peer) if writer is not None]

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        proxy, way = self.proxy, "up" if up else "down"
        while data := await reader.read(65536):
            if proxy.latency:
                await asyncio.sleep(proxy.latency)
            await proxy.open[way].wait()
            if self.silent:
                continue
            left = proxy.cuts.get(way)
            if left is not None and len(data) >= left:
                writer.write(data[:left])
                await asyncio.sleep(0.02)  # so that what came before the cut does arrive
                del proxy.cuts[way]
                proxy.reset()
                return
            if left is not None:
                proxy.cuts[way] = left - len(data)
            writer.write(data)
            await writer.drain()
        await proxy.open[way].wait()

    def abort(self) -> None:
        """End both sides with RST."""
        for writer in self._writers():
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class Proxy:
    """Listens on ``port``, its own by default, and connects to ``target``; both on loopback."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.target = target
        self.port = port or free_port()
        self.latency = 0.0
        self.half_open = False
        self.open = {"up": asyncio.Event(), "down": asyncio.Event()}
        #: Bytes that still pass in a direction before everything is cut.
        self.cuts: dict[str, int] = {}
        self.connections = 0
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self.heal()

    @property
    def live(self) -> int:
        """How many connections there are."""
        return len(self._links)

    async def start(self) -> Self:
        """Accept connections."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        return self

    async def stop(self) -> None:
        """End everything."""
        await self.refuse()
        tasks = list(self._links.values())
        self.reset()  # what a peer does not read must not keep its connection open
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports say farewell

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = Link(self, reader, writer)
        task = self._links[link] = asyncio.create_task(link.run())
        task.add_done_callback(lambda _: self._links.pop(link, None))

    def hold(self, *, up: bool = True, down: bool = True) -> None:
        """Let nothing pass in the given directions."""
        for way, held in (("up", up), ("down", down)):
            if held:
                self.open[way].clear()

    def heal(self) -> None:
        """No toxic is left; what was held passes."""
        self.latency, self.half_open = 0.0, False
        self.cuts.clear()
        for event in self.open.values():
            event.set()

    def cut(self, after: int, *, up: bool) -> None:
        """Break all connections after so many more bytes in one direction."""
        self.cuts["up" if up else "down"] = max(after, 1)

    def reset(self) -> None:
        """Break all connections with RST."""
        for link in list(self._links):
            link.abort()

    def drop(self) -> None:
        """Forget the server's side of all connections; clients are told nothing, ever."""
        for link in self._links:
            link.silent = True

    async def refuse(self) -> None:
        """Refuse new connections; those there are stay."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await asyncio.sleep(0)
