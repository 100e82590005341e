"""An ``APIRouter`` that owns a broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast

from fastapi import APIRouter
from fastapi.routing import APIRoute

from ..broker import Broker
from ..driver import PublicationSpec, SubscriptionSpec
from ..endpoints import Endpoints, Router
from ..errors import SetupError
from ..publisher import Publisher
from ..subscriber import Subscriber
from .markers import as_endpoint, router_of
from .streams import Lifespan, Part, PartOptions

F = TypeVar("F", bound=Callable[..., Any])
B = TypeVar("B", bound=Broker)


class RouterOptions(PartOptions, total=False):
    """What a router with a broker takes besides the broker's options: those of ``APIRouter``.

    ``prefix``, ``tags`` and ``dependencies`` belong to the HTTP side. ``broker`` is one that is
    there already.
    """

    broker: Broker
    default_response_class: Any
    responses: Any
    callbacks: Any
    routes: Any
    redirect_slashes: bool
    default: Any
    dependency_overrides_provider: Any
    route_class: Any
    on_startup: Any
    on_shutdown: Any
    lifespan: Any
    deprecated: bool | None
    include_in_schema: bool
    generate_unique_id_function: Any


_HTTP = {*RouterOptions.__annotations__, "prefix", "tags", "dependencies"} - {"broker"}


class StreamRouter(APIRouter, Generic[B]):
    """An ``APIRouter`` that owns a broker; each broker's package has its own subclass.

    A subclass names the classes of its broker and of that one's plain router, what a subscriber
    and a publisher can be told, and how the broker's address is called.

    Subscribers and publishers are declared on it as on a broker, endpoints as on any
    ``APIRouter``, and one function may be all of that at once. A router without arguments for
    a broker shares the broker of the router that includes it.

    Args:
        address: the broker's; its only positional argument.
        broker: a broker that is there already, instead of an address and options for one.
        options: options of the broker, of ``APIRouter`` (``prefix``, ``tags``,
            ``dependencies`` … mean its own) and of :class:`Part`.

    Raises:
        SetupError: both a broker and what makes one are given.
    """

    broker_class: ClassVar[Any]
    router_class: ClassVar[type[Router]]

    def __init__(
        self, address: Any = None, *, broker: Broker | None = None, **options: Any
    ) -> None:
        names = PartOptions.__annotations__
        part = {name: options.pop(name) for name in list(options) if name in names}
        http = {name: options.pop(name) for name in list(options) if name in _HTTP}
        arguments = () if address is None else (address,)
        if broker is not None and (arguments or options):
            given = ", ".join([*map(repr, arguments), *options])
            raise SetupError(
                f"{type(self).__name__}(broker=...) with {given}",
                code="MS133",
                fix="give either a broker or what makes one",
            )
        self._part = Part(lambda: self.broker, **part)
        self._parts = [self._part]
        self._inner: Any = None
        self._host: StreamRouter[Any] | None = None
        self._broker: Broker | None = None
        #: What is declared here; part of the broker, whichever that will be.
        self.declared = self.router_class()
        super().__init__(**{"route_class": _StreamRoute, **http})
        if broker is not None or arguments or options:
            self._own(broker or self.broker_class(*arguments, **options))

    def _own(self, broker: Broker) -> Broker:
        self._broker = broker
        broker.include_router(self.declared)
        return broker

    @property
    def broker(self) -> B:
        """The broker; one without arguments is made on first use."""
        if self._host is not None:
            return cast(B, self._host.broker)
        return cast(B, self._broker or self._own(self.broker_class()))

    @property
    def lifespan_context(self) -> Any:
        """For ``FastAPI(lifespan=router.lifespan_context)``; included, it needs no mention."""
        return Lifespan(self._inner, self._parts)

    @lifespan_context.setter
    def lifespan_context(self, inner: Any) -> None:
        if isinstance(inner, Lifespan):
            self._parts = list(dict.fromkeys([*self._parts, *inner.parts]))
            inner = inner.inner
        self._inner = inner

    def _subscribe(self, spec: SubscriptionSpec, /) -> Subscriber:
        return self.declared._subscribe(spec)

    def _produce(self, spec: PublicationSpec, /) -> Publisher:
        return self.declared._produce(spec)

    def include_router(self, router: Any, *args: Any, **kwargs: Any) -> None:
        """Include a broker's router, another router with a broker, or an ``APIRouter``.

        Args:
            router: a broker's plain router takes ``prefix``, ``dependencies`` and
                ``middlewares`` as on a broker; others what ``APIRouter`` takes.
            args: as above.
            kwargs: as above.
        """
        if isinstance(router, Endpoints):
            self.declared.include_router(router, *args, **kwargs)
            return
        if isinstance(router, StreamRouter) and router._homeless(self):
            router._host = self
            self.declared.include_router(router.declared)
        super().include_router(router, *args, **kwargs)

    def _homeless(self, host: StreamRouter[Any]) -> bool:
        alone = self._broker is None and self._host is None
        return alone and self.broker_class is host.broker_class

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        """As ``APIRouter.add_api_route``; the endpoint may ask for what handlers may."""
        super().add_api_route(path, as_endpoint(endpoint, self), **kwargs)

    def after_startup(self, hook: F) -> F:
        """Call ``hook(app)`` when messages are taken; a mapping it returns joins the state."""
        self._part.after_startup.append(hook)
        return hook

    def on_broker_shutdown(self, hook: F) -> F:
        """Call ``hook(app)`` before the broker drains."""
        self._part.on_shutdown.append(hook)
        return hook


class _StreamRoute(APIRoute):
    """An HTTP endpoint of a router with a broker: tells once if that was never started."""

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        router = router_of(self.endpoint)
        if router is not None:
            router._part.warn_if_new(f"asked for {scope.get('path')!r}")
        await super().handle(scope, receive, send)
