"""Routers, prefixes, inclusion, and what declarations inherit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from millstream import AckPolicy, Depends, Message, Retry, SetupError
from millstream.endpoints import Route, RoutePublisher
from millstream.errors import NotConnected, StateError
from millstream.memory import MemoryBroker, MemoryRouter
from millstream.nats import NatsBroker, NatsRouter
from millstream.testing import TestBroker


async def test_prefixes_add_up_and_a_router_may_be_included_twice() -> None:
    got: list[str] = []
    inner = MemoryRouter(prefix="inner.")

    @inner.subscriber("in.{x}")
    @inner.publisher("out")
    async def handler(x: str, message: Message[Any]) -> str:
        got.append(message.destination)
        return x

    outer = MemoryRouter(prefix="outer.", routers=[inner])
    broker = MemoryBroker()
    broker.include_router(outer, prefix="a.")
    broker.include_router(outer, prefix="b.")

    @broker.subscriber(">")
    async def everything(message: Message[Any]) -> None:
        if message.destination.endswith("out"):
            got.append(message.destination)

    async with TestBroker(broker) as running:
        await running.publish("", "a.outer.inner.in.1")
        await running.publish("", "b.outer.inner.in.2")
    assert got == [
        "a.outer.inner.in.1", "a.outer.inner.out", "b.outer.inner.in.2", "b.outer.inner.out"
    ]  # fmt: skip


async def test_what_is_declared_after_inclusion_counts_too() -> None:
    router = MemoryRouter()
    broker = MemoryBroker(routers=[router])
    got: list[int] = []

    @router.subscriber("late")
    async def handler(value: int) -> None:
        got.append(value)

    async with TestBroker(broker) as running:
        await running.publish(1, "late")
    assert got == [1]


async def test_routes_are_subscriptions_with_handlers() -> None:
    async def handler(value: int) -> int:
        return value + 1

    got: list[Any] = []

    async def out(value: int) -> None:
        got.append(value)

    router = MemoryRouter(
        handlers=[Route(handler, "in", publishers=[RoutePublisher("out")]), Route(out, "out")]
    )
    async with TestBroker(MemoryBroker(routers=[router])) as running:
        await running.publish(1, "in")
    assert got == [2]


def test_policies_come_from_the_nearest_place_that_says_them() -> None:
    broker = MemoryBroker(retry=Retry(attempts=9), dead_letter="all.dead")
    router = MemoryRouter(ack_policy=AckPolicy.NACK_ON_ERROR, dead_letter=None)

    @router.subscriber("a", durable="a")
    async def a() -> None: ...

    @router.subscriber("b", durable="b", ack_policy=AckPolicy.ACK, retry=Retry(attempts=2))
    async def b() -> None: ...

    @broker.subscriber("c", durable="c")
    async def c() -> None: ...

    broker.include_router(router)
    broker.compile()
    found = {s.name: s.failing for s in broker.subscriptions}
    assert (found["a"].policy, found["a"].retry.attempts) == (AckPolicy.NACK_ON_ERROR, 9)
    assert found["a"].dead_letter is None
    assert (found["b"].policy, found["b"].retry.attempts) == (AckPolicy.ACK, 2)
    assert found["c"].policy is AckPolicy.RETRY
    assert found["c"].dead_letter is not None
    assert found["c"].dead_letter.destination == "all.dead"


def test_a_router_cannot_contain_itself_or_another_kind() -> None:
    router = MemoryRouter()
    with pytest.raises(SetupError, match="itself"):
        router.include_router(router)
    child = MemoryRouter()
    router.include_router(child)
    with pytest.raises(SetupError, match="itself"):
        child.include_router(router)
    with pytest.raises(SetupError, match="NatsRouter cannot be included into a MemoryBroker"):
        MemoryBroker().include_router(NatsRouter())
    with pytest.raises(SetupError, match="not a router"):
        MemoryBroker().include_router(object())  # type: ignore[arg-type]


def test_an_option_that_a_router_does_not_have() -> None:
    with pytest.raises(SetupError, match="MemoryRouter has no option 'midlewares'") as caught:
        MemoryRouter("a.", midlewares=[])  # type: ignore[call-arg]
    assert caught.value.fix == "did you mean 'middlewares'?" and __file__ in caught.value.where


async def test_a_publisher_of_a_router_that_is_in_no_broker() -> None:
    publisher = MemoryRouter().publisher("out")
    with pytest.raises(StateError, match="include_router"):
        await publisher.publish(1)


async def test_a_publisher_of_a_broker_that_is_not_connected() -> None:
    broker = MemoryBroker()
    with pytest.raises(NotConnected, match="connect or start it first"):
        await broker.publish(1, "out")
    with pytest.raises(NotConnected, match="connect or start"):
        await broker.request(1, "out")
    with pytest.raises(NotConnected):
        await broker.publish_batch(1, 2, subject="out")


async def test_one_handler_on_two_subscriptions_and_publishers() -> None:
    broker = MemoryBroker()
    got: list[Any] = []

    @broker.publisher("out.2")
    @broker.subscriber("in.2")
    @broker.publisher("out.1")
    @broker.subscriber("in.1")
    async def handler(value: int) -> int:
        return value

    @broker.subscriber("out.{n}")
    async def out(value: int, n: int) -> None:
        got.append((n, value))

    async with TestBroker(broker) as running:
        await running.publish(1, "in.1")
        await running.publish(2, "in.2")
    assert sorted(got) == [(1, 1), (1, 2), (2, 1), (2, 2)]


async def test_a_decorated_function_stays_callable() -> None:
    broker = MemoryBroker()

    @broker.subscriber("in")
    async def handler(value: int, twice: int = Depends(lambda: 2)) -> int:
        """Doc."""
        return value * twice

    assert await handler(2, twice=3) == 6
    assert handler.__name__ == "handler"
    assert handler.__doc__ == "Doc."
    assert list(inspect.signature(handler).parameters) == ["value", "twice"]


def test_the_options_are_visible_on_the_method() -> None:
    names = list(inspect.signature(MemoryBroker().subscriber).parameters)
    assert names[:2] == ["subject", "queue"]
    assert {"concurrency", "retry", "ack_policy"} <= set(names)


@pytest.mark.parametrize("what", [42, int])
def test_only_functions_can_be_handlers(what: Any) -> None:
    with pytest.raises(SetupError):
        MemoryBroker().subscriber("in")(what)


def test_an_unknown_option_of_a_broker() -> None:
    with pytest.raises(SetupError, match="'prefx'") as caught:
        MemoryBroker(prefx="a.")  # type: ignore[call-arg]
    assert "'prefix'" in caught.value.fix
    with pytest.raises(SetupError, match="NatsBroker has no option"):
        NatsBroker(prefx="a.")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("log_level", "level of the logger 'millstream'"),
        ("apply_types", "not annotated"),
        ("serializer", "codec="),
        ("id_generator", "correlation_id="),
        ("provider", "dependency_overrides"),
        ("protocol_version", "leave it out"),
    ],
)
def test_an_option_of_other_frameworks_says_what_to_do_instead(option: str, instead: str) -> None:
    options: dict[str, Any] = {option: None}
    with pytest.raises(SetupError, match=f"has no option '{option}'") as caught:
        NatsBroker(**options)
    assert instead in caught.value.fix


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"graceful_timeout": None}, "seconds"),
        ({"publish_timeout": -1}, "seconds"),
        ({"startup_timeout": "30"}, "seconds"),
        ({"retry": True}, "Retry("),
    ],
)
def test_a_wrong_value_for_a_broker_is_told_where_it_stands(
    options: dict[str, Any], fix: str
) -> None:
    with pytest.raises(SetupError, match=next(iter(options))) as caught:
        NatsBroker(**options)
    assert fix in caught.value.fix and __file__ in (caught.value.where or "")


def test_a_retry_that_is_no_retry() -> None:
    with pytest.raises(SetupError, match="retry=True is bool, not Retry or None"):
        NatsBroker().subscriber("in", retry=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"durabel": "a"}, "did you mean 'durable'?"),
        ({"response_model": dict}, "the handler returns what is to be sent"),
        ({"zzz": 1, "persistent": False}, "one of: ack_policy,"),
    ],
)
def test_an_option_that_there_is_not_is_told(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(SetupError, match="has no option") as caught:
        NatsBroker().subscriber("a", **options)
    assert repr(next(iter(options))) in caught.value.what
    assert fix in caught.value.fix
