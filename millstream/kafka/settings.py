"""From a broker's options to a client library's settings."""

from __future__ import annotations

import importlib.util
import inspect
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import SetupError
from ..security import (
    SASLGSSAPI,
    BaseSecurity,
    SASLOAuthBearer,
    SASLPlaintext,
    SASLScram256,
    SASLScram512,
)

#: Seconds that a token without a time of its own is used for.
_TOKEN = 300.0


def addresses(servers: str | Sequence[str]) -> list[str]:
    """The addresses of the cluster, each ``host:port``.

    Raises:
        SetupError: there is none.
    """
    given = servers.split(",") if isinstance(servers, str) else list(servers)
    found = [s.strip() for s in given if s.strip()]
    if not found:
        raise SetupError("no server", fix="give one: KafkaBroker('localhost:9092')")
    return [s.rpartition("://")[2] for s in found]


def mechanism(security: BaseSecurity | None) -> tuple[str, str]:
    """Kafka's names of the protocol and of the SASL mechanism, "" for none."""
    if security is None:
        return "PLAINTEXT", ""
    kinds: dict[type[BaseSecurity], str] = {
        SASLScram512: "SCRAM-SHA-512",
        SASLScram256: "SCRAM-SHA-256",
        SASLPlaintext: "PLAIN",
        SASLOAuthBearer: "OAUTHBEARER",
        SASLGSSAPI: "GSSAPI",
    }
    name = next((name for kind, name in kinds.items() if isinstance(security, kind)), "")
    protocol = "SSL" if security.use_ssl else "PLAINTEXT"
    return (f"SASL_{protocol}" if name else protocol), name


def confluent(options: Mapping[str, Any]) -> dict[str, Any]:
    """librdkafka's settings of whatever connects."""
    security: BaseSecurity | None = options.get("security")
    protocol, sasl = mechanism(security)
    found: dict[str, Any] = {
        "bootstrap.servers": ",".join(options["servers"]),
        "client.id": options.get("client_id") or "millstream",
        "security.protocol": protocol,
        "log_level": 2,
        "socket.timeout.ms": 10_000,
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": options.get("reconnect_backoff_max_ms") or 2000,
        "socket.keepalive.enable": True,
    }
    for name, key in _CONFLUENT.items():
        if options.get(name) is not None:
            found[key] = options[name]
    if sasl:
        found["sasl.mechanism"] = sasl
    if isinstance(security, SASLPlaintext):
        found |= {"sasl.username": security.username, "sasl.password": security.password}
    if sasl == "OAUTHBEARER":
        token = token_of(options)
        found["oauth_cb"] = lambda config: token()
    if sasl == "GSSAPI":
        found["sasl.kerberos.service.name"] = options.get("sasl_kerberos_service_name") or "kafka"
    if security is not None and security.ssl_context is not None:
        found |= _from_context(security.ssl_context)
    return {**found, **(options.get("config") or {})}


_CONFLUENT = {
    "request_timeout_ms": "socket.timeout.ms",
    "retry_backoff_ms": "retry.backoff.ms",
    "connections_max_idle_ms": "connections.max.idle.ms",
    "metadata_max_age_ms": "topic.metadata.refresh.interval.ms",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_key_password": "ssl.key.password",
}


def _from_context(context: ssl.SSLContext) -> dict[str, Any]:
    """What an SSLContext tells; its own certificate is not among that."""
    found: dict[str, Any] = {}
    roots = [ssl.DER_cert_to_PEM_cert(c) for c in context.get_ca_certs(binary_form=True)]
    if roots:
        found["ssl.ca.pem"] = "".join(roots)
    if not context.check_hostname:
        found["ssl.endpoint.identification.algorithm"] = "none"
    if context.verify_mode == ssl.CERT_NONE:
        found["enable.ssl.certificate.verification"] = False
    return found


def producing(options: Mapping[str, Any], publish_timeout: float) -> dict[str, Any]:
    """librdkafka's settings of the producer besides."""
    idempotent = options.get("enable_idempotence", True)
    found: dict[str, Any] = {
        "enable.idempotence": idempotent,
        "acks": "all",
        "linger.ms": 0,
        "partitioner": "murmur2_random",
        "message.timeout.ms": int(publish_timeout * 1000),
        "queue.buffering.max.messages": 100_000,
        "message.max.bytes": options.get("max_request_size") or 1_048_576,
    }
    if options.get("allow_auto_create_topics") is not None:
        found["allow.auto.create.topics"] = options["allow_auto_create_topics"]
    for name, key in _PRODUCING.items():
        if options.get(name) is not None:
            found[key] = options[name]
    if not idempotent and options.get("acks") is not None:
        found["acks"] = options["acks"]
    return found


_PRODUCING = {
    "compression_type": "compression.type",
    "max_batch_size": "batch.size",
    "linger_ms": "linger.ms",
    "partitioner": "partitioner",
}


def token_of(options: Mapping[str, Any]) -> Callable[[], tuple[str, float]]:
    """What gives a token, and until when it is good (seconds since the epoch).

    Raises:
        SetupError: nothing gives tokens.
    """
    given = options.get("sasl_oauth_token_provider")
    if given is None:
        raise SetupError(
            "SASLOAuthBearer without a token",
            fix="give sasl_oauth_token_provider=, a function that returns a token, or a token "
            "and its expiry in seconds since the epoch",
        )
    call = given if callable(given) else given.token
    if inspect.iscoroutinefunction(call):

        def token() -> tuple[str, float]:
            import asyncio

            return _with_time(asyncio.run(call()))  # in a thread of the library

        return token
    return lambda: _with_time(call())


def _with_time(found: Any) -> tuple[str, float]:
    return (
        (str(found[0]), float(found[1]))
        if isinstance(found, tuple)
        else (
            str(found),
            time.time() + _TOKEN,
        )
    )


def aiokafka(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of whatever aiokafka connects with."""
    from aiokafka.helpers import create_ssl_context

    security: BaseSecurity | None = options.get("security")
    protocol, sasl = mechanism(security)
    found: dict[str, Any] = {
        "bootstrap_servers": options["servers"],
        "client_id": options.get("client_id") or "millstream",
        "security_protocol": protocol,
        "request_timeout_ms": 10_000,
    }
    for name in ("request_timeout_ms", "retry_backoff_ms", "connections_max_idle_ms"):
        if options.get(name) is not None:
            found[name] = options[name]
    if options.get("metadata_max_age_ms") is not None:
        found["metadata_max_age_ms"] = options["metadata_max_age_ms"]
    if security is not None and security.use_ssl:
        files = (options.get(f"ssl_{name}") for name in ("cafile", "certfile", "keyfile"))
        cafile, certfile, keyfile = files
        found["ssl_context"] = security.ssl_context or create_ssl_context(
            cafile=cafile,
            certfile=certfile,
            keyfile=keyfile,
            password=options.get("ssl_key_password"),
        )
    if sasl:
        found["sasl_mechanism"] = sasl
    if isinstance(security, SASLPlaintext):
        found |= {
            "sasl_plain_username": security.username,
            "sasl_plain_password": security.password,
        }
    if sasl == "OAUTHBEARER":
        found["sasl_oauth_token_provider"] = _provider(token_of(options))
    if sasl == "GSSAPI":
        if importlib.util.find_spec("gssapi") is None:
            raise SetupError(
                "SASLGSSAPI with client='aiokafka' needs gssapi", fix="pip install gssapi"
            )
        found["sasl_kerberos_service_name"] = options.get("sasl_kerberos_service_name") or "kafka"
    return {**found, **(options.get("config") or {})}


def _provider(token: Callable[[], tuple[str, float]]) -> Any:
    import asyncio

    from aiokafka.abc import AbstractTokenProvider

    class Provider(AbstractTokenProvider):  # type: ignore[misc]
        async def token(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
            return (await asyncio.to_thread(token))[0]

    return Provider()


def aiokafka_producing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of aiokafka's producer besides."""
    idempotent = options.get("enable_idempotence", True)
    found: dict[str, Any] = {
        "enable_idempotence": idempotent,
        "acks": "all",
        "max_request_size": options.get("max_request_size") or 1_048_576,
    }
    for name in ("compression_type", "max_batch_size", "linger_ms", "partitioner"):
        if options.get(name) is not None:
            found[name] = options[name]
    if not idempotent and options.get("acks") is not None:
        found["acks"] = options["acks"]
    return found
