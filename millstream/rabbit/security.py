"""Who we are to a RabbitMQ server."""

from __future__ import annotations

import ssl
from typing import Any

from ..errors import SetupError
from ..security import BaseSecurity, SASLPlaintext


class RabbitExternalAuth(BaseSecurity):
    """The client certificate of the TLS connection says who we are (SASL EXTERNAL).

    The server needs the plugin ``rabbitmq_auth_mechanism_ssl``.

    Args:
        ssl_context: holds the certificate (``load_cert_chain``).
        use_ssl: speak TLS only.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None, use_ssl: bool = True) -> None:
        super().__init__(ssl_context, use_ssl)


def options_of(security: BaseSecurity | None) -> dict[str, Any]:
    """The options of an address.

    Raises:
        SetupError: RabbitMQ knows no such login.
    """
    if security is None:
        return {}
    found: dict[str, Any] = {"ssl_context": security.ssl_context, "use_ssl": security.use_ssl}
    if isinstance(security, RabbitExternalAuth):
        found["external"] = True
    elif type(security) is SASLPlaintext:
        found |= {"username": security.username, "password": security.password}
    elif type(security) is not BaseSecurity:
        raise SetupError(
            f"a RabbitMQ broker does not take {type(security).__name__}",
            fix="use SASLPlaintext, RabbitExternalAuth or BaseSecurity",
        )
    return found
