"""Several handlers on one subscription, chosen by filters."""

from faststream.nats import NatsBroker, TestNatsBroker

broker = NatsBroker("nats://localhost:4222")
subscriber = broker.subscriber("in")


@subscriber(filter=lambda msg: msg.content_type == "application/json")
async def of_json(body: dict):
    return None


@subscriber(filter=lambda msg: msg.headers.get("kind") == "special")
async def special(body: str):
    return None


@subscriber
async def default(body: str):
    return None


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish("text", "in")
        await test.publish("text", "in", headers={"kind": "special"})
        default.mock.assert_called_once_with("text")
        special.mock.assert_called_once_with("text")
        assert not of_json.mock.called
