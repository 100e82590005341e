"""The way of what is published: middlewares, encoding, the driver; and of the answer back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from . import killpoints
from .body import any_reader
from .codec import Codec, as_decode_error
from .driver import PublishCommand
from .errors import RemoteError
from .letters import many_lines
from .message import Link, Message
from .middleware import Send, fold_publish
from .plan import Site

if TYPE_CHECKING:
    from .broker import Broker

#: Publications that wait for their confirmation at once.
_AT_ONCE = 500


def sender(broker: Broker, codec: Codec, middlewares: Sequence[Any]) -> Send:
    """The way of a command; gives the receipt."""
    deliver = killpoints.around("publish", broker.driver.publish)
    return _way(broker, codec, middlewares, deliver, broker.publish_timeout)


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

    site = Site(
        name="publication",
        where="",
        codec=codec,
        context=broker.context,
        logger=broker.logger,
        broker=broker,
        app=broker.app,
    )
    return fold_publish((*middlewares, *broker.test_middlewares), send, site)


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


class Requester:
    """The same for requests, and how their answers are read, which is made once."""

    def __init__(self, broker: Broker, codec: Codec, middlewares: Sequence[Any]) -> None:
        driver, default = broker.driver, broker.request_timeout

        async def request(command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
            return await driver.request(command, data, headers, command.timeout or default)

        #: Gives the raw answer.
        self.ask: Send = _way(broker, codec, middlewares, request, None)
        self._envelope, self._link = driver.reply_envelope(), Link(driver, None)
        self._link.decode = any_reader(codec)
        self._codec, self._known = codec, functools.lru_cache(codec.decoder)

    async def __call__(self, command: PublishCommand, response_model: Any = None) -> Any:
        """Send a request; its answer as a Message, or its body as ``response_model``.

        Raises:
            RequestTimeout: no answer in time.
            NoResponders: nobody serves the address.
            RemoteError: the handler on the other side failed.
            DecodeError: the answer is not a ``response_model``.
        """
        message: Message[Any] = self._envelope(await self.ask(command), self._link)
        kind = message.headers.get("ms-error-type")
        if kind is not None:
            raise RemoteError(kind, many_lines(message.headers.get("ms-error", "")))
        if response_model is None:
            return message
        try:
            try:
                decode = self._known(response_model)
            except TypeError:  # an annotation that cannot be hashed
                decode = self._codec.decoder(response_model)
            return decode(message.body)
        except Exception as error:
            raise as_decode_error(error, "the answer") from error
