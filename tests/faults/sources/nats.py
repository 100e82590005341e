"""Core NATS and JetStream."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy
from nats.js.errors import NotFoundError

from millstream.errors import NoResponders
from millstream.nats import ConsumerConfig, JStream, NatsBroker
from millstream.nats.options import NatsSubscription
from tests.faults.sources.base import Setup, Source
from tests.servers import NatsServer

WATCHED = 'ping_interval: "1s"\nping_max: 2\n'
LOGINS = """
server_name: {name}
authorization {{ users: [
  {{ user: sender, password: pw }}
  {{ user: worker, password: pw, permissions: {{ publish: {{ deny: [{deny}] }} }} }}
] }}
"""
SUBJECTS = {"": "", "fetch": '"$JS.API.CONSUMER.MSG.NEXT.>"', "acknowledge": '"$JS.ACK.>"'}


class Core(Source):
    """Core NATS: at most once."""

    name = "nats-core"
    confirms = False
    capabilities = NatsSubscription("a", queue="q").capabilities
    max_message = 1 << 20
    nobody = NoResponders

    def server(self, setup: Setup) -> NatsServer:
        server = NatsServer(config=WATCHED if setup.watched else "")
        if setup.logins:
            self.forbid(server, "")
        return server

    def url(self, port: int, user: str = "") -> str:
        return f"nats://{f'{user}:pw@' if user else ''}127.0.0.1:{port}"

    def broker(self, setup: Setup) -> NatsBroker:
        return NatsBroker(
            setup.url,
            graceful_timeout=setup.grace,
            publish_timeout=setup.publish_timeout,
            reconnect_time_wait=setup.reconnect,
            ping_interval=setup.ping,
            js_options={"timeout": 2.0},
        )

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {"queue": "workers"}

    def answering(self, setup: Setup) -> dict[str, Any]:
        return {"queue": "answering"}

    def asking(self, broker: Any) -> int:
        return len(broker.driver.outbox.replies.asked)

    def forbid(self, server: Any, what: str) -> None:
        server.config = LOGINS.format(name=server.server_name, deny=SUBJECTS[what])
        if server.running:
            (server.folder / "nats.conf").write_text(server.config)
            os.kill(server.pid, signal.SIGHUP)


class JetStream(Core):
    """A durable consumer of a stream."""

    name = "jetstream"
    confirms = True
    once = True
    capabilities = NatsSubscription("a", stream="s", durable="d").capabilities
    nobody = None
    full = "maximum bytes"
    forbids = ("fetch", "acknowledge")
    denied = "[Pp]ermissions violation"

    def subscription(self, setup: Setup) -> dict[str, Any]:
        limits: dict[str, Any] = {
            "max_bytes": setup.room,
            "discard": DiscardPolicy.NEW,
            "retention": RetentionPolicy.WORK_QUEUE,
        }
        return {
            "stream": JStream(setup.name, **(limits if setup.room else {})),
            "durable": "workers",
            "config": ConsumerConfig(ack_wait=setup.ack_wait),
        }

    def results(self, setup: Setup) -> dict[str, Any]:
        return {"stream": f"{setup.name}-out"}

    def publication(self, setup: Setup, id: str) -> dict[str, Any]:
        return {"stream": setup.name, "message_id": id}

    async def held(self, broker: Any, setup: Setup) -> int:
        info = await broker.js.consumer_info(setup.name, "workers", timeout=2)
        return int(info.num_pending + info.num_ack_pending)

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        return [m async for m in _stored(broker.js, f"{setup.name}_dlq")]

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        return [body async for body, _ in _stored(broker.js, f"{setup.name}-out")]

    def wipe(self, server: Any) -> None:
        shutil.rmtree(server.folder / "store")

    async def delete_source(self, broker: Any, setup: Setup) -> None:
        await broker.js.delete_stream(setup.name)

    async def delete_group(self, broker: Any, setup: Setup) -> None:
        await broker.js.delete_consumer(setup.name, "workers")

    async def refuse_letters(self, broker: Any, setup: Setup) -> None:
        # One message fills it, and it takes no other one.
        name, subject = f"{setup.name}_dlq", f"{setup.name}.dlq"
        await broker.js.add_stream(
            name=name, subjects=[subject], max_msgs=1, discard=DiscardPolicy.NEW
        )
        await broker.js.publish(subject, b'{"id": "other"}')

    async def take_letters(self, broker: Any, setup: Setup) -> None:
        await broker.js.purge_stream(f"{setup.name}_dlq")


async def _stored(js: JetStreamContext, stream: str) -> AsyncIterator[tuple[bytes, dict[str, str]]]:
    try:
        state = (await js.stream_info(stream)).state
    except NotFoundError:
        return
    for sequence in range(state.first_seq, state.last_seq + 1):
        try:
            message = await js.get_msg(stream, sequence)
        except NotFoundError:
            continue
        yield message.data or b"", dict(message.headers or {})
