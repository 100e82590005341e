"""Options that people bring along, and wrong ones."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

import pytest
from redis.asyncio import Connection, Redis
from redis.asyncio.connection import Encoder
from redis.asyncio.retry import Retry as ClientRetry
from redis.backoff import NoBackoff

from millstream.errors import ConnectError, EncodeError, MessageTooLarge, SetupError
from millstream.redis import (
    JSONMessageFormat,
    ListSub,
    MessageFormat,
    PubSub,
    RedisBroker,
    RedisClusterBroker,
    RedisSentinelBroker,
    StreamSub,
)
from millstream.redis.options import RedisPublication, RedisSubscription
from tests.redis.test_security import works


class Foreign(MessageFormat):
    """As another framework asks for it."""

    @classmethod
    def encode(cls, *, message: Any, headers: Any) -> bytes:  # type: ignore[override]
        return b""


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": 3},
        {"encoding": "latin-1", "encoding_errors": "replace"},
        {"socket_timeout": None, "socket_connect_timeout": None},
        {"health_check_interval": 0},
        {
            "retry": ClientRetry(NoBackoff(), 1),
            "retry_on_timeout": True,
            "retry_on_error": [OSError],
        },
        {"max_connections": 3, "client_name": "me", "socket_read_size": 1024, "socket_type": 0},
        {"connection_class": Connection, "encoder_class": Encoder, "socket_keepalive": True},
        {"message_format": JSONMessageFormat},
    ],
    ids=lambda options: "-".join(options),
)
async def test_options_of_the_client_work(redis: Any, options: Any) -> None:
    await works(RedisBroker(redis.url, **options))


async def test_the_client_is_as_its_options_say(redis: Any) -> None:
    retry = ClientRetry(NoBackoff(), 1)
    async with RedisBroker(f"{redis.url}?protocol=3", retry=retry, socket_timeout=2.5) as broker:
        options = broker.client.connection_pool.connection_kwargs
        assert (options["protocol"], options["socket_timeout"]) == (3, 2.5)
        assert options["retry"] is retry
        assert await broker.client.config_get("maxmemory") == {"maxmemory": "0"}


async def test_without_signs_of_life_nothing_runs_hot(redis: Any) -> None:
    async with RedisBroker(redis.url, health_check_interval=0) as broker:
        assert broker.driver.interval == math.inf
        assert 0 < broker.driver.block <= 5000


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RedisBroker(None), "redis://localhost"),  # type: ignore[arg-type]
        (lambda: RedisBroker("redis://localhost?nonsense=1"), "nonsense"),
        (lambda: RedisBroker(host="localhost", port="x"), "Port"),  # type: ignore[arg-type]
        (lambda: RedisBroker(protocol="redis"), "protocol"),  # type: ignore[arg-type]
        (lambda: RedisBroker(socket_timeout=0), "more than 0"),
        (lambda: RedisBroker(socket_connect_timeout=-1), "more than 0"),
        (lambda: RedisBroker(reconnect_max=0), "more than 0"),
        (lambda: RedisBroker(health_check_interval=-1), "0 for never"),
        (lambda: RedisBroker(message_format="json"), "MessageFormat"),  # type: ignore[arg-type]
        (lambda: RedisBroker(message_format=Foreign), r"encode\(cls, body, headers\)"),
        (lambda: RedisClusterBroker(db=2), "one database"),
        (lambda: RedisClusterBroker("redis://localhost/2"), "db"),
        (lambda: RedisClusterBroker(unix_socket_path="/run/redis.sock"), "no socket"),
        (lambda: RedisClusterBroker(startup_nodes=["a:1"]), "redis://"),  # type: ignore[list-item]
        (lambda: RedisSentinelBroker([]), "host, port"),
        (lambda: RedisSentinelBroker("redis://a:1"), "host, port"),  # type: ignore[arg-type]
        (lambda: RedisSentinelBroker([("a", 1)], host="b"), "Sentinel names"),
        (
            lambda: RedisSentinelBroker([("a", 1)], connection_class=Connection),
            "SentinelManagedConnection",
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(make: Any, text: str) -> None:
    with pytest.raises(SetupError, match=text):
        make()


def test_a_database_that_is_none_is_said_at_once() -> None:
    with pytest.raises(SetupError, match="RedisBroker: db='x' is str, not int"):
        RedisBroker(db="x")  # type: ignore[arg-type]


async def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as quiet:  # the system takes connections for it
        url = f"redis://127.0.0.1:{quiet.getsockname()[1]}"
        broker = RedisBroker(url, socket_timeout=0.1, startup_timeout=0.3)
        async with asyncio.timeout(5):
            with pytest.raises(ConnectError, match="no answer in time"):
                await broker.connect()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"list": PubSub("a")}, "a ListSub"),
        ({"stream": ListSub("a")}, "a StreamSub"),
        ({"stream": 5}, "a StreamSub"),
        ({"channel": StreamSub("a")}, "a PubSub"),
        ({"channel": "a", "stream": "b"}, "channel and stream at once"),
        ({"channel": "stream://a", "stream": StreamSub("b")}, "channel and stream at once"),
        ({"channel": PubSub(5)}, "a name is a text"),  # type: ignore[arg-type]
        ({"channel": "a", "message_format": "json"}, "MessageFormat"),
        ({"list": ListSub("a", max_records=0)}, "max_records=0"),
        ({"list": ListSub("a", polling_interval=-1)}, "polling_interval=-1"),
        ({"stream": StreamSub("a", group="")}, "group=''"),
        ({"stream": StreamSub("a", last_id="soon")}, "an entry's id"),
        ({"stream": StreamSub("a", max_records=0)}, "max_records=0"),
        ({"stream": StreamSub("a", maxlen=-1)}, "maxlen=-1"),
        ({"stream": StreamSub("a", maxlen=1, max_age=1)}, "maxlen and max_age"),
        ({"stream": StreamSub("a", group="g", min_idle_time=-1)}, "min_idle_time=-1"),
    ],
)
def test_subscriptions_that_cannot_work(options: Any, text: str) -> None:
    broker = RedisBroker()

    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match=text) as caught:
        broker.subscriber(**options)(handler)
        broker.compile()
    assert "test_options.py" in caught.value.where


def test_an_address_with_the_options_of_its_stream() -> None:
    sub = StreamSub("a", group="g", maxlen=5)
    subscription = RedisSubscription("stream://a", stream=sub)
    assert (subscription.channel, subscription.stream_sub) == (None, sub)
    assert RedisPublication("stream://a", stream=sub).destination == "stream://a"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channel": ""}, "no name"),
        ({"channel": "logs.{level}"}, "pattern"),
        ({"channel": "logs.*"}, "pattern"),
        ({"list": StreamSub("a")}, "a ListSub"),
        ({"list": "a", "maxlen": 5}, "no stream"),
        ({"channel": "a", "max_age": 5}, "no stream"),
        ({"stream": "a", "maxlen": -5}, "maxlen=-5"),
        ({"stream": "a", "maxlen": 5, "max_age": 5}, "maxlen and max_age"),
        ({"stream": "a", "message_format": Foreign}, "encode"),
    ],
)
def test_publications_that_cannot_work(options: Any, text: str) -> None:
    broker = RedisBroker()
    with pytest.raises(SetupError, match=text):
        broker.publisher(**options)
        broker.bind()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"stream": "s", "list": "l"}, SetupError, "list and stream at once"),
        ({"channel": "c", "list": "l"}, SetupError, "channel and list at once"),
        ({"list": 5}, SetupError, "a ListSub"),
        ({"list": "l", "message_format": "json"}, SetupError, "MessageFormat"),
        ({"list": "l", "message_format": JSONMessageFormat}, EncodeError, "no text"),
        ({"list": "l", "headers": {"a": "x" * 65_536}}, MessageTooLarge, "65,535"),
        ({"list": "l", "headers": {"a": 5}}, EncodeError, "header of 5"),
        ({"stream": "s", "headers": {"__data__": "x"}}, SetupError, "__data__"),
        ({"stream": "s", "maxlen": 1, "max_age": 1}, SetupError, "maxlen and max_age"),
    ],
)
async def test_messages_that_cannot_be_sent(
    broker: RedisBroker, client: Redis, options: Any, error: Any, text: str
) -> None:
    await broker.connect()
    with pytest.raises(error, match=text):
        await broker.publish(b"\xff\xfe", **options)
    assert not await client.exists("s", "l")


async def test_a_request_needs_its_answer(broker: RedisBroker, name: str) -> None:
    await broker.connect()
    with pytest.raises(SetupError, match="pipeline"):
        await broker.request(1, list=name, pipeline=broker.client.pipeline())


async def test_a_publisher_stays_where_it_was_declared(broker: RedisBroker, name: str) -> None:
    publisher = broker.publisher(stream=name)
    await broker.start()
    assert await publisher.publish(1, stream=f"{name}-2")
    with pytest.raises(SetupError, match="list and stream at once"):
        await publisher.publish(1, list=name)
