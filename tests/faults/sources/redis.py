"""Redis: the group of a stream, a list, a channel."""

from __future__ import annotations

import shutil
from typing import Any

from redis import Redis as SyncRedis

from millstream.errors import NoResponders
from millstream.redis import ListSub, RedisBroker, StreamSub
from millstream.redis.formats import BinaryMessageFormatV1
from millstream.redis.message import DATA, LIST, STREAM
from millstream.redis.options import RedisSubscription, plain_name
from tests.faults.sources.base import Setup, Source
from tests.servers.redis import RedisServer

#: What the user ``worker`` may not do.
RIGHTS = {"": "+@all", "fetch": "-xreadgroup", "acknowledge": "-xack"}


class RedisChannel(Source):
    """A channel: at most once."""

    name = "redis-channel"
    confirms = False
    capabilities = RedisSubscription("a").capabilities
    max_message = 1 << 20
    nobody = NoResponders

    def server(self, setup: Setup) -> RedisServer:
        users = [f"user {name} on >pw ~* &* +@all" for name in ("worker", "sender")]
        args = [word for user in users for word in ("--" + user).split()] if setup.logins else []
        return RedisServer(durable=True, args=args)

    def url(self, port: int, user: str = "") -> str:
        return f"redis://{f'{user}:pw@' if user else ''}127.0.0.1:{port}"

    def broker(self, setup: Setup) -> RedisBroker:
        return RedisBroker(
            setup.url,
            graceful_timeout=setup.grace,
            publish_timeout=setup.publish_timeout,
            reconnect_max=setup.reconnect,
            health_check_interval=setup.ping,
            socket_timeout=2 * setup.ping,
        )

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {}

    def asking(self, broker: Any) -> int:
        return len(broker.driver.asked)

    def forbid(self, server: Any, what: str) -> None:
        with SyncRedis(port=server.port) as client:
            client.execute_command("ACL", "SETUSER", "worker", "+@all", RIGHTS[what])


class RedisStream(RedisChannel):
    """A group of a stream."""

    name = "redis-stream"
    confirms = True
    capabilities = RedisSubscription(stream=StreamSub("s", group="g")).capabilities
    nobody = None  # type: ignore[assignment]
    forbids = ("fetch", "acknowledge")
    denied = "no permissions"

    def address(self, setup: Setup, *parts: str) -> str:
        return STREAM + super().address(setup, *parts)

    def subscription(self, setup: Setup) -> dict[str, Any]:
        name = plain_name(self.address(setup))
        return {"stream": StreamSub(name, group="workers", ack_wait=setup.ack_wait)}

    async def held(self, broker: Any, setup: Setup) -> int:
        for group in await broker.client.xinfo_groups(plain_name(self.address(setup))):
            if group["name"] == b"workers":
                return int(group["pending"]) + int(group["lag"])
        return 0

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        found = await broker.client.xrange(f"{plain_name(self.address(setup))}.dlq")
        return [(f.pop(DATA), {k.decode(): v.decode() for k, v in f.items()}) for _, f in found]

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        found = await broker.client.xrange(plain_name(self.address(setup, "out")))
        return [fields[DATA] for _, fields in found]

    def wipe(self, server: Any) -> None:
        shutil.rmtree(server.folder / "appendonlydir")

    async def delete_source(self, broker: Any, setup: Setup) -> None:
        await broker.client.delete(plain_name(self.address(setup)))

    async def delete_group(self, broker: Any, setup: Setup) -> None:
        await broker.client.xgroup_destroy(plain_name(self.address(setup)), "workers")

    async def refuse_letters(self, broker: Any, setup: Setup) -> None:
        await broker.client.set(f"{plain_name(self.address(setup))}.dlq", "no stream")

    async def take_letters(self, broker: Any, setup: Setup) -> None:
        await broker.client.delete(f"{plain_name(self.address(setup))}.dlq")


class RedisList(RedisStream):
    """A list."""

    name = "redis-list"
    capabilities = RedisSubscription(list="l").capabilities
    notices = False
    forbids = ()

    def address(self, setup: Setup, *parts: str) -> str:
        return LIST + plain_name(super().address(setup, *parts))

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"list": ListSub(plain_name(self.address(setup)), ack_wait=setup.ack_wait)}

    async def held(self, broker: Any, setup: Setup) -> int:
        name = plain_name(self.address(setup))
        count = int(await broker.client.llen(name))
        count += int(await broker.client.llen(f"{{{name}}}:ms:next"))
        async for key in broker.client.scan_iter(f"{{{name}}}:ms:taken:*"):
            count += int(await broker.client.hlen(key))
        return count + int(await broker.client.zcard(f"{{{name}}}:ms:later"))

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        found = await broker.client.lrange(plain_name(self.address(setup, "out")), 0, -1)
        return [BinaryMessageFormatV1.parse(value)[0] for value in found]

    delete_source, delete_group = Source.delete_source, Source.delete_group  # type: ignore[assignment]
