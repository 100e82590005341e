"""The MQTT broker and its router."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import unquote, urlsplit

from ..broker import Broker, BrokerOptions, split_options
from ..endpoints import Endpoints, Route, RoutePublisher, Router, asks, declares, produces, sends
from ..errors import CapabilityError, SetupError
from ..security import BaseSecurity, password_of
from .connection import Settings
from .driver import MqttDriver
from .options import MqttPublication, MqttPublish, MqttRequest, MqttSubscription, Will
from .wire import LARGEST, V5, V311

#: Scheme → whether TLS is used, and the port.
_SCHEMES = {
    "mqtt": (False, 1883),
    "tcp": (False, 1883),
    "mqtts": (True, 8883),
    "ssl": (True, 8883),
    "tls": (True, 8883),
}
#: Options of the driver; the others are of its connections.
_OWN = (
    *("client_id", "clean_session", "session_expiry", "receive_maximum", "will"),
    *("reply_prefix", "publish_timeout"),
)
#: What MQTT 3.1.1 has no place for.
_ONLY_V5 = ("session_expiry", "receive_maximum", "maximum_packet_size", "user_properties")
#: Other frameworks' names → ours; and what they have where there is nothing to choose here.
_SAME = {"mqtt_connect_timeout": "connect_timeout", "session_expiry_interval": "session_expiry"}
_ENDLESS = ("reconnect", "on_connection_recovery_failed")
_VERSIONS = {"5.0": V5, "5": V5, "3.1.1": V311}


class MqttConnect(BrokerOptions, total=False):
    """Options of an MQTT broker: those of every broker, and these.

    Keys:
        client_id: the client identifier of the connection that publishes, and how those of
            sessions begin. It has to stay the same over restarts, and no two processes may
            share it; workers of one supervisor add their number by themselves. Without one the
            sessions are named after this machine and what it runs.
        version: ``5.0`` or ``3.1.1``, which has no headers, no answers, no expiry.
        clean_session: end all sessions with their connections; False by default.
        session_expiry: seconds for which the server keeps a session while nobody is connected; a
            week. MQTT 3.1.1 knows no end.
        will: what the server publishes when the publishing connection ends without a farewell.
        security: a user and password, or TLS; they may also stand in the address.
        keepalive: seconds within which a dead connection is noticed; 20. 0 for never.
        connect_timeout: seconds for one attempt to connect; 5.
        reconnect_max: the longest wait between two attempts in seconds; 5. The first follow
            sooner, and they never end.
        receive_maximum: for all subscriptions that do not say otherwise (MQTT 5).
        maximum_packet_size: bytes of the largest message that the server may send; it drops
            larger ones (MQTT 5).
        user_properties: told to the server when connecting (MQTT 5).
        reply_prefix: where the topics of answers lie, unless the server says where; ``ms/reply``.
        host, port: instead of what the address says.
        mqtt_connect_timeout, session_expiry_interval: ``connect_timeout`` and ``session_expiry``
            under the names of other frameworks.
        reconnect, on_connection_recovery_failed: refused, unless None: a connection comes back
            by itself, and no attempt is the last.
        request_response_information, request_problem_information, session_replay_buffer_size,
            session_replay_timeout, stripped_prefixes: accepted for callers of other frameworks:
            the server is always asked for both, and no session brings what nobody subscribed to.
    """

    client_id: str
    version: str
    clean_session: bool
    session_expiry: float
    will: Will | None
    security: BaseSecurity | None
    keepalive: int
    connect_timeout: float
    reconnect_max: float
    receive_maximum: int | None
    maximum_packet_size: int | None
    user_properties: Mapping[str, str] | Any
    reply_prefix: str
    host: str | None
    port: int | None
    mqtt_connect_timeout: float
    session_expiry_interval: float
    reconnect: None
    on_connection_recovery_failed: None
    request_response_information: bool | None
    request_problem_information: bool | None
    session_replay_buffer_size: int
    session_replay_timeout: float
    stripped_prefixes: Any


class MqttEndpoints(Endpoints):
    """What an MQTT broker and its routers can declare."""

    subscriber = declares(MqttSubscription)
    publisher = produces(MqttPublication)


class MqttRouter(MqttEndpoints, Router):
    """Declarations to be included in a :class:`MqttBroker` or another router."""


class MqttRoute(Route):
    """A subscription with its handler, for ``MqttRouter(handlers=[...])``."""


class MqttPublisher(RoutePublisher):
    """The arguments of ``router.publisher``, to be declared with a :class:`MqttRoute`."""


class MqttBroker(MqttEndpoints, Broker):
    """Connections to an MQTT server, with subscribers and publishers.

    Args:
        url: such as ``mqtt://localhost:1883``, or with TLS ``mqtts://user:password@example.com``.
        options: see :class:`MqttConnect` and :class:`millstream.broker.BrokerOptions`.
    """

    publish = sends(MqttPublish)
    request = asks(MqttRequest)

    if TYPE_CHECKING:
        driver: MqttDriver

    def __init__(self, url: str = "mqtt://localhost:1883", **options: Unpack[MqttConnect]) -> None:
        given, common = split_options(options, MqttConnect, type(self).__name__)
        given = {name: value for name, value in given.items() if value is not None}
        for name in _SAME.keys() & given.keys():
            given.setdefault(_SAME[name], given[name])
        for name in _ENDLESS:
            if given.get(name) is not None:
                raise SetupError(
                    f"{type(self).__name__}: {name}=... has no place: a connection comes back by "
                    "itself, and no attempt is the last",
                    fix="leave it out; reconnect_max= is the longest wait between two attempts",
                )
        own = {name: given[name] for name in _OWN if name in given}
        super().__init__(MqttDriver(settings_of(url, given), **own), **common)

    @property
    def client_id(self) -> str:
        """The client identifier of the connection that publishes; empty while there is none."""
        outbox = self.driver.outbox
        return outbox.client_id if outbox is not None else ""

    @property
    def connection_info(self) -> Mapping[str, Any]:
        """What the server said of itself when it let us in, by MQTT 5's names; else empty."""
        outbox = self.driver.outbox
        return outbox.limits if outbox is not None else {}


def settings_of(url: str, options: dict[str, Any]) -> Settings:
    """How to reach the server.

    Raises:
        SetupError: the address or an option is not understood.
    """
    parts = urlsplit(url if "://" in url else f"mqtt://{url}")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        port = parts.port if options.get("port") is None else options["port"]
    except ValueError:
        port = -1
    host = options.get("host") or parts.hostname
    if parts.scheme not in _SCHEMES or not host or port == -1:
        raise SetupError(
            f"{shown!r} is no address of an MQTT server",
            fix="write mqtt://localhost:1883, or mqtts://example.com for TLS",
        )
    tls, usual = _SCHEMES[parts.scheme]
    if port is not None and not 0 < port < 65_536:
        raise SetupError(f"port={port}", fix="1 to 65,535")
    version = str(options.get("version", "5.0"))
    if version not in _VERSIONS:
        raise SetupError(f"version={version!r}", fix='"5.0" or "3.1.1"')
    for name in _ONLY_V5:
        if options.get(name) and _VERSIONS[version] == V311:
            raise CapabilityError(f"MQTT 3.1.1 has no {name}", fix='use version="5.0"')
    most = options.get("maximum_packet_size")
    if most is not None and not 1 <= most <= LARGEST:
        raise SetupError(f"maximum_packet_size={most}", fix=f"bytes, 1 to {LARGEST:,}")
    keepalive = options.get("keepalive", 20)
    if not 0 <= keepalive <= 65_535:
        raise SetupError(f"keepalive={keepalive}", fix="seconds, 0 to 65,535")
    security = options.get("security")
    username = unquote(parts.username) if parts.username is not None else None
    password = unquote(parts.password) if parts.password is not None else None
    context: ssl.SSLContext | None = None
    if login := password_of(security, "MQTT"):
        username, password = login.username, login.password
    if password is not None and username is None:
        username = ""
    if security is not None and security.use_ssl:
        tls, context = True, security.ssl_context
    if tls and context is None:
        context = ssl.create_default_context()
    pairs = options.get("user_properties", ())
    return Settings(
        host=host,
        port=port if port is not None else 8883 if tls else usual,
        ssl=context,
        version=_VERSIONS[version],
        username=username,
        password=password,
        keepalive=int(keepalive),
        connect_timeout=options.get("connect_timeout", 5.0),
        reconnect_max=options.get("reconnect_max", 5.0),
        maximum_packet_size=most,
        user_properties=list(pairs.items() if isinstance(pairs, Mapping) else pairs),
    )
