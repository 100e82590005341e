"""A handler that publishes, tested in memory; mocks see decoded bodies."""

from faststream import FastStream, Logger
from faststream.nats import NatsBroker, TestNatsBroker
from pydantic import BaseModel, Field, PositiveInt


class User(BaseModel):
    name: str = Field(..., examples=["Ada"])
    age: PositiveInt


broker = NatsBroker("nats://localhost:4222")
app = FastStream(broker)


@broker.subscriber("users.in")
@broker.publisher("users.out")
async def greet(user: User, logger: Logger) -> str:
    logger.info("%s", user)
    return f"{user.name} is {user.age}"


@broker.subscriber("users.out")
async def read(text: str):
    return None


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish({"name": "Ada", "age": 36}, "users.in")
        greet.mock.assert_called_once_with({"name": "Ada", "age": 36})
        read.mock.assert_called_once_with("Ada is 36")
    # A handler stays an ordinary function.
    assert await read("x") is None
