"""How a handler's parameters are filled, and what is said when they cannot be."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import msgspec
import pydantic
import pytest

from millstream import (
    JSON,
    BaseMiddleware,
    Batch,
    Context,
    ContextRepo,
    Depends,
    Header,
    Logger,
    Message,
    Millstream,
    MsgPack,
    NoCast,
    Path,
    Raw,
    SetupError,
    apply_types,
)
from millstream.errors import ContextError, DecodeError, SetupErrors, SignatureError
from millstream.memory import MemoryBroker, MemoryMessage
from millstream.message import decode_message
from millstream.nats import NatsMessage
from millstream.testing import TestBroker


class Model(pydantic.BaseModel):
    id: int
    amount: float = 0.0


class Item(msgspec.Struct):
    id: int
    amount: float = 0.0


@dataclass
class Data:
    id: int
    model: Model | None = None


class Typed(TypedDict):
    id: int


async def given(
    handler: Any,
    body: Any,
    *,
    to: str = "in",
    address: str = "in",
    headers: Any = None,
    **options: Any,
) -> None:
    """Let a handler have one message."""
    broker = options.pop("broker", None) or MemoryBroker()
    broker.subscriber(address, **options)(handler)
    async with TestBroker(broker) as running:
        await running.publish(body, to, headers=headers)


# Bodies


@pytest.mark.parametrize(
    ("annotation", "body", "expected"),
    [
        (dict, {"id": 1}, {"id": 1}),
        (Item, {"id": 1}, Item(1)),
        (Model, {"id": 1}, Model(id=1)),
        (Data, {"id": 1, "model": {"id": 2}}, Data(1, Model(id=2))),
        (Typed, {"id": 1}, {"id": 1}),
        (list[Model], [{"id": 1}], [Model(id=1)]),
        (Model | None, b"null", None),
        (Model | None, b"", None),
        (int, b"12", 12),
        (str, "text", "text"),
        (bytes, b"\x00\xff", b"\x00\xff"),
        (Any, {"id": 1}, {"id": 1}),
        (Any, "no json", "no json"),
        (Any, b"\xff\xfe", b"\xff\xfe"),
        (Any, b"", None),
        (Annotated[int, msgspec.Meta(gt=3)], b"4", 4),
        (Annotated[int, pydantic.Field(gt=3)], b"4", 4),
    ],
)
async def test_a_body_becomes_its_annotation(annotation: Any, body: Any, expected: Any) -> None:
    got: list[Any] = []

    async def handler(value) -> None:  # type: ignore[no-untyped-def]
        got.append(value)

    handler.__annotations__ = {"value": annotation}
    await given(handler, body)
    assert got == [expected]
    assert type(got[0]) is type(expected)


@pytest.mark.parametrize(
    "annotation", [int, Item, Model, Data, Annotated[int, pydantic.Field(gt=3)]]
)
async def test_a_wrong_body_names_its_place(annotation: Any) -> None:
    async def handler(value) -> None:  # type: ignore[no-untyped-def]
        raise AssertionError("must not run")

    handler.__annotations__ = {"value": annotation}
    with pytest.raises(DecodeError, match="handler") as caught:
        await given(handler, b'"x"')
    assert caught.value.path.startswith("$")
    assert caught.value.expected


async def test_the_path_of_a_wrong_field_is_told() -> None:
    async def handler(value: list[Item]) -> None: ...

    with pytest.raises(DecodeError) as caught:
        await given(handler, [{"id": 1}, {"id": "x"}])
    assert (caught.value.path, caught.value.expected, caught.value.got) == ("$[1].id", "int", "str")


async def test_several_parameters_are_fields_of_one_object() -> None:
    got: list[Any] = []

    async def handler(id: int, model: Model | None = None, *, note: str = "none") -> None:
        got.append((id, model, note))

    await given(handler, {"id": 1, "model": {"id": 2}})
    await given(handler, {"note": "n", "id": 3})
    assert got == [(1, Model(id=2), "none"), (3, None, "n")]


async def test_a_default_stands_for_an_empty_body() -> None:
    got: list[Any] = []

    async def one(value: int = 7) -> None:
        got.append(value)

    async def several(a: int = 1, b: str = "x") -> None:
        got.append((a, b))

    await given(one, b"")
    await given(several, b"")
    assert got == [7, (1, "x")]


async def test_a_handler_needs_no_body() -> None:
    got: list[Any] = []

    async def handler() -> None:
        got.append("called")

    await given(handler, b"anything")
    assert got == ["called"]


async def test_a_plain_function_runs_in_a_thread_or_inline() -> None:
    import threading

    threads: list[bool] = []

    def handler(value: int) -> None:
        threads.append(threading.current_thread() is threading.main_thread())

    await given(handler, 1)
    await given(handler, 1, inline=True)
    assert threads == [False, True]


# Codecs


async def test_a_codec_of_the_broker_and_one_of_a_subscriber() -> None:
    broker = MemoryBroker(codec=MsgPack())
    got: list[Any] = []

    @broker.subscriber("packed")
    async def packed(value: Model, message: Message[Any]) -> None:
        got.append((value, message.content_type))

    @broker.subscriber("raw", codec=Raw())
    async def raw(value: bytes) -> None:
        got.append(msgspec.msgpack.decode(value))

    @broker.subscriber("json", codec=JSON())
    async def plain(value: dict[str, int]) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        await running.publish(Model(id=1), "packed")
        await running.publish({"id": 2}, "raw")
        await running.publish(b'{"id": 3}', "json")
    assert got == [
        (Model(id=1), "application/msgpack"),
        {"id": 2},
        {"id": 3},
    ]


async def test_the_raw_codec_refuses_other_types() -> None:
    async def handler(value: dict[str, int]) -> None: ...

    with pytest.raises(SetupError, match="Raw codec"):
        await given(handler, b"", codec=Raw())


async def test_an_own_decoder_with_the_default_one() -> None:
    got: list[Any] = []

    async def decoder(message: Message[Any], original: Any) -> Any:
        return {**await original(message), "amount": 9.0}

    async def handler(value: Model) -> None:
        got.append(value)

    await given(handler, {"id": 1}, decoder=decoder)
    await given(handler, b"1", decoder=lambda message: {"id": int(message.body)})
    assert got == [Model(id=1, amount=9.0), Model(id=1)]


async def test_an_own_parser_makes_the_message() -> None:
    class Loud(MemoryMessage):
        @property
        def body(self) -> bytes:
            return super().body.upper()

    got: list[Any] = []

    async def parser(raw: Any, original: Any) -> Message[Any]:
        plain = await original(raw)
        return Loud(plain.raw, plain.link)

    async def handler(value: str) -> None:
        got.append(value)

    await given(handler, "loud", parser=parser)
    assert got == ["LOUD"]


async def test_a_message_of_a_users_parser_is_no_longer_open_once_it_is_settled() -> None:
    broker = MemoryBroker()
    got: list[int] = []

    async def parser(raw: Any, original: Any) -> Message[Any]:
        made: Message[Any] = await original(raw)
        return made

    @broker.subscriber("in", durable="d", parser=parser)
    async def handler(value: int) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        await running.publish(1, "in")
        (subscription,) = broker.health()["subscriptions"]
    assert got == [1] and subscription["oldest_unsettled"] is None


# Context, headers, placeholders


async def test_what_a_handler_can_ask_for() -> None:
    broker = MemoryBroker()
    app = Millstream(broker)
    app.context.set_global("settings", {"limit": 3})
    got: dict[str, Any] = {}

    @broker.subscriber("orders.{region}.{id}")
    async def handler(
        body: dict[str, int],
        region: str,
        id: int,
        message: MemoryMessage,
        running: MemoryBroker,
        application: Millstream,
        repo: ContextRepo,
        logger: Logger,
        tenant: Annotated[str, Header()],
        limit: Annotated[int, Context("settings.limit")],
        place: Annotated[str, Path("region")],
        missing: str = Context(default="absent"),
        trace_id: str = Header("x-trace", default="none"),
        destination: str = Context("message.destination"),
        headers: dict[str, str] = Context("message.headers"),
        count: int = Context("counter", initial=0),
    ) -> None:
        got.update(locals())

    async with TestBroker(broker) as test:
        await test.publish({"a": 1}, "orders.eu.12", headers={"tenant": "t"})
    assert got["body"] == {"a": 1}
    assert (got["region"], got["id"], got["place"]) == ("eu", 12, "eu")
    assert isinstance(got["message"], MemoryMessage)
    assert got["running"] is broker
    assert got["application"] is app
    assert got["repo"] is app.context
    assert got["logger"] is broker.logger
    assert (got["tenant"], got["limit"]) == ("t", 3)
    assert (got["missing"], got["trace_id"]) == ("absent", "none")
    assert got["destination"] == "orders.eu.12"
    assert got["headers"]["tenant"] == "t"
    assert got["count"] == 0


async def test_a_header_is_converted_and_found_in_any_spelling() -> None:
    got: list[Any] = []

    async def handler(x_retries: int = Header()) -> None:
        got.append(x_retries)

    await given(handler, b"", headers={"X-Retries": "3"})
    assert got == [3]
    with pytest.raises(DecodeError, match="x_retries"):
        await given(handler, b"", headers={"x-retries": "three"})
    with pytest.raises(DecodeError, match="missing"):
        await given(handler, b"")


async def test_a_placeholder_of_the_wrong_type_is_a_decode_error() -> None:
    async def handler(id: int) -> None: ...

    with pytest.raises(DecodeError, match="id"):
        await given(handler, b"", address="orders.{id}", to="orders.twelve")


async def test_a_name_that_is_not_in_the_context() -> None:
    async def handler(value: str = Context("nowhere.deep")) -> None: ...

    with pytest.raises(ContextError, match="nowhere"):
        await given(handler, b"")


async def test_a_default_of_the_context_is_taken_as_it_is() -> None:
    got: list[Any] = []

    async def handler(
        limit: int = Context("nowhere", default=None, cast=True),
        tries: int = Context("message.headers.tries", default=None, cast=True),
    ) -> None:
        got.append((limit, tries))

    await given(handler, b"")
    await given(handler, b"", headers={"tries": "3"})
    assert got == [(None, None), (None, 3)]


async def test_a_middleware_may_set_local_values() -> None:
    got: list[Any] = []

    class User(BaseMiddleware):
        async def consume_scope(self, call_next: Any, msg: Message[Any]) -> Any:
            with self.context.scope("user", msg.headers["user"]):
                return await call_next(msg)

    async def handler(user: str = Context()) -> None:
        got.append(user)

    await given(handler, b"", headers={"user": "ann"}, middlewares=[User])
    assert got == ["ann"]


async def test_the_logger_given_is_the_one_injected() -> None:
    own = logging.getLogger("own")
    got: list[Any] = []

    async def handler(logger: Logger, plain: logging.Logger) -> None:
        got.append((logger, plain))

    await given(handler, b"", broker=MemoryBroker(logger=own))
    assert got == [(own, own)]


async def test_the_applications_logger_reaches_all_brokers() -> None:
    import structlog

    own = structlog.get_logger("own")
    broker = MemoryBroker()
    Millstream(broker, logger=own)
    got: list[Any] = []

    @broker.subscriber("in")
    async def handler(logger: Logger) -> None:
        got.append(logger)

    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
    assert got == [own]


# Dependencies


async def test_dependencies_nest_are_cached_and_take_what_handlers_take() -> None:
    calls: list[str] = []

    def settings() -> int:
        calls.append("settings")
        return 2

    async def user(message: Message[Any], factor: int = Depends(settings)) -> str:
        calls.append("user")
        return message.headers["user"] * factor

    class Service:
        def __init__(self, factor: int = Depends(settings), name: str = Depends(user)) -> None:
            self.text = f"{name}/{factor}"

    got: list[Any] = []

    async def handler(
        body: dict[str, int], name: str = Depends(user), service: Any = Depends(Service)
    ) -> None:
        got.append((body, name, service.text))

    await given(handler, {"a": 1}, headers={"user": "x"})
    assert got == [({"a": 1}, "xx", "xx/2")]
    assert calls == ["settings", "user"]


async def test_a_dependency_without_cache_is_called_each_time() -> None:
    calls: list[int] = []

    def number() -> int:
        calls.append(1)
        return len(calls)

    got: list[Any] = []

    async def handler(
        a: int = Depends(number, use_cache=False), b: int = Depends(number, use_cache=False)
    ) -> None:
        got.append((a, b))

    await given(handler, b"")
    assert got == [(1, 2)]


async def test_a_dependency_may_read_fields_of_the_body() -> None:
    def double(id: int) -> int:
        return id * 2

    got: list[Any] = []

    async def handler(name: str, twice: int = Depends(double)) -> None:
        got.append((name, twice))

    await given(handler, {"id": 4, "name": "n"})
    assert got == [("n", 8)]


async def test_what_stands_after_a_yield_runs_before_the_result_is_published() -> None:
    order: list[str] = []
    broker = MemoryBroker()

    async def session() -> AsyncIterator[str]:
        order.append("open")
        yield "session"
        order.append("close")

    def kept() -> Iterator[str]:
        order.append("open kept")
        yield "kept"
        order.append("close kept")

    class Publishing(BaseMiddleware):
        async def publish_scope(self, call_next: Any, cmd: Any) -> Any:
            order.append(f"publish {cmd.body}")
            return await call_next(cmd)

    @broker.subscriber("in", durable="d")
    @broker.publisher("out", middlewares=[Publishing])
    async def handler(a: str = Depends(session), b: str = Depends(kept, scope="message")) -> str:
        order.append("handler")
        return a

    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
    assert order == ["open", "open kept", "handler", "close", "publish session", "close kept"]


async def test_a_yield_dependency_sees_the_handlers_exception() -> None:
    seen: list[BaseException] = []

    async def session() -> AsyncIterator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(error)
            raise

    async def handler(a: None = Depends(session)) -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        await given(handler, b"")
    assert [str(e) for e in seen] == ["boom"]


async def test_app_scope_is_made_once_and_closed_at_stop() -> None:
    order: list[str] = []

    async def pool() -> AsyncIterator[object]:
        order.append("open")
        yield object()
        order.append("close")

    def user_of_pool(p: object = Depends(pool, scope="app")) -> object:
        return p

    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in")
    async def handler(
        p: object = Depends(pool, scope="app"), q: object = Depends(user_of_pool)
    ) -> None:
        got.append((p, q))

    async with TestBroker(broker) as running:
        assert order == ["open"]
        await running.publish(b"", "in")
        await running.publish(b"", "in")
    assert order == ["open", "close"]
    assert len({id(x) for pair in got for x in pair}) == 1


async def test_side_effect_dependencies_of_every_level_run_in_order() -> None:
    order: list[str] = []

    def note(name: str) -> Any:
        def dependency() -> None:
            order.append(name)

        return Depends(dependency)

    broker = MemoryBroker(dependencies=[note("broker")])

    @broker.subscriber("in", dependencies=[note("subscriber")])
    async def handler() -> None:
        order.append("handler")

    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
    assert order == ["broker", "subscriber", "handler"]


async def test_an_override_is_noticed_while_the_broker_runs() -> None:
    def real() -> str:
        return "real"

    broker = MemoryBroker()
    got: list[Any] = []

    @broker.subscriber("in")
    async def handler(value: str = Depends(real)) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        await running.publish(b"", "in")
        broker.dependency_overrides[real] = lambda: "fake"
        await running.publish(b"", "in")
        broker.dependency_overrides.clear()
        await running.publish(b"", "in")
    assert got == ["real", "fake", "real"]


async def test_a_foreign_dependency_marker_is_read_by_its_shape() -> None:
    from fastapi import Depends as Foreign

    got: list[Any] = []

    async def handler(value: int = Foreign(lambda: 5)) -> None:
        got.append(value)

    await given(handler, b"")
    assert got == [5]


# Mistakes, found at start


class Plain: ...


def wrong(handler: Any, address: str = "in", **options: Any) -> SetupError:
    broker = MemoryBroker()
    broker.subscriber(address, **options)(handler)
    with pytest.raises(SetupError) as caught:
        broker.compile()
    return caught.value


def test_every_mistake_names_handler_file_and_line_and_a_fix() -> None:
    async def handler(place: str = Path("region")) -> None: ...

    error = wrong(handler)
    assert error.code == "MS108"
    assert "handler" in error.where
    assert "test_parameters.py:" in error.where
    assert "{region}" in error.fix
    assert str(error).count("\n") == 2


def test_a_body_as_bytes_beside_another_body() -> None:
    async def handler(a: bytes, b: Model) -> None: ...

    error = wrong(handler)
    assert "'a'" in error.what
    assert "b" in error.what


def test_a_message_class_of_another_source() -> None:
    async def handler(message: NatsMessage) -> None: ...

    error = wrong(handler)
    assert error.code == "MS107"
    assert "MemoryMessage" in error.fix


def test_a_marker_of_fastapi_in_a_plain_broker() -> None:
    from fastapi import Query

    async def handler(a: int = Query()) -> None: ...

    assert wrong(handler).code == "MS105"


def test_an_annotation_that_cannot_be_resolved() -> None:
    async def handler(a: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    error = wrong(handler)
    assert isinstance(error, SignatureError)
    assert "Unknown" in error.what


def test_an_app_dependency_cannot_want_the_message() -> None:
    def dependency(message: Message[Any]) -> None: ...

    async def handler(a: None = Depends(dependency, scope="app")) -> None: ...

    assert wrong(handler).code == "MS106"


def test_a_class_that_no_body_becomes() -> None:
    async def handler(body: Plain) -> None: ...

    assert "no body can be read as" in wrong(handler).what

    async def many(body: list[Plain]) -> None: ...

    assert "no body can be read as" in wrong(many, batch=Batch()).what


@pytest.mark.parametrize("kind", [int, dict, Model])
def test_a_batch_is_a_list(kind: Any) -> None:
    async def handler(body: kind) -> None: ...  # type: ignore[valid-type]

    handler.__annotations__["body"] = kind
    error = wrong(handler, batch=Batch())
    assert "the body of a batch is a list" in error.what
    assert error.fix == f"annotate it with list[{kind.__name__}]"


async def test_nothing_is_converted_where_that_is_said() -> None:
    broker, got = MemoryBroker(), list[Any]()

    @broker.subscriber("in.{number}")
    async def handler(body: NoCast[Model], number: NoCast[int]) -> None:
        got.append((body, number))

    async with TestBroker(broker) as test:
        await test.publish({"no": "model"}, "in.7")
    assert got == [({"no": "model"}, "7")]


async def test_a_decoder_of_ones_own_may_leave_it_to_the_content_type() -> None:
    broker, got = MemoryBroker(), list[Any]()

    @broker.subscriber("in", decoder=lambda message: [decode_message(message)])
    async def handler(body: Any) -> None:
        got.append(body)

    async with TestBroker(broker) as test:
        for body in ({"a": 1}, "text", b"\xff"):
            await test.publish(body, "in")
    assert got == [[{"a": 1}], ["text"], [b"\xff"]]


def test_a_generator_is_no_handler() -> None:
    async def handler() -> AsyncIterator[int]:
        yield 1

    assert "generator" in wrong(handler).what


def test_all_mistakes_are_told_in_one_go() -> None:
    broker = MemoryBroker()

    @broker.subscriber("a")
    async def first(x: str = Path("no")) -> None: ...

    @broker.subscriber("b.{x")
    async def second() -> None: ...

    @broker.subscriber("c", concurrency=0)
    async def third() -> None: ...

    @broker.subscriber("d", handler_timeout=0.0)
    async def fourth() -> None: ...

    with pytest.raises(SetupErrors) as caught:
        broker.compile()
    assert len(caught.value.errors) == 4
    assert all(name in str(caught.value) for name in ("first", "second", "third", "fourth"))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": -1}, {"wait": -0.1}])
def test_a_batch_that_can_never_be_full(options: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="size is 1 or more, wait in seconds") as caught:
        Batch(**options)
    assert caught.value.code == "MS129"


def test_a_wrong_type_in_a_decorator() -> None:
    broker = MemoryBroker()
    with pytest.raises(SetupError, match="concurrency='two'") as caught:
        broker.subscriber("in", concurrency="two")  # type: ignore[arg-type]
    assert "test_parameters.py:" in caught.value.where


def test_an_unknown_option_of_a_decorator() -> None:
    broker = MemoryBroker()
    with pytest.raises(SetupError, match="colour"):
        broker.subscriber("in", colour="red")  # type: ignore[call-arg]


# Any function


async def test_apply_types_fills_marked_parameters() -> None:
    @apply_types
    async def function(
        a: int, logger: Logger, b: int = Depends(lambda: 2)
    ) -> tuple[int, int, bool]:
        return a, b, hasattr(logger, "info")

    assert await function("1") == (1, 2, True)
    assert await function(a=3) == (3, 2, True)


async def test_apply_types_inside_a_handler_knows_its_message() -> None:
    got: list[Any] = []

    @apply_types
    async def helper(user: str = Context("message.headers.user")) -> str:
        return user

    async def handler() -> None:
        got.append(await helper())

    await given(handler, b"", headers={"user": "ann"})
    assert got == ["ann"]
