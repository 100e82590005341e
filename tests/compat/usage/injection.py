"""Context, dependencies and annotations."""

from typing import Annotated

from faststream import Context, ContextRepo, Depends, FastStream, Header, Logger, Path
from faststream.nats import NatsBroker, TestApp, TestNatsBroker
from faststream.nats.annotations import ContextRepo as ContextRepoAnnotation
from faststream.nats.annotations import NatsBroker as BrokerAnnotation
from faststream.nats.annotations import NatsMessage as MessageAnnotation

broker = NatsBroker("nats://localhost:4222")
app = FastStream(broker)
seen = []
closed = []


@app.on_startup
async def configure(context: ContextRepo):
    context.set_global("secret", "42")


def user_header(user: str = Header()) -> str:
    return user


async def nested(name: Annotated[str, Depends(user_header)]) -> str:
    return name.upper()


async def session():
    yield "session"
    closed.append("session")


@broker.subscriber("in.{region}")
async def handle(
    body: dict,
    message: MessageAnnotation,
    logger: Logger,
    used: BrokerAnnotation,
    repo: ContextRepoAnnotation,
    region: str = Path(),
    same=Context("message"),
    token: str = Context("message.headers.token", default="none"),
    secret: str = Context(),
    missing: str = Context("nothing.here", default="fallback"),
    counted: list = Context("collected", initial=list),
    loud=Depends(nested),
    db=Depends(session),
):
    assert message is same
    assert used is broker
    assert repo.get("secret") == "42"
    assert message.correlation_id
    counted.append(body)
    seen.append((region, token, secret, missing, loud, db, len(counted)))


async def check():
    async with TestNatsBroker(broker) as test, TestApp(app):
        headers = {"user": "ada", "token": "t"}
        await test.publish({}, "in.eu", headers=headers)
        await test.publish({}, "in.us", headers={"user": "bob"})
    assert seen == [
        ("eu", "t", "42", "fallback", "ADA", "session", 1),
        ("us", "none", "42", "fallback", "BOB", "session", 2),
    ]
    assert closed == ["session", "session"]
