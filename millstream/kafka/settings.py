"""From a broker's options to a client library's settings."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
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

_log = logging.getLogger("millstream.kafka.librdkafka")

#: Seconds that a token without a time of its own is used for.
_TOKEN = 300.0


def addresses(servers: str | Sequence[str]) -> list[str]:
    """The addresses of the cluster, each ``host:port``.

    Raises:
        SetupError: there is none.
    """
    given = servers.split(",") if isinstance(servers, str) else servers
    if not (isinstance(given, list | tuple | set) and all(isinstance(s, str) for s in given)):
        raise SetupError(f"bootstrap_servers={servers!r}", fix="'localhost:9092', or several")
    found = [s.rpartition("://")[2].strip() for s in given if s.strip()]
    if not found:
        raise SetupError("no server", fix="give one: KafkaBroker('localhost:9092')")
    found = [s if _WITH_PORT.search(s) else f"{s}:9092" for s in found]
    for server in found:
        port = server.rpartition(":")[2]
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise SetupError(f"{server!r} is no server", fix="host:port, such as localhost:9092")
    return found


#: An address with a port; a colon within brackets belongs to an IPv6 address.
_WITH_PORT = re.compile(r":[^\]]*$")


def mechanism(security: BaseSecurity | None) -> tuple[str, str]:
    """Kafka's names of the protocol and of the SASL mechanism, "" for none."""
    if security is None:
        return "PLAINTEXT", ""
    if not isinstance(security, BaseSecurity):
        raise SetupError(
            f"security={security!r}", fix="one of millstream.security, such as SASLPlaintext(...)"
        )
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


#: Settings of the libraries that undo what is promised, and what to say instead.
_OURS = {
    "enable.auto.commit": "offsets are committed when their messages are handled",
    "enable.auto.offset.store": "offsets are committed when their messages are handled",
    "group.id": "group_id= of the subscriber",
    "transactional.id": "transactional_id= of the broker",
}


def further(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Settings that the user gives by the library's own names.

    Raises:
        SetupError: one of them is ours to make.
    """
    if config is not None and not isinstance(config, Mapping):
        raise SetupError(f"config={config!r}", fix="a dict of the client library's settings")
    for name in config or {}:
        if (fix := _OURS.get(name.replace("_", "."))) is not None:
            raise SetupError(f"{name!r} in config=", fix=fix)
    return config or {}


def confluent(options: Mapping[str, Any]) -> dict[str, Any]:
    """librdkafka's settings of whatever connects."""
    security: BaseSecurity | None = options.get("security")
    protocol, sasl = mechanism(security)
    found: dict[str, Any] = {
        "bootstrap.servers": ",".join(options["servers"]),
        "client.id": options.get("client_id") or "millstream",
        "security.protocol": protocol,
        "log_level": 2,
        "logger": _Lines(),
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
    if options.get("sasl_kerberos_domain_name"):
        raise SetupError(
            "sasl_kerberos_domain_name with client='confluent', whose domain is each broker's host",
            fix="leave it out, or take client='aiokafka'",
        )
    if security is not None and security.ssl_context is not None:
        found |= _from_context(security.ssl_context)
    return found


class _Lines:
    """What librdkafka logs, which would write to standard error by itself.

    All that matters of it comes as an error too, so this is for those who look closer.
    """

    def log(self, level: int, text: str, *args: object) -> None:
        _log.debug(text, *args)


_CONFLUENT = {
    "request_timeout_ms": "socket.timeout.ms",
    "retry_backoff_ms": "retry.backoff.ms",
    "connections_max_idle_ms": "connections.max.idle.ms",
    "metadata_max_age_ms": "topic.metadata.refresh.interval.ms",
    "client_rack": "client.rack",
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
    idempotent, acks = confirming(options)
    found: dict[str, Any] = {
        "enable.idempotence": idempotent,
        "acks": acks,
        "linger.ms": 0,
        "message.timeout.ms": int(publish_timeout * 1000),
        "queue.buffering.max.messages": 100_000,
        "message.max.bytes": options.get("max_request_size") or 1_048_576,
        "compression.type": compression(options) or "none",
        "partitioner": options.get("partitioner") or "murmur2_random",
    }
    if options.get("allow_auto_create_topics") is not None:
        found["allow.auto.create.topics"] = options["allow_auto_create_topics"]
    for name, key in _PRODUCING.items():
        if options.get(name) is not None:
            found[key] = options[name]
    if not isinstance(found["partitioner"], str):
        raise SetupError(
            f"partitioner={found['partitioner']!r}: a function, with client='confluent'",
            fix="a name such as 'murmur2_random' or 'consistent_random', or client='aiokafka'",
        )
    return found


def confirming(options: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether the producer is idempotent, and which copies confirm a message.

    As with Kafka's own client, fewer ``acks`` than all of them turn idempotence off.

    Raises:
        SetupError: both are asked for, or there is no such choice.
    """
    acks, wanted = options.get("acks"), options.get("enable_idempotence")
    acks = "all" if acks in (None, -1, "-1") else acks
    if acks not in ("all", 1, 0, "1", "0"):
        raise SetupError(f"acks={acks!r}", fix="'all', 1 or 0")
    if acks == "all":
        return wanted is not False, acks
    if wanted or options.get("transactional_id") is not None:
        asks = "transactional_id=" if not wanted else "enable_idempotence=True"
        raise SetupError(f"acks={acks!r} with {asks}, which needs all", fix="leave out one")
    return False, int(acks)


def compression(options: Mapping[str, Any]) -> str | None:
    """How messages are compressed; None for not at all."""
    name: str | None = options.get("compression_type")
    if name not in (None, "none", "gzip", "snappy", "lz4", "zstd"):
        raise SetupError(
            f"compression_type={name!r}", fix="'gzip', 'snappy', 'lz4', 'zstd' or 'none'"
        )
    return None if name == "none" else name


_PRODUCING = {"max_batch_size": "batch.size", "linger_ms": "linger.ms"}


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
    for name in (
        *("request_timeout_ms", "retry_backoff_ms", "connections_max_idle_ms"),
        *("metadata_max_age_ms", "client_rack", "sasl_kerberos_domain_name"),
    ):
        if options.get(name) is not None:
            found[name] = options[name]
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
    return {**found, **further(options.get("config"))}


def _provider(token: Callable[[], tuple[str, float]]) -> Any:
    import asyncio

    from aiokafka.abc import AbstractTokenProvider

    class Provider(AbstractTokenProvider):  # type: ignore[misc]
        async def token(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
            return (await asyncio.to_thread(token))[0]

    return Provider()


def aiokafka_producing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of aiokafka's producer besides."""
    from aiokafka import codec

    idempotent, acks = confirming(options)
    name = compression(options)
    if name is not None and not getattr(codec, f"has_{name}")():
        raise SetupError(
            f"compression_type={name!r} with client='aiokafka' needs cramjam",
            fix="pip install cramjam",
        )
    if not callable(options.get("partitioner") or callable):
        raise SetupError(
            f"partitioner={options['partitioner']!r}: a name, with client='aiokafka'",
            fix="a function (key, all partitions, available ones), or client='confluent'",
        )
    found: dict[str, Any] = {
        "enable_idempotence": idempotent,
        "acks": acks,
        "max_request_size": options.get("max_request_size") or 1_048_576,
        "compression_type": name,
    }
    for name in ("max_batch_size", "linger_ms", "partitioner"):
        if options.get(name) is not None:
            found[name] = options[name]
    return found
