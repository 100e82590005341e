"""The way of what is published: middlewares, encoding, the driver; and of the answer back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from . import killpoints
from .body import any_reader
from .codec import Codec, Decode, as_decode_error
from .driver import Driver, PublishCommand
from .errors import RemoteError
from .message import Link, Message
from .middleware import Send, fold_publish

if TYPE_CHECKING:
    from .broker import Broker

#: Publications that wait for their confirmation at once.
_AT_ONCE = 500


def sender(broker: Broker, codec: Codec, middlewares: Sequence[Any]) -> Send:
    """The way of a command; gives the receipt."""
    deliver = killpoints.around("publish", broker.driver.publish)
    return _way(broker, codec, middlewares, deliver, broker.publish_timeout)


def requester(broker: Broker, codec: Codec, middlewares: Sequence[Any]) -> Send:
    """The same for requests; gives the raw answer."""
    driver, default = broker.driver, broker.request_timeout

    async def request(command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        return await driver.request(command, data, headers, command.timeout or default)

    return _way(broker, codec, middlewares, request, None)


def _way(
    broker: Broker,
    codec: Codec,
    middlewares: Sequence[Any],
    deliver: Callable[[Any, bytes, dict[str, str] | None], Coroutine[Any, Any, Any]],
    timeout: float | None,
) -> Send:
    encode = codec.encode

    async def send(command: Any) -> Any:
        data, content_type = encode(command.message)
        if command.content_type is not None:
            content_type = command.content_type
        headers = command.headers
        if content_type is not None or command.correlation_id is not None:
            headers = dict(headers) if headers else {}
            if content_type is not None:
                headers["content-type"] = content_type
            if command.correlation_id is not None:
                headers["correlation_id"] = command.correlation_id
        if command.timeout is None:
            command.timeout = timeout
        return await deliver(command, data, headers)

    return fold_publish((*middlewares, *broker.test_middlewares), send, None)


async def send_all(send: Send, commands: Sequence[PublishCommand]) -> list[Any]:
    """Send messages in order, without waiting for each other's confirmation.

    Returns:
        The receipts, in the same order.

    Raises:
        ExceptionGroup: some failed; the others are published.
    """
    results: list[Any] = []
    for start in range(0, len(commands), _AT_ONCE):
        some = map(send, commands[start : start + _AT_ONCE])
        results += await asyncio.gather(*some, return_exceptions=True)
    errors = [r for r in results if isinstance(r, Exception)]
    if errors:
        text = f"{len(errors)} of {len(results)} messages were not published"
        raise ExceptionGroup(text, errors)
    return results


class Answers:
    """What the answers to a broker's requests are read with: it costs more to make than to use."""

    def __init__(self, driver: Driver, codec: Codec) -> None:
        #: What they have in common.
        self.link = Link(driver, None)
        self.link.decode = any_reader(codec)
        self._codec = codec
        self._known = functools.lru_cache(codec.decoder)

    def decoder(self, type_: Any) -> Decode:
        """A function from bytes to a value of ``type_``."""
        try:
            return self._known(type_)
        except TypeError:  # an annotation that cannot be hashed
            return self._codec.decoder(type_)


async def answer(
    broker: Broker, ask: Send, command: PublishCommand, response_model: Any = None
) -> Any:
    """Send a request; a Message, or its body as ``response_model``.

    Raises:
        RequestTimeout: no answer in time.
        NoResponders: nobody listens.
        RemoteError: the handler on the other side failed.
        DecodeError: the answer is not a ``response_model``.
    """
    raw, answers = await ask(command), broker.answers
    message: Message[Any] = broker.driver.reply_envelope()(raw, answers.link)
    kind = message.headers.get("ms-error-type")
    if kind is not None:
        raise RemoteError(kind, message.headers.get("ms-error", ""))
    if response_model is None:
        return message
    try:
        return answers.decoder(response_model)(message.body)
    except Exception as error:
        raise as_decode_error(error, "the answer") from error
