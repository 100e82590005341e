"""How messages arrive: bodies, headers, addresses, groups, order, concurrency, batches."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pydantic
import pytest

from millstream import Context, Header, Path, Response
from millstream.driver import Batch, Capability
from millstream.message import Message
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs


class Struct(msgspec.Struct):
    id: int
    name: str = "n"


class Model(pydantic.BaseModel):
    id: int
    name: str = "n"


@dataclass
class Record:
    id: int
    name: str = "n"


@pytest.mark.parametrize(
    ("type_", "sent", "expected"),
    [
        (dict, {"a": [1, None, "ü"]}, {"a": [1, None, "ü"]}),
        (list[int], [1, 2, 3], [1, 2, 3]),
        (int, 7, 7),
        (str, "grüße", "grüße"),
        (bytes, b"\x00\xff raw", b"\x00\xff raw"),
        (bytes, b"", b""),
        (Struct, Struct(1), Struct(1)),
        (Struct, {"id": 1}, Struct(1)),
        (Model, Model(id=1), Model(id=1)),
        (Record, Record(1), Record(1)),
        (Model, Struct(1), Model(id=1)),
        (Any, {"a": 1}, {"a": 1}),
        (Any, "text", "text"),
        (str | None, None, None),
    ],
    ids=repr,
)
async def test_a_body_of_any_kind_arrives_as_its_type(
    bench: Bench, type_: Any, sent: Any, expected: Any
) -> None:
    got: list[Any] = []

    async def handler(body: Any) -> None:
        got.append(body)

    handler.__annotations__["body"] = type_
    bench.subscriber(bench.address("bodies"))(handler)
    await bench.start()
    await bench.broker.publish(sent, bench.address("bodies"))
    await bench.until(lambda: got)
    assert got == [expected]
    assert type(got[0]) is type(expected)


async def test_several_parameters_are_fields_of_one_object(bench: Bench) -> None:
    got: list[Any] = []

    @bench.subscriber(bench.address("fields"))
    async def handler(id: int, name: str = "none") -> None:
        got.append((id, name))

    await bench.start()
    await bench.broker.publish({"id": 1, "name": "a"}, bench.address("fields"))
    await bench.broker.publish({"id": 2}, bench.address("fields"))
    await bench.until(lambda: len(got) == 2)
    assert got == [(1, "a"), (2, "none")]


@needs(Capability.HEADERS)
async def test_headers_and_ids_make_the_round_trip(bench: Bench) -> None:
    got: list[Any] = []

    @bench.subscriber(bench.address("headers"))
    async def handler(
        body: str,
        message: Message[Any],
        tenant: Annotated[str, Header()],
        count: Annotated[int, Header("x-count")],
        other: Annotated[str, Header()] = "none",
    ) -> None:
        got.append((tenant, count, other, message.correlation_id, message.content_type))

    await bench.start()
    await bench.broker.publish(
        "hello",
        bench.address("headers"),
        headers={"tenant": "acme", "x-count": "3"},
        correlation_id="c-1",
    )
    await bench.until(lambda: got)
    assert got == [("acme", 3, "none", "c-1", "text/plain")]


@needs(Capability.NOTHING, "patterns")
async def test_placeholders_and_wildcards(bench: Bench) -> None:
    got: list[Any] = []

    @bench.subscriber(bench.address("orders", "{region}", "{number}"))
    async def handler(
        body: str, region: str, number: int, also: Annotated[str, Path("region")]
    ) -> None:
        got.append((body, region, number, also))

    await bench.start()
    await bench.broker.publish("a", bench.address("orders", "eu", "17"))
    await bench.broker.publish("no", bench.address("orders", "eu"))
    await bench.broker.publish("no", bench.address("others", "eu", "1"))
    await bench.broker.publish("b", bench.address("orders", "us", "4"))
    await bench.until(lambda: len(got) == 2)
    await bench.quiet()
    # Two topics, between which Kafka has no order.
    assert sorted(got) == [("a", "eu", 17, "eu"), ("b", "us", 4, "us")]


@needs(Capability.GROUPS, "fan-out")
async def test_members_of_a_group_share_the_messages(bench: Bench) -> None:
    got: Counter[str] = Counter()
    bodies: Counter[int] = Counter()
    address = bench.address("shared")

    def member(name: str, broker: Any) -> None:
        @bench.subscriber(address, group="workers", on=broker)
        async def handler(body: int) -> None:
            got[name] += 1
            bodies[body] += 1
            await asyncio.sleep(0.001)

    member("first", bench.broker)
    member("second", bench.second)

    @bench.subscriber(address)
    async def alone(body: int) -> None:
        got["alone"] += 1

    await bench.start()
    for i in range(60):
        await bench.broker.publish(i, address)
    await bench.until(lambda: got.total() == 120, 20.0)
    assert got["alone"] == 60
    assert set(bodies.values()) == {1}
    assert min(got["first"], got["second"]) >= 5, got


async def test_one_at_a_time_keeps_the_order(bench: Bench) -> None:
    got: list[int] = []
    running: list[int] = []
    overlaps: list[int] = []

    @bench.subscriber(bench.address("ordered"))
    async def handler(body: int) -> None:
        running.append(body)
        overlaps.append(len(running))
        await asyncio.sleep(0.002 if body % 3 else 0.0)
        running.remove(body)
        got.append(body)

    await bench.start()
    for i in range(30):
        await bench.broker.publish(i, bench.address("ordered"))
    await bench.until(lambda: len(got) == 30, 20.0)
    assert got == list(range(30))
    assert max(overlaps) == 1


async def test_concurrency_overlaps_up_to_its_number(bench: Bench) -> None:
    running: set[int] = set()
    peak = 0
    done: list[int] = []
    gate = asyncio.Event()

    @bench.subscriber(bench.address("parallel"), concurrency=4)
    async def handler(body: int) -> None:
        nonlocal peak
        running.add(body)
        peak = max(peak, len(running))
        await gate.wait()
        running.remove(body)
        done.append(body)

    await bench.start()
    for i in range(12):
        await bench.broker.publish(i, bench.address("parallel"))
    await bench.until(lambda: len(running) == 4)
    await bench.quiet(0.1)
    assert len(running) == 4
    gate.set()
    await bench.until(lambda: len(done) == 12)
    assert peak == 4
    assert sorted(done) == list(range(12))


@needs(Capability.HEADERS)
@pytest.mark.parametrize(
    "key", ["header:key", "key", lambda m: m.headers["key"]], ids=["header", "field", "function"]
)
async def test_order_per_key_is_kept_while_keys_overlap(bench: Bench, key: Any) -> None:
    got: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    running: set[str] = set()
    peak = 0

    @bench.subscriber(bench.address("keyed"), concurrency=8, ordered_by=key)
    async def handler(body: dict[str, Any]) -> None:
        nonlocal peak
        assert body["key"] not in running
        running.add(body["key"])
        peak = max(peak, len(running))
        await asyncio.sleep(0.003 if body["n"] % 2 else 0.001)
        running.remove(body["key"])
        got[body["key"]].append(body["n"])

    await bench.start()
    for n in range(10):
        for k in got:
            await bench.broker.publish(
                {"key": k, "n": n}, bench.address("keyed"), headers={"key": k}
            )
    await bench.until(lambda: sum(map(len, got.values())) == 30, 20.0)
    assert got == {k: list(range(10)) for k in got}


async def test_a_message_without_a_usable_key_is_handled(bench: Bench) -> None:
    got: list[int] = []
    by = lambda m: json.loads(m.body)["key"]  # noqa: E731

    @bench.subscriber(bench.address("keyless"), concurrency=4, ordered_by=by)
    async def handler(body: dict[str, Any]) -> None:
        got.append(body["n"])

    await bench.start()
    for body in ({"n": 0}, {"n": 1, "key": ["no key"]}, {"n": 2, "key": "a"}):
        await bench.broker.publish(body, bench.address("keyless"))
    await bench.until(lambda: len(got) == 3)
    assert sorted(got) == [0, 1, 2]


async def test_a_batch_is_full_or_late(bench: Bench) -> None:
    got: list[tuple[list[int], float]] = []

    @bench.subscriber(bench.address("batches"), batch=Batch(size=5, wait=0.4))
    async def handler(bodies: list[int]) -> None:
        got.append((bodies, bench.now()))

    await bench.start()
    begin = bench.now()
    for i in range(7):
        await bench.broker.publish(i, bench.address("batches"))
    await bench.until(lambda: len(got) == 2)
    assert [bodies for bodies, _ in got] == [[0, 1, 2, 3, 4], [5, 6]]
    assert got[1][1] - begin >= 0.39


async def test_filters_choose_the_handler(bench: Bench) -> None:
    got: list[tuple[str, int]] = []
    subscriber = bench.subscriber(bench.address("filtered"))

    @subscriber(filter=lambda m: m.body.startswith(b"1"))
    async def ones(body: int) -> None:
        got.append(("ones", body))

    @subscriber
    async def rest(body: int) -> None:
        got.append(("rest", body))

    await bench.start()
    for i in (1, 2, 13):
        await bench.broker.publish(i, bench.address("filtered"))
    await bench.until(lambda: len(got) == 3)
    assert got == [("ones", 1), ("rest", 2), ("ones", 13)]


# What a handler publishes


async def test_publishers_form_a_chain_and_a_broadcast(bench: Bench) -> None:
    got: list[tuple[str, Any]] = []

    @bench.subscriber(bench.address("start"))
    @bench.broker.publisher(bench.address("middle"))
    async def start(body: int) -> int:
        return body + 1

    @bench.broker.publisher(bench.address("left"))
    @bench.broker.publisher(bench.address("right"))
    @bench.subscriber(bench.address("middle"))
    async def middle(body: int) -> dict[str, int]:
        return {"n": body * 10}

    @bench.subscriber(bench.address("left"))
    async def left(body: dict[str, int]) -> None:
        got.append(("left", body))

    @bench.subscriber(bench.address("right"))
    async def right(body: dict[str, int]) -> None:
        got.append(("right", body["n"]))

    await bench.start()
    await bench.broker.publish(1, bench.address("start"))
    await bench.until(lambda: len(got) == 2)
    assert sorted(got, key=lambda x: x[0]) == [("left", {"n": 20}), ("right", 20)]


async def test_none_publishes_nothing_unless_it_is_said(bench: Bench) -> None:
    got: list[bytes] = []

    @bench.subscriber(bench.address("maybe"))
    @bench.broker.publisher(bench.address("out"))
    async def maybe(body: int) -> Any:
        return None if body == 1 else Response(None) if body == 2 else body

    @bench.subscriber(bench.address("out"))
    async def out(body: bytes) -> None:
        got.append(body)

    await bench.start()
    for i in (1, 2, 3):
        await bench.broker.publish(i, bench.address("maybe"))
    await bench.until(lambda: len(got) == 2)
    await bench.quiet(0.1)
    assert got == [b"", b"3"]


@needs(Capability.HEADERS)
async def test_a_response_carries_headers_and_the_correlation_id_goes_on(bench: Bench) -> None:
    got: list[Any] = []

    @bench.subscriber(bench.address("in"))
    @bench.broker.publisher(bench.address("out"), headers={"from": "publisher", "kept": "yes"})
    async def handler(body: str) -> Any:
        return Response(body.upper(), headers={"from": "response"})

    @bench.subscriber(bench.address("out"))
    async def out(body: str, message: Message[Any]) -> None:
        got.append((body, message.headers["from"], message.headers["kept"], message.correlation_id))

    await bench.start()
    await bench.broker.publish("x", bench.address("in"), correlation_id="c-7")
    await bench.until(lambda: got)
    assert got == [("X", "response", "yes", "c-7")]


async def test_a_publisher_object_publishes_by_itself(bench: Bench) -> None:
    got: list[Any] = []
    publisher = bench.broker.publisher(bench.address("out"))

    @bench.subscriber(bench.address("in"))
    async def handler(body: str) -> None:
        await publisher.publish({"said": body})

    @bench.subscriber(bench.address("out"))
    async def out(body: dict[str, str]) -> None:
        got.append(body)

    await bench.start()
    await bench.broker.publish("x", bench.address("in"))
    await bench.until(lambda: got)
    assert got == [{"said": "x"}]


async def test_context_values_reach_the_handler(bench: Bench) -> None:
    got: list[Any] = []
    bench.broker.context.set_global("setting", {"deep": 5})

    @bench.subscriber(bench.address("context"))
    async def handler(
        body: str,
        value: Annotated[int, Context("setting.deep")],
        size: Annotated[bytes, Context("message.body")],
    ) -> None:
        got.append((body, value, size))

    await bench.start()
    await bench.broker.publish("x", bench.address("context"))
    await bench.until(lambda: got)
    assert got == [("x", 5, b"x")]
