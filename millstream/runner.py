"""What runs per message: closures from a message to a handler's result.

From the cheapest, a body and nothing else, to the most general, with dependencies that are
opened before the handler and closed after it.
"""

from __future__ import annotations

import asyncio
import functools
import operator
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from .message import Message
from .signature import is_async, is_async_generator, is_generator

#: Gives a parameter's value from the message and the values found so far.
Getter = Callable[[Any, list[Any]], Any]
#: A parameter: a constant, or None and its getter.
Slot = tuple[Any, Getter | None]


def item(index: int) -> Getter:
    """A getter of one of the values found so far."""
    return lambda m, v: v[index]


def field(name: str) -> Getter:
    attribute = operator.attrgetter(name)
    return lambda m, v: attribute(v[0])


def whole_message(message: Any, values: list[Any]) -> Any:
    return message


_NO_KEYWORDS: dict[str, Any] = {}


class BodyField:
    """Stands for a body parameter until it is known whether others share the body."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, message: Any, values: list[Any]) -> Any:
        raise AssertionError(f"the body parameter {self.name} was not bound")


class Callee:
    """A function with the getters of its arguments."""

    __slots__ = ("dynamic", "function", "kind", "kwargs", "run", "template", "waits")

    def __init__(
        self,
        function: Callable[..., Any],
        slots: Sequence[Slot],
        kwargs: dict[str, Slot],
        thread: bool,
    ) -> None:
        self.function = self.run = function
        self.template = [constant for constant, _ in slots]
        self.dynamic = [(i, getter) for i, (_, getter) in enumerate(slots) if getter is not None]
        self.kwargs = kwargs
        #: What a call gives: a value, or a generator that yields it.
        self.kind = (
            "async generator"
            if is_async_generator(function)
            else "generator"
            if is_generator(function)
            else "value"
        )
        #: Whether the call has to be awaited.
        self.waits = is_async(function)
        if thread and self.kind == "value" and not self.waits:
            self.run, self.waits = functools.partial(asyncio.to_thread, function), True

    def bind(self, getter_of: Callable[[str], Getter]) -> None:
        """Replace the placeholders of body parameters."""
        self.dynamic = [
            (i, getter_of(g.name) if isinstance(g, BodyField) else g) for i, g in self.dynamic
        ]
        self.kwargs = {
            name: (c, getter_of(g.name) if isinstance(g, BodyField) else g)
            for name, (c, g) in self.kwargs.items()
        }

    def arguments(self, message: Any, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        args = self.template
        if self.dynamic:
            args = args.copy()
            for i, getter in self.dynamic:
                args[i] = getter(message, values)
        if not self.kwargs:
            return args, _NO_KEYWORDS
        return args, {
            name: constant if getter is None else getter(message, values)
            for name, (constant, getter) in self.kwargs.items()
        }


class AppValues:
    """Dependencies of the scope ``app``: made once at start, closed at stop."""

    def __init__(self) -> None:
        self._cells: dict[Any, Cell] = {}

    def cell(self, dependency: Any, make: Callable[[], Cell]) -> Cell:
        if dependency not in self._cells:
            self._cells[dependency] = make()
        return self._cells[dependency]

    async def open(self, stack: AsyncExitStack) -> None:
        """Make all values, those that others need first."""
        for cell in self._cells.values():
            if not cell.ready:
                await cell.open(stack)


class Cell:
    def __init__(self, callee: Callee) -> None:
        self.callee, self.value, self.ready = callee, None, False

    async def open(self, stack: AsyncExitStack) -> None:
        callee = self.callee
        args, kwargs = callee.arguments(None, [])
        made: Any = callee.run(*args, **kwargs)
        if callee.waits:
            made = await made
        elif callee.kind == "async generator":
            generator, made = made, await anext(made)
            stack.push_async_callback(finish_async, generator, None)
        elif callee.kind == "generator":
            generator, made = made, next(made)
            stack.callback(finish, generator, None)
        self.value, self.ready = made, True
        stack.callback(self._forget)

    def _forget(self) -> None:
        self.value, self.ready = None, False


async def finish_async(generator: AsyncGenerator[Any, None], error: BaseException | None) -> None:
    try:
        if error is None:
            await anext(generator)
        else:
            await generator.athrow(error)
    except StopAsyncIteration:
        return
    except BaseException as raised:
        if raised is error:
            return
        raise
    raise RuntimeError(f"the dependency {generator!r} yields more than once")


def finish(generator: Generator[Any, None, None], error: BaseException | None) -> None:
    try:
        if error is None:
            next(generator)
        else:
            generator.throw(error)
    except StopIteration:
        return
    except BaseException as raised:
        if raised is error:
            return
        raise
    raise RuntimeError(f"the dependency {generator!r} yields more than once")


async def close_all(closers: list[Any], error: BaseException | None) -> None:
    """Run what stands behind the yields, the last opened first."""
    while closers:
        generator = closers.pop()
        try:
            if hasattr(generator, "__anext__"):
                await finish_async(generator, error)
            else:
                finish(generator, error)
        except BaseException as raised:
            await close_all(closers, raised)
            raise


class Recipe(msgspec.Struct):
    """All that a handler's parameters need, in the order of the work."""

    callee: Callee
    #: Gives the decoded body; None if nobody asks for it.
    read: Callable[[Any], Any] | None
    #: Whether ``read`` has to be awaited.
    read_waits: bool
    #: Names that the caller gives → their index among the values.
    given: Mapping[str, int]
    #: Dependencies: index of the value, what to call, scope.
    steps: Sequence[tuple[int, Callee, str]]
    #: How many values there are; the first is the body.
    size: int
    #: Decoder and fallback, where the handler takes the whole body and nothing else.
    direct: tuple[Callable[[bytes], Any], Callable[[Any, Exception], Any]] | None


def runner(recipe: Recipe) -> Callable[..., Awaitable[Any]]:
    """The closure that turns a message (and what the caller gives) into the handler's result."""
    callee, read, steps = recipe.callee, recipe.read, recipe.steps
    if callee.waits and not (steps or recipe.given or callee.kwargs or recipe.read_waits):
        return _flat(callee, read) if recipe.direct is None else _direct(callee.run, *recipe.direct)
    if any(step.kind.endswith("generator") for _, step, _ in steps):
        return _managed(recipe)
    return _stepwise(recipe)


Given = Mapping[str, Any] | None


def _direct(
    function: Callable[..., Any],
    decode: Callable[[bytes], Any],
    recover: Callable[[Any, Exception], Any],
) -> Callable[..., Awaitable[Any]]:
    async def call(message: Message[Any], given: Given = None) -> Any:
        try:
            value = decode(message.body)
        except Exception as error:
            value = recover(message, error)
        return await function(value)

    return call


def _flat(callee: Callee, read: Callable[[Any], Any] | None) -> Callable[..., Awaitable[Any]]:
    function, template, dynamic = callee.run, callee.template, callee.dynamic

    async def call(message: Message[Any], given: Given = None) -> Any:
        values = [read(message)] if read is not None else []
        args = template.copy()
        for i, getter in dynamic:
            args[i] = getter(message, values)
        return await function(*args)

    return call


def _begin(recipe: Recipe, given: Mapping[str, Any]) -> list[Any]:
    """The values before anything is decoded: those that the caller gives."""
    values: list[Any] = [None] * recipe.size
    for name, i in recipe.given.items():
        values[i] = given[name]
    return values


def _stepwise(recipe: Recipe) -> Callable[..., Awaitable[Any]]:
    """With dependencies, none of which has to be closed."""
    size, read, read_waits = recipe.size, recipe.read, recipe.read_waits
    steps = [(i, step.arguments, step.run, step.waits) for i, step, _ in recipe.steps]
    arguments, function, waits = recipe.callee.arguments, recipe.callee.run, recipe.callee.waits

    async def call(message: Message[Any], given: Given = None) -> Any:
        values: list[Any] = _begin(recipe, given) if given else [None] * size
        if read is not None:
            value = read(message)
            values[0] = await value if read_waits else value
        for i, arguments_of, dependency, pending in steps:
            args, kwargs = arguments_of(message, values)
            value = dependency(*args, **kwargs)
            values[i] = await value if pending else value
        args, kwargs = arguments(message, values)
        result = function(*args, **kwargs)
        return await result if waits else result

    return call


def _managed(recipe: Recipe) -> Callable[..., Awaitable[Any]]:
    """With dependencies that yield: closed when the handler returned, or after settlement."""
    size, read, read_waits = recipe.size, recipe.read, recipe.read_waits
    arguments, function, waits = recipe.callee.arguments, recipe.callee.run, recipe.callee.waits

    async def call(message: Message[Any], given: Given = None) -> Any:
        values: list[Any] = _begin(recipe, given) if given else [None] * size
        if read is not None:
            value = read(message)
            values[0] = await value if read_waits else value
        closers: list[Any] = []
        kept: list[Any] = []
        try:
            for i, step, scope in recipe.steps:
                args, kwargs = step.arguments(message, values)
                made: Any = step.run(*args, **kwargs)
                if step.waits:
                    made = await made
                elif step.kind != "value":
                    generator = made
                    made = await anext(made) if step.kind == "async generator" else next(made)
                    (kept if scope == "message" else closers).append(generator)
                values[i] = made
            args, kwargs = arguments(message, values)
            result = function(*args, **kwargs)
            if waits:
                result = await result
        except BaseException as error:
            await close_all(closers, error)
            await close_all(kept, error)
            raise
        await close_all(closers, None)
        if kept:
            message.closers = kept
        return result

    return call
