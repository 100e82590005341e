"""What can be declared, and what is refused with what words."""

from __future__ import annotations

import pytest
from nats.js.api import AckPolicy, ConsumerConfig

from millstream.driver import Batch, Capability
from millstream.errors import AddressError, SetupError
from millstream.nats import JStream, KvWatch, ObjWatch, PullSub
from millstream.nats.message import (
    NatsKvMessage,
    NatsMessage,
    NatsObjMessage,
    NatsStreamMessage,
    ack_tokens,
)
from millstream.nats.options import NatsPublication, NatsPublish, NatsSubscription


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "without a subject"),
        ({"subject": "a", "durable": "d"}, "core NATS cannot be combined with durable"),
        ({"subject": "a", "pull_sub": True}, "core NATS cannot be combined with pull_sub"),
        ({"subject": "a", "headers_only": True}, "core NATS cannot be combined with headers_only"),
        ({"subject": "a", "kv_watch": "b", "obj_watch": True}, "exclude each other"),
        (
            {"subject": "a", "kv_watch": "b", "stream": "S"},
            "kv_watch cannot be .* stream",
        ),
        (
            {"subject": "a", "obj_watch": True, "queue": "q"},
            "obj_watch cannot be .* queue",
        ),
        ({"obj_watch": True}, "obj_watch without a bucket"),
        ({"stream": "S", "push": True, "pull_sub": True}, "push=True cannot be combined"),
        ({"stream": "S", "ordered_consumer": True, "durable": "d"}, "ordered_consumer=True cannot"),
        ({"stream": "S", "max_msgs": 3}, "max_msgs=3 on a pull consumer"),
        (
            {"stream": "S", "push": True, "flow_control": True},
            "without idle_heartbeat",
        ),
        ({"stream": "S", "pull_sub": PullSub(0)}, "batch_size=0"),
        ({"stream": "a.b"}, "'a.b' is no name for a stream"),
        ({"stream": "S", "durable": "a b"}, "'a b' is no name for a durable"),
        (
            {"stream": "S", "durable": "a", "config": ConsumerConfig(durable_name="b")},
            "several names: a, b",
        ),
        (
            {"stream": "S", "config": ConsumerConfig(ack_policy=AckPolicy.ALL), "concurrency": 2},
            "AckPolicy.ALL with 2 messages at once",
        ),
    ],
)
def test_refused(options, words):
    with pytest.raises(SetupError, match=words) as caught:
        NatsSubscription(**options).check()
    assert caught.value.fix


@pytest.mark.parametrize("subject", ["a..b", ".a", "a b", "a.>.b", "a.{x}y", "a.{x}.{x}"])
def test_no_subject(subject):
    with pytest.raises(AddressError):
        NatsSubscription(subject).check()
    with pytest.raises(AddressError):
        NatsPublication(subject).check()


def test_a_stream_needs_a_name():
    with pytest.raises(SetupError, match="is no name for a stream"):
        JStream("with space")
    with pytest.raises(SetupError, match="is no name for a stream"):
        NatsPublication("a", stream="x.y").check()


def test_kinds():
    core = NatsSubscription("a")
    stream = NatsSubscription("a", stream="S")
    silent = NatsSubscription("a", stream="S", config=ConsumerConfig(ack_policy=AckPolicy.NONE))
    kv, obj = NatsSubscription("a", kv_watch="b"), NatsSubscription("files", obj_watch=True)
    for spec in (core, stream, silent, kv, obj):
        spec.check()
    assert core.envelope is NatsMessage and stream.envelope is NatsStreamMessage
    assert kv.envelope is NatsKvMessage and obj.envelope is NatsObjMessage
    assert Capability.ACK not in core.capabilities and Capability.REPLY in core.capabilities
    assert Capability.NACK_DELAY in stream.capabilities
    assert Capability.ACK not in silent.capabilities and silent.ack_wait is None
    assert Capability.PERSISTENT in kv.capabilities and Capability.HEADERS not in obj.capabilities
    assert (core.guarantee, stream.guarantee) == ("at-most-once", "at-least-once")
    assert (kv.stream_name, obj.stream_name) == ("KV_b", "OBJ_files")
    assert (kv.filters, obj.filters) == (["$KV.b.a"], ["$O.files.M.>"])
    assert NatsSubscription(kv_watch=KvWatch("b")).filters == ["$KV.b.>"]
    assert NatsSubscription("files", obj_watch=ObjWatch()).obj == ObjWatch()


def test_the_ack_deadline():
    spec = NatsSubscription("a", stream="S")
    assert spec.ack_wait == 30
    assert NatsSubscription("a", stream="S", config=ConsumerConfig(ack_wait=5)).ack_wait == 5
    config = ConsumerConfig(ack_wait=9, backoff=[1, 3])
    assert NatsSubscription("a", stream="S", config=config).ack_wait == 1


def test_batches_and_prefetch():
    batch = NatsSubscription("a", stream="S", pull_sub=PullSub(20, timeout=0.5, batch=True))
    assert batch.batch == Batch(20, 0.5) and batch.prefetch == 40
    assert NatsSubscription("a", stream="S", pull_sub=PullSub(batch=True)).batch == Batch(100, 5.0)
    assert NatsSubscription("a", stream="S", concurrency=4).prefetch == 8
    assert NatsSubscription("a", stream="S", pull_sub=PullSub(7)).prefetch == 7
    assert NatsSubscription("a", stream="S", batch=Batch(5)).prefetch == 10


def test_a_prefix():
    assert NatsSubscription("a", stream="S").prefixed("p.").subject == "p.a"
    config = ConsumerConfig(filter_subjects=["a", "b"])
    spec = NatsSubscription(stream="S", config=config).prefixed("p.")
    assert (spec.subject, spec.filters) == ("", ["p.a", "p.b"])
    config = ConsumerConfig(filter_subject="a")
    assert NatsSubscription(stream="S", config=config).prefixed("p.").filters == ["p.a"]
    assert NatsSubscription("files", obj_watch=True).prefixed("p.").subject == "files"
    assert NatsSubscription("k", kv_watch="b").prefixed("p.").filters == ["$KV.b.p.k"]
    assert NatsPublication("a").prefixed("p.").destination == "p.a"


def test_destinations():
    assert NatsSubscription("a.{x}").destination == "a.{x}"
    assert NatsSubscription(stream="S").destination == ">"
    config = ConsumerConfig(filter_subject="a.*")
    assert NatsSubscription(stream="S", config=config).destination == "a.*"
    command = NatsPublish("body", "a")
    command.destination = "b"
    assert (command.subject, command.destination, command.body) == ("b", "b", "body")


def test_acknowledgement_addresses_of_both_forms():
    short = "$JS.ACK.S.c.2.10.11.1700000000000000000.5"
    long = "$JS.ACK.hub.HASH.S.c.2.10.11.1700000000000000000.5.random"
    assert (
        ack_tokens(short) == ack_tokens(long) == ["S", "c", "2", "10", "11", "17" + "0" * 17, "5"]
    )
