"""The call plan: a handler's signature, compiled once into a few closures.

Each parameter becomes a constant, a getter, a body (or one of its fields), a dependency,
or a value of a :class:`ParameterSource`. Everything wrong is found here, all of it at once;
what is left to do per message stands in ``runner.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .body import (
    custom_reader,
    element,
    empty_default,
    fields_type,
    reader,
    reading_parts,
    single_reader,
)
from .codec import Codec, converter, show_type
from .context import ContextRepo, follow
from .errors import SetupError, SignatureError, raise_all
from .message import BatchMessage, Message
from .middleware import Call
from .params import MISSING, Bound, Context, Depends, Header, Param, ParameterSource, Path
from .runner import (
    AppValues,
    BodyField,
    Callee,
    Cell,
    Recipe,
    Slot,
    close_all,
    field,
    item,
    runner,
    whole_message,
)
from .signature import hints_of, is_dependency, read_params
from .types import LoggerLike
from .values import guarded, header, of_context, of_message, place

if TYPE_CHECKING:
    from .address import Address
    from .driver import SubscriptionSpec


class Site(msgspec.Struct, kw_only=True):
    """Where a handler stands: all that its plan has to know, resolved."""

    name: str
    where: str
    spec: SubscriptionSpec | None = None
    address: Address | None = None
    codec: Codec
    context: ContextRepo
    logger: LoggerLike | None = None
    #: Values found by their type or by the names ``broker``, ``app``, ``handler_``.
    broker: Any = None
    app: Any = None
    handler: Any = None
    values: AppValues = msgspec.field(default_factory=AppValues)
    sources: Sequence[ParameterSource] = ()
    dependencies: Sequence[Depends] = ()
    overrides: Mapping[Any, Any] = {}
    decoder: Callable[..., Any] | None = None
    inline: bool = False
    hints: Mapping[str, Any] | None = None

    def roots(self) -> dict[str, Any]:
        """The names of the context that never change."""
        return {
            "broker": self.broker,
            "app": self.app,
            "logger": self.logger,
            "context": self.context,
            "handler_": self.handler,
        }


class HandlerModel(msgspec.Struct):
    """What documents say about a handler."""

    name: str
    description: str
    #: The type of a whole body; None if the handler takes none.
    body: Any
    #: Type and default of each field, where several parameters share one body.
    fields: dict[str, tuple[Any, Any]]
    returns: Any


class Plan(msgspec.Struct):
    """A compiled handler."""

    call: Call
    model: HandlerModel
    #: Whether something is left to do after settlement.
    after: Callable[[Message[Any]], Awaitable[None]] | None
    #: Whether any dependency exists that an override could replace.
    has_dependencies: bool
    #: Gives a message's decoded body.
    read: Callable[[Message[Any]], Any]
    #: The same for one item of a batch.
    read_one: Callable[[Message[Any]], Any] | None


class _Compiler:
    """Collects what the parameters of one handler and of its dependencies need."""

    def __init__(self, site: Site, given: Sequence[str] = ()) -> None:
        self.site = site
        #: values[0] is the body; then what the caller gives; then the dependencies.
        self.size = 1
        self.given: dict[str, int] = {}
        for name in given:
            self.given[name] = self._new()
        self.steps: list[tuple[int, Callee, str]] = []
        self.cache: dict[Any, int] = {}
        self.body: dict[str, Param] = {}
        self.has_dependencies = False
        self.errors: list[SetupError] = []
        self.callees: list[Callee] = []

    def _new(self) -> int:
        self.size += 1
        return self.size - 1

    def fail(self, what: str, fix: str, code: str = "MS101") -> Slot:
        """Note what is wrong; the slot keeps the place, so that all else is checked as well."""
        where = f"{self.site.name} ({self.site.where})"
        self.errors.append(SignatureError(what, code=code, where=where, fix=fix))
        return None, None

    def unfilled(self, default: Any, what: str, fix: str, code: str = "MS101") -> Slot:
        """A parameter that nothing fills but its default."""
        return self.fail(what, fix, code) if default is MISSING else (default, None)

    def callee(
        self,
        function: Callable[..., Any],
        *,
        thread: bool,
        hints: Mapping[str, Any] | None = None,
        app: bool = False,
    ) -> Callee:
        params, keyword_only = read_params(function, hints)
        slots: list[Slot] = []
        kwargs: dict[str, Slot] = {}
        for param in params:
            slot = self.slot(param, app)
            if slot is None:
                continue
            if param.name in keyword_only:
                kwargs[param.name] = slot
            else:
                slots.append(slot)
        callee = Callee(function, slots, kwargs, thread)
        self.callees.append(callee)
        return callee

    def slot(self, param: Param, app: bool = False) -> Slot | None:
        """A parameter as (constant, None) or (None, getter)."""
        site = self.site
        if param.name in self.given and not app:
            return None, item(self.given[param.name])
        for marker in reversed(param.markers):
            # First: in a FastAPI application a marker of the context is a dependency as well.
            if isinstance(marker, Context):
                return self.context(marker, param, app)
            if is_dependency(marker):
                return self.depends(marker, param, app)
        constant = self.by_type(param.annotation)
        if constant is not MISSING:
            return constant, None
        if _is_message(param.annotation):
            if app:
                self.fail(
                    f"{param.name!r} wants the message in a dependency of the scope 'app'",
                    "use the scope 'function' or 'message'",
                    "MS106",
                )
            self.check_envelope(param)
            return None, whole_message
        if site.address is not None and param.name in site.address.places and not app:
            return None, place(site.address, param.name, param.annotation)
        for marker in param.markers:
            if type(marker).__module__.partition(".")[0] == "fastapi":
                return self.fail(
                    f"{param.name!r} is marked with {type(marker).__name__} of FastAPI, "
                    "which nobody here fills",
                    "declare the handler on a router of millstream.<broker>.fastapi, "
                    "or use the marker of millstream",
                    "MS105",
                )
        if site.spec is None or app:
            return self.unfilled(
                param.default,
                f"nothing fills the parameter {param.name!r}",
                "give it a default, or mark it with Context(...) or Depends(...)",
            )
        return self.body_param(param)

    def by_type(self, annotation: Any) -> Any:
        """One of the site's own objects, asked for by its class."""
        if not isinstance(annotation, type) or annotation is object:
            return MISSING
        for value in (self.site.broker, self.site.app, self.site.context, self.site.logger):
            try:
                if value is not None and isinstance(value, annotation):
                    return value
            except TypeError:  # a protocol that cannot be checked
                return MISSING
        return MISSING

    def check_envelope(self, param: Param) -> None:
        spec = self.site.spec
        wanted = getattr(param.annotation, "__origin__", param.annotation)
        if spec is None:
            return
        has: type = BatchMessage if spec.batch is not None else spec.envelope
        if not issubclass(has, wanted) and not issubclass(wanted, has):
            self.fail(
                f"{param.name!r} is annotated as {show_type(wanted)}, "
                f"but this source gives {show_type(has)}",
                f"annotate it as {show_type(has)}",
                "MS107",
            )

    def context(self, marker: Context, param: Param, app: bool) -> Slot:
        site = self.site
        name = marker.name or param.name
        default = marker.default if marker.default is not MISSING else param.default
        path = marker.prefix + name
        root, *rest = path.split(".")
        convert = converter(param.annotation) if marker.cast else None
        if isinstance(marker, Header):
            return None, header(name, default, convert, bool(marker.name))
        if isinstance(marker, Path):
            if site.address is not None and name in site.address.places:
                return None, place(site.address, name, param.annotation)
            template = site.address.template if site.address is not None else ""
            return self.unfilled(
                default,
                f"Path({name!r}): there is no {{{name}}} in {template!r}",
                f"write the address with a placeholder, such as orders.{{{name}}}",
                "MS108",
            )
        if root == "message":
            if site.spec is None or app:
                what = f"Context({path!r}): there is no message here"
                return self.unfilled(default, what, "give Context a default", "MS109")
            return None, of_message(rest, path, default, convert) if rest else whole_message
        known = site.roots().get(root)
        if known is None:
            get = of_context(site.context, root, rest, path, marker.initial, site.name)
            return None, guarded(get, default, convert)
        if rest:
            return None, guarded(lambda m, v: follow(known, rest, path), default, convert)
        return known, None

    def depends(self, marker: Any, param: Param | None, app: bool) -> Slot:
        self.has_dependencies = True
        function = marker.dependency
        if function is None and param is not None:
            function = param.annotation
        function = self.site.overrides.get(function, function)
        scope = getattr(marker, "scope", None) or "function"
        thread = bool(getattr(marker, "thread", False))
        if app or scope == "app":
            cell = self.site.values.cell(
                function, lambda: Cell(self.callee(function, thread=False, app=True))
            )
            return None, lambda m, v: cell.value
        if not callable(function):
            return self.fail(
                f"Depends({function!r}): not a callable",
                "give a function, class or callable object",
            )
        if scope == "request":
            scope = "message"
        key = (function, scope)
        if marker.use_cache and key in self.cache:
            return None, item(self.cache[key])
        callee = self.callee(function, thread=thread)
        index = self._new()
        self.steps.append((index, callee, scope))
        if marker.use_cache:
            self.cache[key] = index
        return None, item(index)

    def body_param(self, param: Param) -> Slot:
        known = self.body.setdefault(param.name, param)
        if known.annotation != param.annotation and param.annotation is not Any:
            self.fail(
                f"{param.name!r} is {show_type(known.annotation)} in one place and "
                f"{show_type(param.annotation)} in another",
                "give both the same annotation",
            )
        return None, BodyField(param.name)

    def recipe(self, callee: Callee, body_type: Any, default: Any) -> Recipe:
        """Everything the run needs, once all parameters are known."""
        site = self.site
        custom = site.decoder is not None and body_type is not MISSING
        single = site.spec is None or site.spec.batch is None
        alone = len(callee.template) == 1 and len(self.body) == 1
        return Recipe(
            callee=callee,
            read=(
                None
                if body_type is MISSING
                else custom_reader(site, body_type)
                if custom
                else reader(site, body_type, default)
            ),
            read_waits=custom,
            given=self.given,
            steps=self.steps,
            size=self.size,
            direct=(
                reading_parts(site, body_type, default) if alone and single and not custom else None
            ),
        )

    def bind_body(self) -> None:
        """Once all parameters are known: a whole body, or fields of it."""
        whole = len(self.body) == 1
        for callee in self.callees:
            callee.bind(lambda name: item(0) if whole else field(name))


def _is_message(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", annotation)
    return isinstance(origin, type) and issubclass(origin, Message)


def compile_plan(handler: Callable[..., Any], site: Site) -> Plan:
    """Compile a handler for its site.

    Raises:
        SetupError: one thing is wrong.
        SetupErrors: several are.
    """
    bounds: list[Bound] = []
    given: list[str] = []
    params, _ = read_params(handler, site.hints)
    for source in site.sources:
        bound = source.bind([p for p in params if p.name not in given], site)
        if bound is not None:
            bounds.append(bound)
            given.extend(bound.names)
    compiler = _Compiler(site, given)
    taken = {id(marker) for bound in bounds for marker in bound.dependencies}
    for marker in site.dependencies:
        if id(marker) not in taken:
            compiler.depends(marker, None, False)
    callee = compiler.callee(handler, thread=not site.inline, hints=site.hints)
    if callee.kind in ("generator", "async generator"):
        compiler.fail(
            f"{site.name} is a generator", "return one value, and publish more with a publisher"
        )
    body_type, default, fields = _body_layout(compiler)
    raise_all(compiler.errors)
    recipe = compiler.recipe(callee, body_type, default)
    call = runner(recipe)
    for bound in reversed(bounds):
        call = _around(bound, call)
    afters = [b.after for b in bounds if b.after is not None]
    closes = any(
        scope == "message" and c.kind.endswith("generator") for _, c, scope in compiler.steps
    )
    hints = site.hints if site.hints is not None else hints_of(handler)
    model = HandlerModel(
        name=site.name,
        description=(getattr(handler, "__doc__", None) or "").strip(),
        body=None if body_type is MISSING or fields else body_type,
        fields=fields,
        returns=hints.get("return", Any),
    )
    batch = site.spec is not None and site.spec.batch is not None
    return Plan(
        call,
        model,
        _after(afters, closes),
        compiler.has_dependencies,
        recipe.read or reader(site, Any, MISSING),
        single_reader(site, element(body_type), MISSING)
        if batch and body_type is not MISSING
        else None,
    )


def _body_layout(compiler: _Compiler) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
    body, nothing = compiler.body, (MISSING, MISSING, dict[str, tuple[Any, Any]]())
    compiler.bind_body()
    if not body:
        return nothing
    if len(body) == 1:
        (param,) = body.values()
        return param.declared, param.default, {}
    if compiler.site.spec is not None and compiler.site.spec.batch is not None:
        compiler.fail(
            f"a batch handler has {len(body)} body parameters: {', '.join(body)}",
            "take one list, such as `orders: list[Order]`",
        )
        return nothing
    for param in body.values():
        if param.annotation is bytes:
            compiler.fail(
                f"{param.name!r} wants the whole body as bytes, and so do these: "
                f"{', '.join(name for name in body if name != param.name)}",
                "keep one body parameter, or several that are fields of one object; "
                "mark the rest with Context(...), Header(...), Path(...) or Depends(...)",
            )
            return nothing
    fields = {p.name: (p.declared, p.default) for p in body.values()}
    try:
        return fields_type(body), empty_default(body), fields
    except Exception as error:
        compiler.fail(
            f"the parameters {', '.join(body)} cannot be fields of one object: {error}",
            "annotate each with a type that can be decoded",
        )
        return nothing


def _after(
    afters: Sequence[Callable[[Message[Any]], Awaitable[None]]], closes: bool
) -> Callable[[Message[Any]], Awaitable[None]] | None:
    if not afters and not closes:
        return None

    async def after(message: Message[Any]) -> None:
        for function in afters:
            await function(message)
        closers = getattr(message, "closers", None)
        if closers:
            await close_all(closers, None)

    return after


def _around(bound: Bound, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    around = bound.around

    async def call(message: Message[Any], given: Mapping[str, Any] | None = None) -> Any:
        outer = given or {}
        return await around(message, lambda values: inner(message, {**outer, **values}))

    return call


def compile_function(
    function: Callable[..., Any], site: Site, given: Sequence[str] = ()
) -> Callable[[Any, Mapping[str, Any]], Awaitable[Any]]:
    """A function whose parameters are filled as a handler's are, some given by the caller."""
    compiler = _Compiler(site, given)
    callee = compiler.callee(function, thread=False)
    raise_all(compiler.errors)
    body_type, default, _ = _body_layout(compiler)
    return runner(compiler.recipe(callee, body_type, default))
