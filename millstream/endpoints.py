"""The surface where handlers and publishers are declared, shared by brokers and routers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

import msgspec

from .ack import AckPolicy
from .checks import caller, check_types, known_options, not_taken
from .codec import JSON, Codec
from .driver import PublicationSpec, PublishCommand, SubscriptionSpec
from .errors import SetupError, StateError
from .params import Depends
from .publisher import Publisher
from .retry import DeadLetter, Retry
from .subscriber import Subscriber

if TYPE_CHECKING:
    from .broker import Broker

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class Method(Generic[P, R_co]):
    """A method whose signature is that of an options class, written nowhere else.

    Args:
        options: the class.
        build: makes a value of it from a user's arguments.
        use: the name of the method that gets the value.
    """

    def __init__(self, options: Callable[P, Any], build: Callable[..., Any], use: str) -> None:
        self.options, self.build, self.use = options, build, use

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type) -> Self: ...
    @overload
    def __get__(self, obj: Any, owner: type) -> Callable[P, R_co]: ...
    def __get__(self, obj: Any, owner: type) -> Any:
        if obj is None:
            return self
        build, use = self.build, getattr(obj, self.use)
        name = f"{type(obj).__qualname__}.{self.name}"

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                value = build(*args, **kwargs)
            except TypeError as error:
                raise not_taken(kwargs, self.options, name, error) from error
            return use(value)

        call.__name__, call.__qualname__ = self.name, name
        call.__doc__ = self.options.__doc__
        call.__wrapped__ = self.options  # type: ignore[attr-defined]  # inspect finds the signature
        if getattr(type(obj), self.name) is self:  # a subclass may have a method of its own
            obj.__dict__[self.name] = call  # found before this descriptor from now on
        return call


def declares(options: Callable[P, SubscriptionSpec]) -> Method[P, Subscriber]:
    """``subscriber = declares(Spec)``: takes the Spec's arguments, gives a Subscriber."""
    return Method(options, functools.partial(make, options), "_subscribe")


def produces(options: Callable[P, PublicationSpec]) -> Method[P, Publisher]:
    """``publisher = produces(Spec)``: takes the Spec's arguments, gives a Publisher."""
    return Method(options, functools.partial(make, options), "_produce")


def sends(command: Callable[P, PublishCommand]) -> Method[P, Coroutine[Any, Any, Any]]:
    """``publish = sends(Command)``: takes the command's arguments and publishes it."""
    return Method(command, command, "_publish")


def asks(command: Callable[P, PublishCommand]) -> Method[P, Coroutine[Any, Any, Any]]:
    """``request = asks(Command)``: takes the command's arguments and waits for the answer."""
    return Method(command, command, "_request")


def make(options: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """An options value from a user's arguments, whose types are checked.

    Raises:
        SetupError: an argument is of the wrong type.
        TypeError: one is unknown or missing.
    """
    try:
        spec = options(*args, **kwargs)
    except SetupError as error:
        error.where = error.where or caller()
        raise
    check_types(spec, getattr(options, "__name__", str(options)))
    return spec


class EndpointsOptions(TypedDict, total=False):
    """What holds for all that is declared on a broker or router and does not say otherwise.

    Keys:
        codec: how bodies are written; JSON by default.
        ack_policy: when a message counts as handled.
        retry: what an error leads to.
        dead_letter: where messages go that cannot be handled.
        middlewares: outside those of routers and subscribers.
        dependencies: run before every handler.
        routers: included at once.
        parser: as of a subscription.
        decoder: the same.
    """

    codec: Codec | None
    ack_policy: AckPolicy | None
    retry: Retry | None
    dead_letter: DeadLetter | str | None
    middlewares: Sequence[Any]
    dependencies: Sequence[Depends]
    routers: Sequence[Endpoints]
    parser: Callable[..., Any] | None
    decoder: Callable[..., Any] | None


class Scope(msgspec.Struct, frozen=True):
    """What a declaration inherits from the broker and the routers it stands in."""

    codec: Codec
    prefix: str = ""
    ack_policy: AckPolicy | None = None
    retry: Retry | None = None
    dead_letter: DeadLetter | str | msgspec.UnsetType | None = msgspec.UNSET
    middlewares: tuple[Any, ...] = ()
    dependencies: tuple[Depends, ...] = ()
    parser: Callable[..., Any] | None = None
    decoder: Callable[..., Any] | None = None
    include_in_schema: bool = True
    #: The ids of the inclusions that lead here, from the broker down.
    chain: tuple[int, ...] = ()


class Inclusion(msgspec.Struct):
    """A router inside another, with what the inclusion adds."""

    router: Endpoints
    prefix: str = ""
    dependencies: Sequence[Depends] = ()
    middlewares: Sequence[Any] = ()
    include_in_schema: bool | None = None


class Endpoints:
    """Declarations in order: subscribers, publishers and included routers."""

    def __init__(
        self,
        *,
        prefix: str = "",
        include_in_schema: bool | None = None,
        **options: Unpack[EndpointsOptions],
    ) -> None:
        known_options(options, EndpointsOptions, type(self).__name__)
        self.prefix, self.codec = prefix, options.get("codec")
        self.ack_policy, self.retry = options.get("ack_policy"), options.get("retry")
        if not isinstance(self.retry, Retry | None):
            raise SetupError(
                f"{type(self).__name__}: retry={self.retry!r}",
                code="MS121",
                where=caller(),
                fix="Retry(attempts=...)",
            )
        self.dead_letter = options.get("dead_letter", msgspec.UNSET)
        self.middlewares: list[Any] = list(options.get("middlewares", ()))
        self.dependencies = tuple(options.get("dependencies", ()))
        self.parser, self.decoder = options.get("parser"), options.get("decoder")
        self.include_in_schema = include_in_schema
        self.subscribers: list[Subscriber] = []
        self.publishers: list[Publisher] = []
        self.inclusions: list[Inclusion] = []
        self.parents: list[Endpoints] = []
        self.include_routers(*options.get("routers", ()))

    def _subscribe(self, spec: SubscriptionSpec, /) -> Subscriber:
        subscriber = Subscriber(spec, self)
        self.subscribers.append(subscriber)
        return subscriber

    def _produce(self, spec: PublicationSpec, /) -> Publisher:
        publisher = Publisher(spec, self)
        self.publishers.append(publisher)
        return publisher

    def include_router(
        self,
        router: Endpoints,
        *,
        prefix: str = "",
        dependencies: Sequence[Depends] = (),
        middlewares: Sequence[Any] = (),
        include_in_schema: bool | None = None,
    ) -> None:
        """Take over the declarations of a router, those it gets later included.

        Raises:
            SetupError: the router is of another broker's kind, or contains this one.
        """
        if not isinstance(router, Endpoints):
            raise SetupError(f"{router!r} is not a router", code="MS122", where=caller())
        if router is self or any(e is self for e in router.tree()):
            raise SetupError("a router cannot contain itself", code="MS123", where=caller())
        if family_of(router) is not family_of(self):
            raise SetupError(
                f"a {type(router).__name__} cannot be included into a {type(self).__name__}",
                code="MS124",
                where=caller(),
                fix="use the router class of the same broker",
            )
        self.inclusions.append(
            Inclusion(router, prefix, dependencies, middlewares, include_in_schema)
        )
        router.parents.append(self)

    def include_routers(self, *routers: Endpoints) -> None:
        """Take over the declarations of several routers."""
        for router in routers:
            self.include_router(router)

    def add_middleware(self, middleware: Any) -> None:
        """Add a middleware inside those that are there."""
        self._changeable()
        self.middlewares.append(middleware)

    def insert_middleware(self, middleware: Any) -> None:
        """Add a middleware outside those that are there."""
        self._changeable()
        self.middlewares.insert(0, middleware)

    def _changeable(self) -> None:
        for parent in self.parents:
            parent._changeable()

    def tree(self) -> Iterator[Endpoints]:
        """This and all included routers."""
        yield self
        for inclusion in self.inclusions:
            yield from inclusion.router.tree()

    def root(self) -> Broker:
        """The broker that this belongs to.

        Raises:
            StateError: it is included nowhere.
        """
        for parent in self.parents:
            return parent.root()
        raise StateError(
            f"this {type(self).__name__} is not part of a broker; "
            "include it with broker.include_router(router)",
            wanted="included",
        )

    def inherited(self, scope: Scope) -> Scope:
        """The scope inside this router."""
        return msgspec.structs.replace(
            scope,
            codec=self.codec or scope.codec,
            prefix=scope.prefix + self.prefix,
            ack_policy=self.ack_policy or scope.ack_policy,
            retry=self.retry or scope.retry,
            dead_letter=scope.dead_letter
            if self.dead_letter is msgspec.UNSET
            else self.dead_letter,
            middlewares=(*scope.middlewares, *self.middlewares),
            dependencies=(*scope.dependencies, *self.dependencies),
            parser=self.parser or scope.parser,
            decoder=self.decoder or scope.decoder,
            include_in_schema=scope.include_in_schema
            if self.include_in_schema is None
            else self.include_in_schema,
        )

    def walk(self, scope: Scope) -> Iterator[tuple[Subscriber | Publisher, Scope]]:
        """All declarations with the scopes they stand in."""
        scope = self.inherited(scope)
        for publisher in self.publishers:
            yield publisher, scope
        for subscriber in self.subscribers:
            yield subscriber, scope
        for inclusion in self.inclusions:
            show = inclusion.include_in_schema
            yield from inclusion.router.walk(
                msgspec.structs.replace(
                    scope,
                    prefix=scope.prefix + inclusion.prefix,
                    dependencies=(*scope.dependencies, *inclusion.dependencies),
                    middlewares=(*scope.middlewares, *inclusion.middlewares),
                    include_in_schema=scope.include_in_schema if show is None else show,
                    chain=(*scope.chain, id(inclusion)),
                )
            )


def family_of(endpoints: Endpoints) -> type:
    """The class that says which broker's declarations these are."""
    for kind in type(endpoints).__mro__:
        if "subscriber" in vars(kind):
            return kind
    return Endpoints


def default_scope(codec: Codec | None) -> Scope:
    """The scope outside everything."""
    return Scope(codec=codec or JSON())


class Route:
    """A subscription with its handler, for ``Router(handlers=[...])``.

    Args:
        call: the handler.
        args: the positional arguments of ``router.subscriber``.
        publishers: arguments of ``router.publisher``, as :class:`RoutePublisher` values.
        options: the keyword arguments of ``router.subscriber``.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        *args: Any,
        publishers: Sequence[RoutePublisher] = (),
        **options: Any,
    ) -> None:
        self.call, self.args, self.publishers, self.options = call, args, publishers, options


class RoutePublisher:
    """The arguments of ``router.publisher``, to be declared with a :class:`Route`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


class Router(Endpoints):
    """Declarations to be included into a broker or another router.

    Args:
        prefix: put before every address.
        handlers: routes declared at once.
        include_in_schema: whether documents show what is declared here.
        options: see :class:`EndpointsOptions`.
    """

    def __init__(
        self,
        prefix: str = "",
        handlers: Sequence[Route] = (),
        *,
        include_in_schema: bool | None = None,
        **options: Unpack[EndpointsOptions],
    ) -> None:
        super().__init__(prefix=prefix, include_in_schema=include_in_schema, **options)
        declare: Any = self  # a broker's own router has `subscriber` and `publisher`
        for route in handlers:
            call = route.call
            for publisher in route.publishers:
                call = declare.publisher(*publisher.args, **publisher.options)(call)
            declare.subscriber(*route.args, **route.options)(call)
