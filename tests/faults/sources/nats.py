"""Core NATS and JetStream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from millstream.nats import ConsumerConfig, JStream, NatsBroker
from tests.faults.sources.base import Setup, Source


class Core(Source):
    """Core NATS: at most once."""

    name = "nats-core"
    confirms = False

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


class JetStream(Core):
    """A durable consumer of a stream."""

    name = "jetstream"
    confirms = True

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {
            "stream": JStream(setup.name, **setup.stream),
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
