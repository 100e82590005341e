"""Who an application is, and how its connection is protected, for brokers that share these ways.

A broker says in its documentation which of them it knows; NATS has its own in
``millstream.nats``.
"""

from __future__ import annotations

import re
import ssl

from .errors import SetupError

#: How TLS says that the connection broke meanwhile.
_PASSING = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class BaseSecurity:
    """TLS without a login.

    Args:
        ssl_context: how the other side is checked; Python's default where TLS is asked for
            without one.
        use_ssl: whether TLS is used; by default if there is a context.
    """

    def __init__(
        self, ssl_context: ssl.SSLContext | None = None, use_ssl: bool | None = None
    ) -> None:
        if use_ssl is False and ssl_context is not None:
            raise SetupError("ssl_context with use_ssl=False", fix="leave out one of them")
        self.ssl_context = ssl_context
        self.use_ssl = ssl_context is not None if use_ssl is None else use_ssl

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{' with TLS' if self.use_ssl else ''}>"


class SASLPlaintext(BaseSecurity):
    """A user and a password.

    Args:
        username: the user.
        password: the password, which is never shown.
        ssl_context: as of :class:`BaseSecurity`.
        use_ssl: the same.
    """

    def __init__(
        self,
        username: str,
        password: str,
        ssl_context: ssl.SSLContext | None = None,
        use_ssl: bool | None = None,
    ) -> None:
        super().__init__(ssl_context, use_ssl)
        self.username, self.password = username, password


def password_of(security: BaseSecurity | None, broker: str) -> SASLPlaintext | None:
    """The user and password, for a broker that knows no other login.

    Raises:
        SetupError: another kind of login was given.
    """
    if type(security) is SASLPlaintext:  # the others of its kind are no plain passwords
        return security
    if security is None or type(security) is BaseSecurity:
        return None
    raise SetupError(
        f"{broker} has no {type(security).__name__}",
        fix="use SASLPlaintext(username=..., password=...) or BaseSecurity(ssl_context=...)",
    )


def without_secrets(url: str) -> str:
    """An address without a user, a password or a token."""
    return re.sub(r"//[^/]*@", "//", url)


def tls_fault(error: BaseException) -> str | None:
    """What is wrong with TLS, where that is the cause of an error; no other attempt mends it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the server's certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _PASSING):
            return f"TLS failed: {cause.reason or cause}"
        cause = cause.__cause__ or cause.__context__
    return None


class SASLScram256(SASLPlaintext):
    """A user and a password by SCRAM-SHA-256, which does not send the password."""


class SASLScram512(SASLPlaintext):
    """A user and a password by SCRAM-SHA-512, which does not send the password."""


class SASLOAuthBearer(BaseSecurity):
    """A token, which the broker's own option gives."""


class SASLGSSAPI(BaseSecurity):
    """Kerberos."""


__all__ = [
    "SASLGSSAPI",
    "BaseSecurity",
    "SASLOAuthBearer",
    "SASLPlaintext",
    "SASLScram256",
    "SASLScram512",
]
