"""The proxy does to an echo server's connections what it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = await Proxy(server.sockets[0].getsockname()[1]).start()
    yield proxy
    while CLIENTS:
        CLIENTS.pop().close()
    await proxy.stop()
    await asyncio.sleep(0)
    server.close()


CLIENTS: list[asyncio.StreamWriter] = []


async def client(proxy: Proxy) -> Streams:
    streams = await asyncio.open_connection("127.0.0.1", proxy.port)
    CLIENTS.append(streams[1])
    return streams


async def ask(streams: Streams, data: bytes, timeout: float = 0.5) -> bytes:
    reader, writer = streams
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), timeout)


async def test_it_carries_bytes_and_ends(proxy: Proxy) -> None:
    streams = await client(proxy)
    big = bytes(range(256)) * 4096
    assert await ask(streams, big, 5) == big
    assert proxy.live == proxy.connections == 1
    streams[1].close()
    async with asyncio.timeout(2):
        while proxy.live:
            await asyncio.sleep(0.01)


async def test_latency(proxy: Proxy) -> None:
    streams = await client(proxy)
    proxy.latency = 0.1
    begin = time.monotonic()
    await ask(streams, b"x", 2)
    assert time.monotonic() - begin >= 0.2


async def test_reset(proxy: Proxy) -> None:
    streams = await client(proxy)
    await ask(streams, b"x")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(streams[0].read(1), 2)
    assert await ask(await client(proxy), b"y") == b"y"


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_black_hole_delays_everything(proxy: Proxy, way: str) -> None:
    streams = await client(proxy)
    await ask(streams, b"x")
    proxy.hold(up=way == "up", down=way == "down")
    with pytest.raises(TimeoutError):
        await ask(streams, b"held", 0.2)
    proxy.heal()
    assert await asyncio.wait_for(streams[0].readexactly(4), 2) == b"held"


async def test_half_open_accepts_and_never_answers(proxy: Proxy) -> None:
    proxy.half_open = True
    streams = await client(proxy)
    with pytest.raises(TimeoutError):
        await ask(streams, b"x", 0.2)


async def test_a_dropped_peer_stays_silent_for_ever(proxy: Proxy) -> None:
    streams = await client(proxy)
    await ask(streams, b"x")
    proxy.drop()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await ask(streams, b"x", 0.1)
        proxy.heal()
    assert await ask(await client(proxy), b"y") == b"y"


@pytest.mark.parametrize("way", ["up", "down"])
async def test_cut_in_the_middle(proxy: Proxy, way: str) -> None:
    streams = await client(proxy)
    await ask(streams, b"x")
    proxy.cut(5, up=way == "up")
    streams[1].write(b"ab")
    assert await asyncio.wait_for(streams[0].readexactly(2), 2) == b"ab"
    streams[1].write(b"cdefgh")
    got = b""
    with pytest.raises(ConnectionResetError):
        while data := await asyncio.wait_for(streams[0].read(100), 2):
            got += data
        raise ConnectionResetError  # an end without RST will do as well
    assert got in (b"cde", b"")
    assert not proxy.cuts


async def test_refuse(proxy: Proxy) -> None:
    streams = await client(proxy)
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await client(proxy)
    assert await ask(streams, b"x") == b"x"  # the old one stays
    await proxy.start()
    assert await ask(await client(proxy), b"y") == b"y"
