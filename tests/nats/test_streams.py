"""Declared streams and where dead letters are kept."""

from __future__ import annotations

import pytest
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamSource

from millstream.errors import SetupError
from millstream.nats import JStream
from millstream.nats.driver import NatsDriver
from millstream.nats.options import NatsPublication, NatsSubscription
from millstream.nats.streams import covers, overlap, union
from tests.helpers import unique
from tests.servers import NatsServer


async def config(bench, name):
    return (await bench.driver.js.stream_info(name)).config


async def test_subjects_of_all_declarations_are_united(bench):
    name = unique()
    await bench.driver.declare(
        [
            NatsSubscription(f"{name}.{{x}}.in", stream=name),
            NatsSubscription(f"{name}.a.in", stream=JStream(name)),
            NatsPublication(f"{name}.out", stream=name),
            NatsSubscription("elsewhere"),
        ]
    )
    assert set((await config(bench, name)).subjects) == {f"{name}.*.in", f"{name}.out"}


async def test_declaring_again_changes_nothing_and_drops_nothing(bench):
    name = unique()
    await bench.driver.js.add_stream(
        name=name, subjects=[f"{name}.others"], max_age=3600, description="mine"
    )
    spec = NatsSubscription(f"{name}.ours", stream=JStream(name, max_msgs=10))
    for _ in range(2):
        await bench.driver.declare([spec])
    have = await config(bench, name)
    assert set(have.subjects) == {f"{name}.others", f"{name}.ours"}
    assert (have.max_age, have.description, have.max_msgs) == (3600, "mine", 10)


async def test_a_wider_subject_replaces_those_it_covers(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[f"{name}.a", f"{name}.b"])
    await bench.driver.declare([NatsSubscription(f"{name}.>", stream=name)])
    assert (await config(bench, name)).subjects == [f"{name}.>"]
    await bench.driver.declare([NatsSubscription(f"{name}.c", stream=name)])
    assert (await config(bench, name)).subjects == [f"{name}.>"]


async def test_every_setting(bench):
    name = unique()
    stream = JStream(
        name,
        "all of them",
        [f"{name}.>"],
        retention=RetentionPolicy.INTEREST,
        max_msgs=5,
        max_bytes=100_000,
        max_age=60,
        max_msg_size=1000,
        max_msgs_per_subject=3,
        discard=DiscardPolicy.NEW,
        storage=StorageType.MEMORY,
        duplicate_window=30,
        allow_direct=True,
        metadata={"team": "x"},
    )
    await bench.driver.declare([NatsSubscription(f"{name}.a", stream=stream)])
    have = await config(bench, name)
    for field in ("description", "retention", "max_msgs", "max_bytes", "max_age", "max_msg_size"):
        assert getattr(have, field) == getattr(stream, field), field
    for field in ("max_msgs_per_subject", "discard", "storage", "duplicate_window", "allow_direct"):
        assert getattr(have, field) == getattr(stream, field), field
    assert have.metadata["team"] == "x"


async def test_a_mirror_has_no_subjects_of_its_own(bench):
    source, name = unique(), unique()
    await bench.driver.js.add_stream(name=source, subjects=[source])
    mirror = JStream(name, mirror=StreamSource(source))
    taken = await bench.subscribe(stream=mirror, durable="d")
    await bench.publish(source, b"x", stream=source)
    await taken.count(1)


async def test_a_stream_that_must_exist(bench):
    name = unique()
    with pytest.raises(SetupError, match=f"'{name}' does not exist") as caught:
        await bench.driver.declare([NatsSubscription("a", stream=JStream(name, declare=False))])
    assert f"nats stream add {name}" in caught.value.fix
    await bench.driver.js.add_stream(name=name, subjects=[f"{name}.>"])
    spec = NatsSubscription(f"{name}.a", stream=JStream(name, declare=False, max_msgs=1))
    await bench.driver.declare([spec])
    assert (await config(bench, name)).max_msgs == -1


async def test_a_stream_without_any_subject(bench):
    with pytest.raises(SetupError, match="nothing says what it should hold"):
        await bench.driver.declare([NatsSubscription(stream=unique())])


async def test_a_subject_of_another_stream(bench):
    owner, name = unique(), unique()
    await bench.driver.js.add_stream(name=owner, subjects=[f"{owner}.>"])
    with pytest.raises(SetupError) as caught:
        await bench.driver.declare([NatsSubscription(f"{owner}.a", stream=name)])
    assert f"stream={owner!r}" in caught.value.fix


async def test_a_setting_that_cannot_change(bench):
    name = unique()
    await bench.driver.js.add_stream(name=name, subjects=[name], storage="file")
    with pytest.raises(SetupError, match=f"update stream '{name}'"):
        await bench.driver.declare([NatsSubscription(name, stream=JStream(name, storage="memory"))])


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a", "a", True), ("a.*", "a.b", True), ("a.>", "a.b.c", True), (">", "a", True),
        ("a.>", "a", False), ("a.*", "a.>", False), ("a.*", "a.b.c", False), ("a.b", "a.*", False),
        ("a.>", "a.*", True), ("*.b", "a.b", True), ("a.b.c", "a.b", False),
    ],
)  # fmt: skip
def test_covers(pattern, subject, expected):
    assert covers(pattern, subject) is expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a.*", "*.b", True), ("a.>", "a.b.c", True), ("a.b", "a.c", False), ("a", "a.b", False),
        ("a.*", "a.b.c", False), (">", "x.y", True),
    ],
)  # fmt: skip
def test_overlap(one, other, expected):
    assert overlap(one, other) is overlap(other, one) is expected


def test_union():
    assert union(["a.b", "a.*", "c", "c", "a.d"]) == ["a.*", "c"]


# Dead letters


async def dead_letter(bench, spec, name=None):
    await bench.driver.declare([spec])
    return await bench.driver.dead_letter(spec, name)


async def test_the_default_address_and_its_stream(bench):
    name = unique()
    spec = NatsSubscription(f"{name}.>", stream=name)
    # The stream's own subjects capture `{name}.dlq`, so another address is taken.
    assert await dead_letter(bench, spec) == f"dlq.{name}"
    assert (await config(bench, f"dlq_{name}")).subjects == [f"dlq.{name}"]
    other = unique()
    assert await dead_letter(bench, NatsSubscription(f"x{other}", stream=other)) == f"{other}.dlq"
    assert (await config(bench, f"{other}_dlq")).subjects == [f"{other}.dlq"]


async def test_the_stream_takes_the_address_though_the_subscription_does_not(bench):
    name = unique()
    stream = JStream(name, subjects=[f"{name}.>"])
    assert await dead_letter(bench, NatsSubscription(f"{name}.a", stream=stream)) == f"dlq.{name}"


async def test_a_named_address(bench):
    name = unique()
    spec = NatsSubscription(f"{name}.a", stream=JStream(name, subjects=[f"{name}.>"]))
    assert await dead_letter(bench, spec, f"{name}.dead") == f"{name}.dead"  # the stream keeps it
    elsewhere = unique()
    assert await dead_letter(bench, spec, f"{elsewhere}.b.c") == f"{elsewhere}.b.c"
    assert (await config(bench, f"{elsewhere}_b_c")).subjects == [f"{elsewhere}.b.c"]


async def test_an_address_that_would_come_back(bench):
    name = unique()
    with pytest.raises(SetupError, match="would come back"):
        await dead_letter(bench, NatsSubscription(f"{name}.>", stream=name), f"{name}.dead")


@pytest.mark.parametrize(
    ("template", "address"),
    [("{n}.a", "{n}.a.dlq"), ("{n}.*.x", "{n}.any.x.dlq"), ("{n}.>", "dlq.{n}.all")],
)
async def test_core_subjects_made_literal(bench, template, address):
    name = unique()
    spec = NatsSubscription(template.replace("{n}", name))
    address = address.replace("{n}", name)
    assert await bench.driver.dead_letter(spec, None) == address
    assert (await bench.publish(address, b"x")).seq == 1


async def test_a_subscription_to_everything(bench):
    with pytest.raises(SetupError, match="its own dead letters included"):
        await bench.driver.dead_letter(NatsSubscription(">"), None)


async def test_dead_letters_without_jetstream(caplog):
    with NatsServer(jetstream=False) as server:
        driver = NatsDriver(server.url)
        await driver.connect()
        assert await driver.dead_letter(NatsSubscription("a"), None) == "a.dlq"
        assert "nothing keeps" in caplog.text
        with pytest.raises(SetupError, match="has no JetStream"):
            await driver.dead_letter(NatsSubscription("a"), "mine")
        await driver.close()
