"""The message of MQTT as handlers see it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import PublishError
from ..message import Link, Message
from .wire import Incoming, Malformed, topic_bytes, write_properties

log = logging.getLogger("millstream.mqtt")

#: Headers that have a property of their own; correlation data may be any bytes, and come back
#: as they came.
CONTENT_TYPE, CORRELATION, REPLY = "content-type", "correlation_id", "reply_to"


class MqttMessage(Message[Incoming]):
    """A message of MQTT; ``raw`` is an :class:`Incoming`.

    Its headers are the user properties, together with ``content-type``, ``correlation_id`` and
    ``reply_to`` of the properties that are theirs. MQTT 3.1.1 has none.
    """

    __slots__ = ("_headers",)
    marked: ClassVar[Any] = property(operator.attrgetter("raw.marked"))

    def __init__(self, raw: Incoming, link: Link) -> None:
        # Written out: it is made for each message.
        self.raw = raw
        self.link = link
        self.settled = None
        self._correlation_id = None

    @property
    def body(self) -> bytes:
        return self.raw.payload

    @property
    def headers(self) -> Mapping[str, str]:
        if not self.raw.props:
            return _NONE
        try:
            return self._headers
        except AttributeError:
            self._headers: dict[str, str] = {}
        try:
            self._headers = headers_of(self.raw.properties)
        except Malformed as error:
            # To end the connection would bring the same message again, without end.
            log.warning("a message to %r has no headers: %s", self.raw.topic, error)
        return self._headers

    @property
    def destination(self) -> str:
        return self.raw.topic

    @property
    def delivery_count(self) -> int:
        return self.raw.count

    @property
    def qos(self) -> int:
        """The quality of service it arrived with."""
        return self.raw.qos

    @property
    def retain(self) -> bool:
        """Whether the server had kept it for those that subscribe later."""
        return self.raw.retain

    @property
    def properties(self) -> dict[str, Any]:
        """The properties of MQTT 5, such as ``message_expiry_interval``."""
        return self.raw.properties


#: Under the name of other frameworks.
MQTTMessage = MqttMessage

_NONE: Mapping[str, str] = {}


def headers_of(properties: Mapping[str, Any]) -> dict[str, str]:
    """The headers that properties carry."""
    headers = dict(properties.get("user_property", ()))
    if "content_type" in properties:
        headers[CONTENT_TYPE] = properties["content_type"]
    if "correlation_data" in properties:
        headers[CORRELATION] = properties["correlation_data"].decode("utf-8", "surrogateescape")
    if "response_topic" in properties:
        headers[REPLY] = properties["response_topic"]
    return headers


def properties_of(
    headers: Mapping[str, str] | None, reply_to: str = "", expiry: float | None = None
) -> dict[str, Any]:
    """The properties that carry headers.

    Raises:
        ValueError: ``expiry`` (seconds) is over at once.
    """
    found: dict[str, Any] = {}
    if headers:
        pairs = dict(headers)
        found["content_type"] = pairs.pop(CONTENT_TYPE, None)
        correlation = pairs.pop(CORRELATION, None)
        reply_to = reply_to or pairs.pop(REPLY, "")
        pairs.pop(REPLY, None)
        found["user_property"] = list(pairs.items())
        if correlation is not None:
            found["correlation_data"] = correlation.encode("utf-8", "surrogateescape")
    if reply_to:
        found["response_topic"] = reply_to
    if expiry is not None:
        if expiry <= 0:
            raise ValueError(f"expiry={expiry}: seconds, more than 0")
        found["message_expiry_interval"] = max(int(expiry), 1)
    return found


def packed(command: Any, headers: Mapping[str, str] | None) -> bytes:
    """The properties of a message that is to be published.

    Raises:
        PublishError: MQTT has no place for such headers or options.
        AddressError: there are no answers at such a topic.
    """
    if command.reply_to:
        topic_bytes(command.reply_to)
    try:
        return write_properties(properties_of(headers, command.reply_to, command.expiry))
    except (AttributeError, TypeError, ValueError) as error:
        why = _mistake(command, headers or {}) or error
        raise PublishError(f"a message to {command.topic!r} cannot be sent: {why}") from error


def _mistake(command: Any, headers: Mapping[str, Any]) -> str:
    """What of a message is of a wrong type; empty if nothing is."""
    for name, value in headers.items():
        if not isinstance(value, str):
            return f"header {name!r} is {value!r}, and headers are texts"
    if not isinstance(command.expiry, int | float | None):
        return f"expiry={command.expiry!r} is no number of seconds"
    return ""
