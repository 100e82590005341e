"""Publishing: declared publishers, results of handlers, and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .checks import not_taken
from .driver import PublicationSpec, PublishCommand
from .errors import NotConnected
from .message import Message, current
from .middleware import Send
from .sending import Requester, send_all, sender
from .spy import Spied

if TYPE_CHECKING:
    from .broker import Broker
    from .endpoints import Endpoints, Scope
    from .subscriber import Handler

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(init=False, repr=False, eq=False)
class Response:
    """A handler's result with metadata, for what is published and for the answer to a request.

    Args:
        body: what is published; None publishes an empty body, where a bare None publishes
            nothing.
        headers: sent along.
        correlation_id: instead of the incoming message's.
        options: further arguments of the broker's ``publish``; None leaves it to the publisher.
            An answer takes them as well, but for those that say where a message goes: it goes
            where it is wanted.
    """

    body: Any = None
    _: KW_ONLY
    headers: Mapping[str, str] | None = None
    correlation_id: str | None = None

    def __init__(
        self,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        **options: Any,
    ) -> None:
        self.body, self.correlation_id = body, correlation_id
        self.headers = dict(headers) if headers is not None else None
        self.options = {name: value for name, value in options.items() if value is not None}

    def __post_init__(self) -> None:
        # The fields that a broker's own class adds are the options.
        Response.__init__(self, **vars(self))

    def arguments(self) -> dict[str, Any]:
        """What is said besides the body, as arguments of the broker's ``publish``."""
        headers = dict(self.headers) if self.headers is not None else None
        given = {"headers": headers, "correlation_id": self.correlation_id}
        return self.options | {name: value for name, value in given.items() if value is not None}

    def command(self, kind: type[PublishCommand]) -> PublishCommand:
        """The same as a broker's command.

        Raises:
            SetupError: the broker's ``publish`` has no option of one of these names.
        """
        try:
            return kind(message=self.body, **self.arguments())
        except TypeError as error:
            raise not_taken(self.options, kind, type(self).__name__, error) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.body!r})"


def ensure_response(result: Any) -> Response:
    """A handler's result as a :class:`Response`."""
    return result if isinstance(result, Response) else Response(result)


class Publication:
    """A publisher inside a broker: the declaration with its prefix, and the way to send."""

    __slots__ = (
        "broker",
        "chain",
        "command",
        "defaults",
        "many",
        "publisher",
        "request",
        "send",
        "spec",
    )

    def __init__(
        self, publisher: Publisher, spec: PublicationSpec, scope: Scope, broker: Broker
    ) -> None:
        self.publisher, self.spec, self.broker, self.chain = publisher, spec, broker, scope.chain
        self.command: type[PublishCommand] = broker.driver.command
        plain = self.command()
        #: The command's fields that the declaration sets.
        self.defaults = {
            name: getattr(spec, name)
            for name in self.command.__struct_fields__
            if hasattr(spec, name) and getattr(spec, name) != getattr(plain, name)
        }
        #: Whether what is published is a list, each item of which is a message.
        self.many: bool = spec.many
        codec, middlewares = spec.codec or scope.codec, (*scope.middlewares, *spec.middlewares)
        self.send: Send = sender(broker, codec, middlewares)
        self.request = Requester(broker, codec, middlewares)
        if broker.probe is not None:
            self.send = broker.probe.sending(publisher, codec, self.send)
            self.request.ask = broker.probe.sending(publisher, codec, self.request.ask)

    def make(self, message: Any, overrides: Mapping[str, Any]) -> PublishCommand:
        """The command for one message; headers are added to the declared ones.

        Raises:
            SetupError: there is no option of one of these names.
        """
        values = {**self.defaults, **overrides}
        declared, given = self.defaults.get("headers"), overrides.get("headers")
        if declared:
            values["headers"] = {**declared, **(given or {})}
        try:
            return self.command(message=message, **values)
        except TypeError as error:
            owner = f"publishing to {self.spec.destination!r}"
            raise not_taken(overrides, self.command, owner, error) from error

    async def all(self, message: Any, overrides: Mapping[str, Any]) -> Sequence[Any]:
        """Publish each item of a list by itself, all at once and in order.

        Raises:
            TypeError: it is no list.
            ExceptionGroup: some failed; the others are published.
        """
        if not isinstance(message, list | tuple):
            raise TypeError(
                f"{self.spec.destination!r} publishes lists, one message for each item; "
                f"this is {type(message).__name__}"
            )
        commands = [self.make(item, overrides) for item in message]
        for command in commands:
            correlate(command)
        return await send_all(self.send, commands)

    async def result(self, message: Message[Any], result: Any) -> None:
        """Publish what a handler returned."""
        overrides = None
        if isinstance(result, Response):
            result, overrides = result.body, result.arguments()
        if self.many:
            await self.all(result, overrides or {})
            return
        if overrides:
            command = self.make(result, overrides)
        else:
            command = self.command(message=result, **self.defaults)
            if command.headers:
                command.headers = dict(command.headers)
        if command.correlation_id is None:
            command.correlation_id = message.known_correlation_id
        await self.send(command)


class Publisher(Spied):
    """A declared publication: a decorator of handlers, and an object to publish with."""

    def __init__(self, spec: PublicationSpec, owner: Endpoints) -> None:
        self.spec = spec
        self.owner = owner
        self.publications: list[Publication] = []

    def __call__(self, handler: Callable[P, R]) -> Handler[P, R]:
        """Publish what ``handler`` returns."""
        from .subscriber import as_handler

        wrapped = as_handler(handler)
        wrapped.publishers.append(self)
        return wrapped

    def publication(self, chain: tuple[int, ...] = ()) -> Publication:
        """This publisher as it is included nearest to a place in the tree of routers.

        Raises:
            NotConnected: its router is in no broker, or the broker is not connected.
        """
        if not self.publications:
            self.owner.root().bind()
        if not self.publications:
            raise NotConnected(
                f"the publisher of {self.spec.destination!r} belongs to no connected broker; "
                "include its router into a broker, and connect or start that broker first"
            )
        return max(self.publications, key=lambda p: _common(p.chain, chain))

    async def publish(self, message: Any = None, *more: Any, **overrides: Any) -> Any:
        """Publish one message; ``overrides`` are arguments of the broker's ``publish``.

        Inside a handler the incoming message's correlation id is kept. Returns the broker's
        receipt. Raises as the broker's ``publish`` does. A publisher with ``batch=True`` takes a
        list, each item of which is a message, or several messages, and returns a list.
        """
        publication = self.publication()
        if publication.many:
            return await publication.all([message, *more] if more else message, overrides)
        if more:
            raise TypeError(
                f"{self.spec.destination!r} takes one message: batch=True takes several"
            )
        command = publication.make(message, overrides)
        correlate(command)
        return await publication.send(command)

    async def request(self, message: Any = None, **overrides: Any) -> Any:
        """Send a request and wait for the answer, as the broker's ``request`` does."""
        response_model = overrides.pop("response_model", None)
        publication = self.publication()
        command = publication.make(message, overrides)
        correlate(command)
        return await publication.request(command, response_model)

    def __repr__(self) -> str:
        return f"<Publisher {self.spec.destination!r}>"


def correlate(command: PublishCommand) -> None:
    if command.correlation_id is None:
        message = current.get()
        if message is not None:
            command.correlation_id = message.known_correlation_id


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
