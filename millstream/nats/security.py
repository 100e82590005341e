"""Who we are to a NATS server: each class becomes the client's own options.

Secrets stay in these objects; nothing here is ever logged or part of an error's text.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nats.aio.client import RawCredentials
from nats.errors import Error as NatsError

from ..security import BaseSecurity, password_of

Text = str | Callable[[], str]


class NatsSecurity(BaseSecurity):
    """TLS, without any identity.

    Args:
        ssl_context: certificates to trust and to show; the system's where only ``use_ssl``
            is set.
        use_ssl: refuse a server that offers no TLS; on by itself with ``ssl_context``.
        tls_hostname: the name that the server's certificate has to carry, if it is not the
            address's.
        tls_handshake_first: begin with TLS before the server says anything
            (``handshake_first`` of its configuration); nothing is ever sent in the clear.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        use_ssl: bool | None = None,
        tls_hostname: str | None = None,
        tls_handshake_first: bool = False,
    ) -> None:
        super().__init__(ssl_context, use_ssl)
        self.tls_hostname = tls_hostname
        self.tls_handshake_first = tls_handshake_first

    def options(self) -> dict[str, Any]:
        """Arguments of nats-py's ``connect``."""
        context = self.ssl_context
        if context is None and (self.use_ssl or self.tls_handshake_first):
            context = ssl.create_default_context()
        return {
            "tls": context,
            "tls_hostname": self.tls_hostname,
            "tls_handshake_first": self.tls_handshake_first,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        return {}


class NatsUserPassword(NatsSecurity):
    """A user and a password; callables are asked at every connect, so that they can change."""

    def __init__(self, username: Text, password: Text, **tls: Any) -> None:
        super().__init__(**tls)
        self._username, self._password = username, password

    def _identity(self) -> dict[str, Any]:
        return {"user": guarded(self._username), "password": guarded(self._password)}


class NatsToken(NatsSecurity):
    """A token; a callable is asked at every connect, so that it can change."""

    def __init__(self, token: Text, **tls: Any) -> None:
        super().__init__(**tls)
        self._token = token

    def _identity(self) -> dict[str, Any]:
        return {"token": guarded(self._token)}


class NatsCredentials(NatsSecurity):
    """A user's JWT and seed, from a ``.creds`` file that is read again at every connect.

    Needs the package ``nkeys``.

    Args:
        credentials: the path of a ``.creds`` file, or what the class methods make.
    """

    def __init__(self, credentials: Any, **tls: Any) -> None:
        super().__init__(**tls)
        self._credentials = str(credentials) if isinstance(credentials, Path) else credentials

    @classmethod
    def from_file(cls, path: str | Path, **tls: Any) -> NatsCredentials:
        """From a ``.creds`` file."""
        return cls(path, **tls)

    @classmethod
    def from_files(cls, *, jwt: str | Path, seed: str | Path, **tls: Any) -> NatsCredentials:
        """From two files."""
        return cls((str(jwt), str(seed)), **tls)

    @classmethod
    def from_raw(cls, text: str, **tls: Any) -> NatsCredentials:
        """From the text of a ``.creds`` file."""
        return cls(RawCredentials(text), **tls)

    def _identity(self) -> dict[str, Any]:
        return {"user_credentials": self._credentials}


class NatsNKey(NatsSecurity):
    """An Ed25519 key pair, known to the server by its public key. Needs the package ``nkeys``.

    Args:
        seed_file: the path of the file that holds the seed (``SU...``).
    """

    def __init__(self, seed_file: str | Path | None = None, *, seed: str = "", **tls: Any) -> None:
        super().__init__(**tls)
        self._file, self._seed = seed_file, seed

    @classmethod
    def from_file(cls, path: str | Path, **tls: Any) -> NatsNKey:
        """From a file that holds the seed."""
        return cls(path, **tls)

    @classmethod
    def from_seed(cls, seed: str, **tls: Any) -> NatsNKey:
        """From the seed itself."""
        return cls(seed=seed, **tls)

    def _identity(self) -> dict[str, Any]:
        if self._file is not None:
            return {"nkeys_seed": str(self._file)}
        return {"nkeys_seed_str": self._seed}


class NatsJWT(NatsSecurity):
    """A JWT and a signature from callables, for keys that live elsewhere (a vault, an HSM).

    Args:
        jwt_cb: returns the user's JWT.
        signature_cb: takes the server's nonce and returns its base64 signature.
    """

    def __init__(
        self,
        jwt_cb: Callable[[], bytes | bytearray],
        signature_cb: Callable[[str], bytes],
        **tls: Any,
    ) -> None:
        super().__init__(**tls)
        self._jwt_cb, self._signature_cb = jwt_cb, signature_cb

    def _identity(self) -> dict[str, Any]:
        return {
            "user_jwt_cb": guarded(self._jwt_cb),
            "signature_cb": guarded(self._signature_cb),
        }


def of_nats(security: BaseSecurity) -> NatsSecurity:
    """What other brokers share, in NATS's words.

    Raises:
        SetupError: NATS has no such login.
    """
    if isinstance(security, NatsSecurity):
        return security
    login = password_of(security, "NATS")
    tls: dict[str, Any] = {"ssl_context": security.ssl_context, "use_ssl": security.use_ssl}
    return (
        NatsSecurity(**tls)
        if login is None
        else NatsUserPassword(login.username, login.password, **tls)
    )


def guarded(value: Any) -> Any:
    """A callable whose failure is a failed connect, tried again like any other.

    nats-py's reconnect task would end for good on an error that it does not know.
    """
    if not callable(value):
        return value

    def ask(*args: Any) -> Any:
        try:
            return value(*args)
        except Exception as error:
            raise NatsError(f"the credentials callable failed: {type(error).__name__}") from error

    return ask
