"""How to reach a NATS cluster: addresses, options, and what an error means."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from nats.aio.client import Client, Server
from nats.errors import Error as NatsError

from ..base import reconnect_delay
from ..errors import ConnectError, MissingExtra, SetupError
from ..security import BaseSecurity, tls_fault, without_secrets
from .security import guarded, of_nats

#: Options of nats-py that name a secret or a way to get one, in place of ``security=``.
_SECRETS = ("user", "password", "token", "signature_cb", "user_jwt_cb")


class NoJetStream(SetupError):
    """The server, or the account, has no JetStream; at a restart also: not yet."""


def addresses(servers: str | Sequence[str]) -> list[str]:
    """The servers' addresses, checked.

    Raises:
        SetupError: one of them is not an address.
    """
    given = servers.split(",") if isinstance(servers, str) else list(servers)
    urls = [url.strip() for url in given if url.strip()]
    if not urls:
        raise SetupError("no server's address", fix='give one, such as "nats://localhost:4222"')
    for i, url in enumerate(urls):
        if "://" not in url:
            urls[i] = url = f"nats://{url}"
        try:
            parts = urlsplit(url)
            ok = parts.hostname and parts.scheme in ("nats", "tls", "ws", "wss") and parts.port != 0
        except ValueError:
            ok = False
        if not ok:
            raise SetupError(
                f"{without_secrets(url)!r} is not a server's address",
                fix="write nats://host:4222 (or tls://, ws://, wss://)",
            )
    return urls


def client_options(security: BaseSecurity | None, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of nats-py's ``connect``.

    Raises:
        SetupError: there is no such option, or NATS has no such login.
    """
    unknown = sorted(options.keys() - inspect.signature(Client.connect).parameters.keys())
    if unknown:
        raise SetupError(
            f"a NATS broker has no option {', '.join(map(repr, unknown))}",
            fix="see millstream.nats.broker.NatsConnect for those there are",
        )
    chosen = {key: value for key, value in options.items() if value is not None}
    for key in _SECRETS:
        if key in chosen:
            chosen[key] = guarded(chosen[key])
    if security is not None:
        told = of_nats(security).options()
        chosen |= {key: value for key, value in told.items() if value is not None}
    chosen.setdefault("max_reconnect_attempts", -1)
    chosen.setdefault("ping_interval", 20)
    wait = chosen.setdefault("reconnect_time_wait", 2)

    def next_server(servers: list[Server], info: dict[str, Any]) -> tuple[Server, float]:
        server = min(servers, key=lambda s: s.reconnects)
        return server, reconnect_delay(server.reconnects, wait)

    chosen.setdefault("reconnect_to_server_handler", next_server)
    return chosen


class _Enough(Exception):
    """Ends nats-py's connect after one round over all servers."""


async def connect(urls: Sequence[str], options: dict[str, Any], **callbacks: Any) -> Client:
    """Connect in one attempt at each server.

    nats-py would go on for ever: its error callback counts, and stops it.

    Raises:
        ConnectError: not reached or not let in.
        MissingExtra: the credentials need the package ``nkeys``.
    """
    client, failures = Client(), []
    tell = callbacks.pop("error_cb")
    connected = False

    async def error_cb(error: Exception) -> None:
        if connected:
            await tell(error)
            return
        failures.append(error)
        if len(failures) >= len(urls):
            raise _Enough

    limits = {"max_reconnect_attempts": -1, "allow_reconnect": True}
    try:
        await client.connect(list(urls), error_cb=error_cb, **{**options, **callbacks, **limits})
    except _Enough:
        await discard(client)
        raise _explain(urls, failures) from failures[-1]
    except ImportError as error:
        await discard(client)
        raise MissingExtra(
            error.name or str(error), "nats", purpose="this kind of login"
        ) from error
    except (NatsError, OSError, ValueError) as error:
        await discard(client)
        raise _explain(urls, [error]) from error
    except BaseException as error:
        await discard(client)
        if type(error).__module__.startswith("nkeys"):
            raise _explain(urls, [error]) from None
        raise
    wants_tls = "tls" in options or any(url.startswith("tls:") for url in urls)
    if wants_tls and not client._server_info.get("tls_required"):
        # nats-py goes on in the clear, and its public interface does not tell.
        await discard(client)
        where = ", ".join(without_secrets(url) for url in urls)
        raise ConnectError(
            f"{where}: TLS is asked for, and the server offers no TLS", permanent=True
        )
    # From here on nats-py keeps the connection by itself.
    client.options["max_reconnect_attempts"] = options["max_reconnect_attempts"]
    client.options["allow_reconnect"] = options.get("allow_reconnect", True)
    connected = True
    return client


async def discard(client: Client, patience: float = 0.5) -> None:
    """Close a client, whatever its state; what it has to say about that does not matter."""
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait({closing}, timeout=patience)
    if not closing.done():
        # nats-py waits without end for a server that takes nothing any more, or whose TLS failed.
        with suppress(AttributeError):
            client._transport._io_writer.transport.abort()  # type: ignore[union-attr]
        closing.cancel()
        await asyncio.wait({closing})
    if not closing.cancelled():
        closing.exception()


def _explain(urls: Sequence[str], failures: Sequence[BaseException]) -> ConnectError:
    where = ", ".join(without_secrets(url) for url in urls)
    for failure in failures:
        if (reason := _permanent(failure)) is not None:
            return ConnectError(f"{where}: {reason}", permanent=True)
    return ConnectError(f"{where}: {reason_of(failures[-1])}")


def _permanent(error: BaseException) -> str | None:
    """Why another attempt cannot help, or None where it may."""
    text = str(error).lower()
    if "authorization" in text or "authentication" in text:
        return "the server refuses the credentials, or wants some"
    if fault := tls_fault(error):
        return fault
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return f"the credentials file cannot be read: {error.strerror}"
    if type(error).__module__.startswith("nkeys") or isinstance(error, ValueError):
        return "the seed is not valid"
    return None


def reason_of(error: BaseException) -> str:
    """A short text for people."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("nats: ") or type(error).__name__
