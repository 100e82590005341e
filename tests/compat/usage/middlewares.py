"""Middlewares with the four hooks, and handlers for exceptions."""

from faststream import BaseMiddleware, Context, ExceptionMiddleware
from faststream.nats import NatsBroker, NatsRouter, TestNatsBroker

log = []


class Outer(BaseMiddleware):
    async def on_receive(self):
        log.append("receive")
        return await super().on_receive()

    async def consume_scope(self, call_next, msg):
        log.append("outer in")
        result = await call_next(msg)
        log.append("outer out")
        return result

    async def publish_scope(self, call_next, cmd):
        cmd.headers["stamped"] = "yes"
        log.append("publish")
        return await call_next(cmd)

    async def after_processed(self, exc_type=None, exc_val=None, exc_tb=None):
        log.append(f"processed {exc_type.__name__ if exc_type else None}")
        return await super().after_processed(exc_type, exc_val, exc_tb)


class Inner(BaseMiddleware):
    async def consume_scope(self, call_next, msg):
        log.append("inner in")
        return await call_next(msg)


errors = ExceptionMiddleware()


@errors.add_handler(ZeroDivisionError)
def on_zero(error: ZeroDivisionError, message=Context()):
    log.append(f"zero {message.headers.get('stamped')}")


@errors.add_handler(ValueError, publish=True)
async def on_value(error: ValueError) -> str:
    return f"default for {error}"


broker = NatsBroker("nats://localhost:4222", middlewares=[errors, Outer])
router = NatsRouter(middlewares=[Inner])


@router.subscriber("ok")
@router.publisher("result")
async def ok(n: int) -> int:
    return n


@router.subscriber("zero")
async def zero(n: int):
    return n / 0


@router.subscriber("value")
@router.publisher("result")
async def value(n: int) -> int:
    raise ValueError("x")


@router.subscriber("result")
async def result(body, stamped: str = Context("message.headers.stamped")):
    log.append(f"result {body} {stamped}")


broker.include_router(router)


async def check():
    async with TestNatsBroker(broker) as test:
        await test.publish(1, "ok")
        # `after_processed` follows the handler, directly or after the publications.
        assert log.count("processed None") == 2
        assert [line for line in log if line != "processed None"] == [
            "publish",
            "receive",
            "outer in",
            "inner in",
            "outer out",
            "publish",
            "receive",
            "outer in",
            "inner in",
            "result 1 yes",
            "outer out",
        ], log
        log.clear()
        await test.publish(1, "zero")
        assert "zero yes" in log
        log.clear()
        await test.publish(1, "value")
        assert "result default for x yes" in log
