"""Key-value buckets and object stores, opened once, and what their watchers see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
from nats.aio.msg import Msg
from nats.js.api import KeyValueConfig, ObjectInfo, ObjectStoreConfig
from nats.js.errors import (
    BadBucketError,
    BucketNotFoundError,
    Error,
    InvalidBucketNameError,
    NotFoundError,
)
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from ..errors import SetupError
from .options import KvWatch, NatsSubscription, ObjWatch

if TYPE_CHECKING:
    from .driver import NatsDriver

#: Reasons of the server's own delete markers (ADR-48), as the operation they stand for.
_MARKERS = {"MaxAge": "PURGE", "Purge": "PURGE", "Remove": "DEL"}


class Stores:
    """The buckets of one connection."""

    def __init__(self, driver: NatsDriver) -> None:
        self.driver = driver
        #: Stream name → the opened store.
        self.opened: dict[str, Any] = {}

    async def declare(self, spec: NatsSubscription) -> None:
        """Open what a watcher watches, creating it unless it must exist."""
        if spec.kv is not None:
            await self.key_value(spec.kv.name, declare=spec.kv.declare)
        elif spec.obj is not None:
            await self.object_storage(spec.subject, declare=spec.obj.declare)

    async def ensure(self, spec: NatsSubscription) -> dict[str, Any]:
        """The description of a watched store's stream; a store that vanished is made again."""
        stream = spec.stream_name or ""
        try:
            return await self.driver.streams.info(stream)
        except NotFoundError:
            self.opened.pop(stream, None)
            await self.declare(spec)
            return await self.driver.streams.info(stream)

    async def key_value(self, bucket: str, *, declare: bool = True, **settings: Any) -> KeyValue:
        opened = await self._open("key_value", f"KV_{bucket}", bucket, declare, settings)
        return cast(KeyValue, opened)

    async def object_storage(
        self, bucket: str, *, declare: bool = True, **settings: Any
    ) -> ObjectStore:
        opened = await self._open("object_store", f"OBJ_{bucket}", bucket, declare, settings)
        return cast(ObjectStore, opened)

    async def _open(
        self, kind: str, stream: str, bucket: str, declare: bool, settings: dict[str, Any]
    ) -> Any:
        known = self.opened.get(stream)
        if known is not None:
            return known
        js = self.driver.js
        try:
            try:
                store = await getattr(js, kind)(bucket)
            except BucketNotFoundError:
                if not declare:
                    raise SetupError(
                        f"bucket {bucket!r} does not exist",
                        fix="create it, or leave out declare=False to have it created",
                    ) from None
                settings = {key: value for key, value in settings.items() if value is not None}
                if kind == "key_value":
                    store = await js.create_key_value(KeyValueConfig(bucket=bucket, **settings))
                else:
                    config = ObjectStoreConfig(bucket=bucket, **settings)
                    store = await js.create_object_store(bucket, config)
        except (InvalidBucketNameError, BadBucketError) as error:
            raise SetupError(
                f"{bucket!r} is no bucket", fix="use letters, digits, - and _ only"
            ) from error
        except Error as error:
            raise SetupError(
                f"bucket {bucket!r} cannot be opened: {error}",
                fix="check its settings, and that nats-server runs with JetStream (-js)",
            ) from error
        self.opened[stream] = store
        return store


def entry_of(msg: Msg, watch: KvWatch) -> KeyValue.Entry | None:
    """The change that a message of a bucket's stream stands for; None if it is not wanted."""
    headers = msg.headers or {}
    operation = headers.get("KV-Operation") or _MARKERS.get(headers.get("Nats-Marker-Reason", ""))
    if operation is not None and watch.ignore_deletes:
        return None
    meta = msg.metadata
    return KeyValue.Entry(
        bucket=watch.name,
        key=msg.subject.split(".", 2)[2],
        value=msg.data,
        revision=meta.sequence.stream,
        delta=meta.num_pending,
        created=cast(Any, meta.timestamp),
        operation=operation,
    )


def object_of(msg: Msg, watch: ObjWatch) -> ObjectInfo | None:
    """The object that a message of a store's stream describes; None if it is not wanted."""
    info = ObjectInfo.from_response(msgspec.json.decode(msg.data))
    return None if info.deleted and watch.ignore_deletes else info
