"""Dead letters in streams, the command line on them, and keys of handled messages."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from millstream import Dedup, Retry
from millstream.errors import NoLetters, NoResponders, SetupError
from millstream.letters import Letter, replay
from millstream.redis import RedisBroker, RedisDedup, RedisStreamMessage, StreamSub
from tests.cli.conftest import Run, run  # noqa: F401
from tests.cli.harness import command, write
from tests.helpers import eventually


async def read(broker: RedisBroker, address: str, *args: Any) -> list[Letter]:
    return [letter async for letter in broker.driver.letters(address).read(*args)]


async def test_letters_are_read_and_removed(broker: RedisBroker, client: Redis, name: str) -> None:
    @broker.subscriber(stream=StreamSub(name, group="g"), retry=Retry(attempts=1))
    async def work(body: int) -> None:
        raise ValueError(f"not\n{body}")

    await broker.start()
    letters = broker.driver.letters(f"{name}.dlq")
    with pytest.raises(NoLetters, match=f"no stream '{name}.dlq'"):
        await letters.count()
    for n in range(5):
        await broker.publish(n, stream=name, headers={"tenant": "ü"})
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 5)
    assert await letters.count() == 5
    found = await read(broker, f"stream://{name}.dlq")
    assert [letter.message.body for letter in found] == [b"0", b"1", b"2", b"3", b"4"]
    assert [x.id for x in await read(broker, f"{name}.dlq", 2, found[1].id)] == [
        found[2].id,
        found[3].id,
    ]
    first = found[0]
    assert first.handler == f"work@stream://{name}" and first.origin == f"stream://{name}"
    assert (first.error_type, first.error) == ("ValueError", "not\n0")
    assert abs((first.failed_at - first.stored).total_seconds()) < 2
    assert first.headers["tenant"] == "ü"
    assert await letters.remove(found[1].id) and not await letters.remove(found[1].id)
    assert not await letters.remove("nonsense")
    assert await letters.count() == 4
    assert (await client.xinfo_stream(f"{name}.dlq"))["groups"] == 0
    spec = broker.subscriptions[0].spec
    where = await broker.driver.dead_letter(spec, None, declare=False)
    assert where == f"stream://{name}.dlq"


@pytest.mark.parametrize("kind", ["stream", "list"])
async def test_a_replay_goes_back_to_where_it_came_from(
    broker: RedisBroker, name: str, kind: str
) -> None:
    works = False
    got: list[int] = []
    source: Any = {kind: StreamSub(name, group="g") if kind == "stream" else name}

    @broker.subscriber(**source, retry=Retry(attempts=1))
    async def work(body: int) -> None:
        got.append(body)
        if not works:
            raise ValueError("still wrong")

    await broker.start()
    await broker.publish(1, **{kind: name})
    await eventually(lambda: broker.subscriptions[0].failing.dead_lettered == 1)
    works = True
    [letter] = await read(broker, f"{name}.dlq")
    assert letter.origin == f"{kind}://{name}"
    assert await replay(broker.driver.letters(f"{name}.dlq"), letter)
    await eventually(lambda: got == [1, 1])
    assert await read(broker, f"{name}.dlq") == []


async def test_the_letter_of_a_channel_needs_a_listener(broker: RedisBroker, name: str) -> None:
    subscriber = broker.subscriber(
        name, retry=Retry(attempts=1), dead_letter=f"{name}-trash", persistent=False
    )

    @subscriber
    async def work(body: int) -> None:
        raise ValueError("wrong")

    await broker.start()
    await subscriber.start()
    await broker.publish(1, name)

    async def there() -> bool:
        try:
            return bool(await broker.driver.letters(f"{name}-trash").count())
        except NoLetters:
            return False

    await eventually(there)
    await subscriber.stop()
    [letter] = await read(broker, f"{name}-trash")
    with pytest.raises(NoResponders):
        await replay(broker.driver.letters(f"{name}-trash"), letter)
    assert await there()


SHOP = """
import pathlib
from millstream import Logger, Millstream, Retry
from millstream.redis import ListSub, RedisBroker, StreamSub

broker = RedisBroker({url!r}, startup_timeout=5, retry=Retry(attempts=1))
healed = pathlib.Path("healed").exists()


@broker.subscriber(stream=StreamSub("{name}", group="orders"))
async def order(body: dict, logger: Logger) -> None:
    if not healed and body["id"] % 2:
        raise ValueError(f"no stock for {{body['id']}}")
    logger.info("order %s", body["id"])


@broker.subscriber(list="{name}-jobs")
async def job(body: int) -> None: ...


app = Millstream(broker)


@app.after_startup
async def fill(count: int = 0) -> None:
    for n in range(count):
        await broker.publish({{"id": n}}, stream="{name}")
"""


def test_the_command_line_on_dead_letters(
    redis: Any,
    name: str,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    write(tmp_path, main=SHOP.format(url=redis.url, name=name))

    def dlq(*arguments: str) -> subprocess.CompletedProcess[str]:
        verb, *rest = arguments
        done = command("dlq", verb, "main:app", *rest, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    assert "no dead letters" in dlq("ls").stdout
    with run("run", "main:app", "--count", "6") as service:
        service.expect("order 4")
        service.expect("failed for good", times=3)
        service.stop()
    rows = [line.split() for line in dlq("ls").stdout.splitlines()]
    assert rows[1][:4] == [f"stream://{name}.dlq", f"order@stream://{name}", "ValueError", "3"]
    shown = json.loads(dlq("show", "--json").stdout)
    assert [letter["body"]["id"] for letter in shown] == [1, 3, 5]
    dlq("drop", "--id", shown[0]["id"], "--yes")
    (tmp_path / "healed").touch()
    with run("run", "main:app") as service:
        dlq("replay")
        service.expect("order 3")
        service.expect("order 5")
        service.stop()
    assert "no dead letters" in dlq("ls").stdout

    shown_now = command("show", "main:app", folder=tmp_path)
    assert shown_now.returncode == 0, shown_now.stderr
    assert f"stream://{name}" in shown_now.stdout and f"list://{name}-jobs" in shown_now.stdout
    assert shown_now.stdout.count("at-least-once") == 2


async def test_a_key_is_claimed_done_and_released(broker: RedisBroker, name: str) -> None:
    await broker.connect()
    store, other = RedisDedup(broker, prefix=f"{name}:"), RedisDedup(broker, prefix=f"{name}:")
    assert await store.claim("a", 5) == "mine"
    assert await other.claim("a", 5) == "busy"
    await store.release("a")
    assert await other.claim("a", 0.2) == "mine"
    assert await eventually(lambda: _claims(store, "a")) == "mine"  # its lease is over
    await store.done("a", 0.3)
    assert await other.claim("a", 5) == "done"
    await other.release("a")  # what is done stays done
    assert await other.claim("a", 5) == "done"
    assert await eventually(lambda: _claims(store, "a")) == "mine"  # and is forgotten
    with pytest.raises(SetupError):
        RedisDedup(broker, prefix="")


async def _claims(store: RedisDedup, key: str) -> str | None:
    found = await store.claim(key, 5)
    return found if found == "mine" else None


async def test_two_processes_handle_a_key_once(
    broker: RedisBroker, second: RedisBroker, name: str
) -> None:
    got: list[str] = []

    for one in (broker, second):
        once = Dedup(key="order", store=RedisDedup(one, prefix=f"{name}:"))

        @one.subscriber(stream=StreamSub(name, group="g"), deduplicate=once)
        async def handler(body: int, message: RedisStreamMessage) -> None:
            got.append(message.headers["order"])
            await asyncio.sleep(0.01)

        await one.start()
    for n in range(20):
        for _ in range(2):
            await broker.publish(n, stream=name, headers={"order": str(n)})
    await eventually(lambda: len(got) == 20, 10)
    await asyncio.sleep(1.2)  # a busy key is looked at again after a second
    assert sorted(got, key=int) == [str(n) for n in range(20)]
