"""The call plan: a handler's signature, compiled once into a few closures.

Each parameter becomes a constant, a getter, a body (or one of its fields), a dependency,
or a value of a :class:`ParameterSource`. Everything wrong is found here, all of it at once;
what is left to do per message stands in ``runner.py``.
"""

from __future__ import annotations

import functools
import operator
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
from .codec import Codec, as_decode_error, converter, show_type
from .context import ContextRepo, follow
from .errors import ContextError, DecodeError, SetupError, SetupErrors, SignatureError
from .message import BatchMessage, Message, current
from .middleware import Call
from .params import MISSING, Bound, Context, Depends, Header, Param, ParameterSource, Path
from .runner import (
    AppValues,
    BodyField,
    Callee,
    Cell,
    Getter,
    Recipe,
    Slot,
    close_all,
    field,
    item,
    runner,
    whole_message,
)
from .signature import hints_of, is_dependency, name_of, read_params, where_is
from .types import LoggerLike

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

    def fail(self, what: str, fix: str, code: str = "MS101") -> None:
        self.errors.append(SignatureError(what, code=code, where=self._where(), fix=fix))

    def _where(self) -> str:
        return f"{self.site.name} ({self.site.where})"

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
            return None, self.path(param.name, param.annotation, param.default)
        for marker in param.markers:
            if type(marker).__module__.partition(".")[0] == "fastapi":
                self.fail(
                    f"{param.name!r} is marked with {type(marker).__name__} of FastAPI, "
                    "which nobody here fills",
                    "declare the handler on a router of millstream.<broker>.fastapi, "
                    "or use the marker of millstream",
                    "MS105",
                )
                return None, None
        if site.spec is None or app:
            if param.default is not MISSING:
                return param.default, None
            self.fail(
                f"nothing fills the parameter {param.name!r}",
                "give it a default, or mark it with Context(...) or Depends(...)",
            )
            return None, None
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
            return None, _header(name, default, convert, bool(marker.name))
        if isinstance(marker, Path):
            if site.address is None or name not in site.address.places:
                if default is not MISSING:
                    return default, None
                template = site.address.template if site.address is not None else ""
                self.fail(
                    f"Path({name!r}): there is no {{{name}}} in {template!r}",
                    f"write the address with a placeholder, such as orders.{{{name}}}",
                    "MS108",
                )
                return None, None
            return None, self.path(name, param.annotation, default)
        if root == "message":
            if site.spec is None or app:
                if default is not MISSING:
                    return default, None
                self.fail(
                    f"Context({path!r}): there is no message here",
                    "give Context a default",
                    "MS109",
                )
                return None, None
            return None, _walk(rest, path, default, convert) if rest else whole_message
        roots = site.roots()
        if root in roots and roots[root] is not None:
            if not rest:
                return roots[root], None
            value = roots[root]
            return None, _guarded(lambda m, v: follow(value, rest, path), default, convert)
        repo, initial = site.context, marker.initial
        key = marker.prefix + name

        def get(message: Any, values: list[Any]) -> Any:
            if root not in repo:
                if initial is None:
                    raise ContextError(
                        f"{key!r} is not in the context of {site.name} "
                        f"(context.set_global({root!r}, ...) sets it; or give a default)"
                    )
                repo.set_global(root, initial() if callable(initial) else initial)
            return follow(repo.get(root), rest, key) if rest else repo.get(root)

        return None, _guarded(get, default, convert)

    def path(self, name: str, annotation: Any, default: Any) -> Getter:
        address = self.site.address
        assert address is not None
        find = address.getter(name)
        if annotation is str or annotation is Any:
            return lambda m, v: find(m.destination)
        convert = converter(annotation)
        what = f"the value of {{{name}}}"

        def get(message: Any, values: list[Any]) -> Any:
            try:
                return convert(find(message.destination))
            except Exception as error:
                raise as_decode_error(error, what) from error

        return get

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
            self.fail(
                f"Depends({function!r}): not a callable",
                "give a function, class or callable object",
            )
            return None, None
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


def _guarded(get: Getter, default: Any, convert: Callable[[Any], Any] | None) -> Getter:
    """A getter with a default and a conversion, each only if asked for."""

    def or_default(message: Any, values: list[Any]) -> Any:
        try:
            return get(message, values)
        except ContextError:
            return default

    plain = get if default is MISSING else or_default
    if convert is None:
        return plain
    change = convert

    def converted(message: Any, values: list[Any]) -> Any:
        value = plain(message, values)
        try:
            return change(value)
        except Exception as error:
            raise as_decode_error(error, "a context value") from error

    return converted


def _walk(rest: list[str], path: str, default: Any, convert: Callable[[Any], Any] | None) -> Getter:
    if len(rest) == 1 and default is MISSING and convert is None:
        attribute = operator.attrgetter(rest[0])
        if hasattr(Message, rest[0]):
            return lambda m, v: attribute(m)
    return _guarded(lambda m, v: follow(m, rest, path), default, convert)


def _header(name: str, default: Any, convert: Callable[[Any], Any] | None, exact: bool) -> Getter:
    names = (name,) if exact else tuple(dict.fromkeys((name, name.replace("_", "-"))))
    what = f"the header {name!r}"

    def get(message: Any, values: list[Any]) -> Any:
        headers = message.headers
        for key in names:
            if key in headers:
                break
        else:
            wanted = {key.lower() for key in names}
            key = next((k for k in headers if k.lower() in wanted), "")
            if not key:
                if default is MISSING:
                    raise DecodeError(f"{what} is missing", path=name, expected="a header")
                return default
        if convert is None:
            return headers[key]
        try:
            return convert(headers[key])
        except Exception as error:
            raise as_decode_error(error, what) from error

    return get


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
    _raise(compiler.errors)
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


def _raise(errors: list[SetupError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SetupErrors(errors)


def _body_layout(compiler: _Compiler) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
    body = compiler.body
    compiler.bind_body()
    if not body:
        return MISSING, MISSING, {}
    if len(body) == 1:
        (param,) = body.values()
        return param.declared, param.default, {}
    if compiler.site.spec is not None and compiler.site.spec.batch is not None:
        compiler.fail(
            f"a batch handler has {len(body)} body parameters: {', '.join(body)}",
            "take one list, such as `orders: list[Order]`",
        )
        return MISSING, MISSING, {}
    for param in body.values():
        if param.annotation is bytes:
            compiler.fail(
                f"{param.name!r} wants the whole body as bytes, and so do these: "
                f"{', '.join(name for name in body if name != param.name)}",
                "keep one body parameter, or several that are fields of one object; "
                "mark the rest with Context(...), Header(...), Path(...) or Depends(...)",
            )
            return MISSING, MISSING, {}
    fields = {p.name: (p.declared, p.default) for p in body.values()}
    try:
        return fields_type(body), empty_default(body), fields
    except Exception as error:
        compiler.fail(
            f"the parameters {', '.join(body)} cannot be fields of one object: {error}",
            "annotate each with a type that can be decoded",
        )
        return MISSING, MISSING, {}


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


# Functions that are no handlers


def compile_function(
    function: Callable[..., Any], site: Site, given: Sequence[str] = ()
) -> Callable[[Any, Mapping[str, Any]], Awaitable[Any]]:
    """A function whose parameters are filled as a handler's are, some given by the caller."""
    compiler = _Compiler(site, given)
    callee = compiler.callee(function, thread=False)
    _raise(compiler.errors)
    body_type, default, _ = _body_layout(compiler)
    return runner(compiler.recipe(callee, body_type, default))


def compile_hook(
    function: Callable[..., Any], site: Site
) -> Callable[[Any, BaseException], Awaitable[Any]]:
    """A function called with a message and an exception, which is its first parameter."""
    params, _ = read_params(function)
    if not params:
        bare = compile_function(function, site)
        return lambda message, error: bare(message, {})
    name = params[0].name
    run = compile_function(function, site, (name,))
    return lambda message, error: run(message, {name: error})


async def call_with(function: Callable[..., Any], site: Site, extra: Mapping[str, Any]) -> Any:
    """Call a hook: parameters by name from ``extra``, cast to their annotations; else filled.

    Raises:
        SetupError: a parameter has no value, or a value that does not fit.
    """
    params, _ = read_params(function)
    given: dict[str, Any] = {}
    for param in params:
        if param.name in extra and not any(
            isinstance(m, Context) or is_dependency(m) for m in param.markers
        ):
            try:
                given[param.name] = converter(param.declared)(extra[param.name])
            except Exception as error:
                raise SetupError(
                    f"the option {param.name!r} of {name_of(function)}(): "
                    f"{as_decode_error(error, 'value')}",
                    code="MS112",
                    where=where_is(function),
                ) from error
    run = compile_function(
        function,
        msgspec.structs.replace(site, name=name_of(function), where=where_is(function)),
        tuple(given),
    )
    return await run(current.get(), given)


def apply_types(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Fill the marked parameters of any function: Context, Depends, Logger, the message.

    What the caller gives is cast to its annotation; inside a handler the running message is
    the one that ``Context("message")`` means.
    """
    from .codec import JSON
    from .log import default_logger

    params, _ = read_params(function)

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        message = current.get()
        site = Site(
            name=name_of(function),
            where=where_is(function),
            codec=JSON(),
            context=ContextRepo(),
            logger=default_logger("app"),
        )
        if message is not None and message.link.site is not None:
            site = msgspec.structs.replace(message.link.site, name=site.name, where=site.where)
        named = dict(zip((p.name for p in params), args, strict=False))
        return await call_with(function, site, {**named, **kwargs})

    return call
