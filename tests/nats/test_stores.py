"""Key-value buckets and object stores, opened and watched."""

from __future__ import annotations

import pytest

from millstream.errors import SetupError
from millstream.message import Link
from millstream.nats import KvWatch, ObjWatch
from millstream.nats.message import NatsKvMessage, NatsObjMessage
from tests.helpers import eventually, unique


async def test_a_bucket_is_created_once_and_kept(bench):
    name = unique()
    kv = await bench.driver.stores.key_value(name, history=3, ttl=60)
    assert await bench.driver.stores.key_value(name) is kv
    await kv.put("a", b"1")
    status = await kv.status()
    assert (status.history, status.ttl) == (3, 60)
    other = unique()
    files = await bench.driver.stores.object_storage(other, description="files")
    assert await bench.driver.stores.object_storage(other) is files
    await files.put("x", b"data")
    assert (await files.get("x")).data == b"data"


@pytest.mark.parametrize("kind", ["key_value", "object_storage"])
async def test_a_bucket_that_must_exist(bench, kind):
    with pytest.raises(SetupError, match="does not exist"):
        await getattr(bench.driver.stores, kind)(unique(), declare=False)
    with pytest.raises(SetupError, match="no bucket"):
        await getattr(bench.driver.stores, kind)("a b.c")


async def test_what_the_server_refuses(bench):
    with pytest.raises(SetupError, match="cannot be opened"):
        await bench.driver.stores.key_value(unique(), history=100)


async def test_a_watch_begins_with_the_latest_values(bench):
    name = unique()
    kv = await bench.driver.stores.key_value(name, history=5)
    for value in (b"1", b"2"):
        await kv.put("a.x", value)
    await kv.put("b.x", b"other")
    taken = await bench.subscribe("a.{who}", kv_watch=name)
    await kv.put("a.y", b"3")
    await taken.count(2)  # a purge removes what was not delivered yet
    await kv.delete("a.x")
    await kv.purge("a.y")
    await taken.count(4)
    seen = [(e.key, e.value, e.operation) for e in taken.raws]
    assert seen == [
        ("a.x", b"2", None),
        ("a.y", b"3", None),
        ("a.x", b"", "DEL"),
        ("a.y", b"", "PURGE"),
    ]
    message = NatsKvMessage(taken.raws[1], Link(bench.driver, taken.intake.spec))
    assert (message.body, message.key, message.path) == (b"3", b"a.y", {"who": "y"})
    assert (message.operation, message.revision) == (None, 4)
    assert message.timestamp is not None and message.headers == {}


async def test_with_history_and_without_deletions(bench):
    name = unique()
    kv = await bench.driver.stores.key_value(name, history=5)
    for value in (b"1", b"2"):
        await kv.put("a", value)
    await kv.delete("a")
    watch = KvWatch(name, include_history=True, ignore_deletes=True)
    taken = await bench.subscribe(kv_watch=watch)
    await kv.put("b", b"3")
    await taken.count(3)
    assert [e.value for e in taken.raws] == [b"1", b"2", b"3"]


async def test_without_values(bench):
    name = unique()
    taken = await bench.subscribe("a", kv_watch=KvWatch(name, meta_only=True, inactive_threshold=9))
    kv = await bench.driver.stores.key_value(name)
    await kv.put("a", b"secret")
    (entry,) = await taken.count(1)
    assert (entry.key, entry.value) == ("a", b"")
    consumers = await bench.driver.js.consumers_info(f"KV_{name}")
    assert consumers[0].config.inactive_threshold == 9


async def test_a_watched_bucket_that_must_exist(bench):
    for options in (
        {"kv_watch": KvWatch(unique(), declare=False)},
        {"obj_watch": ObjWatch(declare=False)},
    ):
        with pytest.raises(SetupError, match="does not exist"):
            await bench.subscribe(unique(), **options)


async def test_a_watched_bucket_that_is_deleted_comes_back(bench):
    name = unique()
    taken = await bench.subscribe(kv_watch=name)
    kv = await bench.driver.stores.key_value(name)
    await kv.put("a", b"1")
    await taken.count(1)
    await bench.driver.js.delete_key_value(name)

    async def again():
        await (await bench.driver.stores.key_value(name)).put("a", b"2")
        return True

    async def there():
        return await bench.driver.streams.info(f"KV_{name}") and True

    await eventually(lambda: f"KV_{name}" in bench.driver.stores.opened and _ok(there), 10)
    await again()
    await eventually(lambda: [e.value for e in taken.raws][-1] == b"2", 15)


async def _ok(call):
    try:
        return await call()
    except Exception:
        return False


async def test_an_object_store(bench):
    name = unique()
    store = await bench.driver.stores.object_storage(name)
    await store.put("old", b"0")
    taken = await bench.subscribe(name, obj_watch=True)
    await store.put("new", b"1" * 300_000)
    await store.delete("old")
    await taken.count(3)
    seen = [(o.name, o.size, bool(o.deleted)) for o in taken.raws]
    assert seen[0] == ("old", 1, False)
    assert seen[1] == ("new", 300_000, False) and seen[2] == ("old", 0, True)
    message = NatsObjMessage(taken.raws[1], Link(bench.driver, taken.intake.spec))
    assert (message.body, message.destination, message.content_type) == (b"new", name, "text/plain")
    assert (await message.storage.get("new")).data == b"1" * 300_000


async def test_an_object_store_without_deletions(bench):
    name = unique()
    taken = await bench.subscribe(name, obj_watch=ObjWatch(ignore_deletes=True))
    store = await bench.driver.stores.object_storage(name)
    await store.put("a", b"1")
    await taken.count(1)  # its deletion replaces it in the store's stream
    await store.delete("a")
    await store.put("b", b"2")
    await taken.count(2)
    assert [o.name for o in taken.raws] == ["a", "b"]
