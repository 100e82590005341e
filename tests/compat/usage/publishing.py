"""The ways to publish: broker, decorator, publisher object; responses and requests."""

from faststream import Response
from faststream.nats import NatsBroker, NatsMessage, NatsResponse, TestNatsBroker

broker = NatsBroker("nats://localhost:4222")
direct = broker.publisher("direct", headers={"kind": "declared"})
seen = []


@broker.publisher("second")
@broker.publisher("first")
@broker.subscriber("both")
async def both(text: str) -> str:
    return text * 2


@broker.subscriber("first")
async def first(text: str):
    seen.append(("first", text))


@broker.subscriber("second")
async def second(text: str):
    seen.append(("second", text))


@broker.subscriber("direct")
async def on_direct(text: str, message: NatsMessage):
    seen.append(("direct", text, message.headers["kind"], message.headers.get("more")))


@broker.subscriber("with-headers")
@broker.publisher("direct")
async def with_headers(text: str) -> Response:
    return Response(text, headers={"kind": "response"}, correlation_id="c-1")


@broker.subscriber("rpc")
async def rpc(n: int) -> int:
    return n + 1


@broker.subscriber("rpc-response")
async def rpc_response(n: int):
    return NatsResponse({"n": n}, headers={"x": "y"})


@broker.subscriber("answers")
async def answers(n: int):
    seen.append(("answer", n))


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish("ab", "both")
        assert sorted(seen) == [("first", "abab"), ("second", "abab")]
        seen.clear()
        await direct.publish("x")
        await direct.publish("x", headers={"more": "1"})
        await test.publish("x", "with-headers")
        assert seen == [
            ("direct", "x", "declared", None),
            ("direct", "x", "declared", "1"),
            ("direct", "x", "response", None),
        ]
        seen.clear()
        answer = await test.request(1, "rpc", timeout=3.0)
        assert await answer.decode() == 2
        answer = await test.request(1, "rpc-response", correlation_id="c-2", timeout=3.0)
        assert await answer.decode() == {"n": 1}
        assert answer.headers["x"] == "y"
        assert answer.correlation_id == "c-2"
        await test.publish(5, "rpc", reply_to="answers")
        assert seen == [("answer", 6)]
