"""Routers with prefixes, nested; routes declared as values."""

from faststream import Depends, FastStream
from faststream.nats import NatsBroker, NatsPublisher, NatsRoute, NatsRouter, TestNatsBroker

broker = NatsBroker("nats://localhost:4222")
app = FastStream(broker)
calls = []


def audit():
    calls.append("audit")


async def routed(name: str, user_id: int):
    calls.append(("routed", name, user_id))
    return "done"


router = NatsRouter(
    prefix="core.",
    dependencies=[Depends(audit)],
    handlers=(NatsRoute(routed, "routed", publishers=(NatsPublisher("routed.out"),)),),
)
inner = NatsRouter(prefix="inner.")
publisher = inner.publisher("result")


@router.subscriber("users")
@router.publisher("users.out")
async def users(name: str) -> str:
    return name.upper()


@broker.subscriber("core.users.out")
async def out(name: str):
    calls.append(("out", name))


@broker.subscriber("core.routed.out")
async def routed_out(text: str):
    calls.append(("routed_out", text))


@inner.subscriber("start")
async def start(n: int):
    await publisher.publish(n + 1)


@broker.subscriber("core.inner.result")
async def result(n: int):
    calls.append(("result", n))


router.include_router(inner)
broker.include_router(router)


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish("ada", "core.users")
        await test.publish({"name": "ada", "user_id": 1}, "core.routed")
        await test.publish(1, "core.inner.start")
        users.mock.assert_called_once_with("ada")
        publisher.mock.assert_called_once_with(2)
    assert calls == [
        "audit",
        ("out", "ADA"),
        "audit",
        ("routed", "ada", 1),
        ("routed_out", "done"),
        "audit",
        ("result", 2),
    ]
