"""Requests and replies."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from millstream import Response
from millstream.driver import Capability
from millstream.errors import NoResponders, RemoteError, RequestTimeout
from millstream.message import Message
from millstream.retry import Retry
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs


class Total(msgspec.Struct):
    total: float


@needs(Capability.REPLY, requests=True)
async def test_a_request_gets_the_handlers_result(bench: Bench) -> None:
    @bench.subscriber(bench.address("double"))
    async def double(body: int) -> int:
        return body * 2

    await bench.start()
    replies = await asyncio.gather(
        *(bench.broker.request(i, bench.address("double"), timeout=5.0) for i in range(10))
    )
    assert [await reply.decode() for reply in replies] == [i * 2 for i in range(10)]


@needs(Capability.REPLY | Capability.HEADERS, requests=True)
async def test_a_reply_carries_headers_and_the_correlation_id(bench: Bench) -> None:
    @bench.subscriber(bench.address("ask"))
    async def answer(body: str) -> Any:
        return Response(body.upper(), headers={"who": "me"})

    await bench.start()
    reply: Message[Any] = await bench.second.request(
        "x", bench.address("ask"), correlation_id="c-3", timeout=5.0
    )
    assert (await reply.decode(), reply.headers["who"], reply.correlation_id) == ("X", "me", "c-3")


@needs(Capability.REPLY, requests=True)
async def test_a_failed_handler_reaches_the_caller_as_remote_error(bench: Bench) -> None:
    text = "no such order\n  in C:\\new"

    @bench.subscriber(bench.address("fails"), retry=Retry(attempts=1))
    async def fails(body: int) -> int:
        raise LookupError(text)

    await bench.start()
    with pytest.raises(RemoteError, match="no such order") as caught:
        await bench.broker.request(1, bench.address("fails"), timeout=5.0)
    assert caught.value.type.endswith("LookupError")
    assert caught.value.text == text


@needs(Capability.REPLY, requests=True)
async def test_a_request_that_cannot_be_decoded_is_a_remote_error(bench: Bench) -> None:
    @bench.subscriber(bench.address("strict"))
    async def strict(body: Total) -> int:
        return 1

    await bench.start()
    with pytest.raises(RemoteError) as caught:
        await bench.broker.request({"total": "much"}, bench.address("strict"), timeout=5.0)
    assert caught.value.type.endswith("DecodeError")


@needs(Capability.REPLY, "absence", requests=True)
async def test_a_request_to_nobody_fails_at_once(bench: Bench) -> None:
    await bench.start()
    begin = bench.now()
    with pytest.raises(NoResponders, match="nobody"):
        await bench.within(bench.broker.request(1, bench.address("nobody"), timeout=5.0))
    assert bench.now() - begin < 4.0


@needs(Capability.REPLY, requests=True)
async def test_a_request_without_an_answer_ends_in_time(bench: Bench) -> None:
    gate = asyncio.Event()

    @bench.subscriber(bench.address("silent"))
    async def silent(body: int) -> int:
        await gate.wait()
        return body

    await bench.start()
    begin = bench.now()
    with pytest.raises(RequestTimeout, match="silent"):
        await bench.within(bench.broker.request(1, bench.address("silent"), timeout=0.3))
    assert 0.25 <= bench.now() - begin < 3.0
    gate.set()


@needs(Capability.REPLY)
async def test_reply_to_sends_the_result_to_another_subscription(bench: Bench) -> None:
    got: list[int] = []

    @bench.subscriber(bench.address("work"))
    async def work(body: int) -> int:
        return body + 1

    @bench.subscriber(bench.address("results"))
    async def results(body: int) -> None:
        got.append(body)

    await bench.start()
    await bench.broker.publish(
        1, bench.address("work"), reply_to=bench.address("results"), **bench.stored
    )
    await bench.until(lambda: got)
    assert got == [2]


@needs(Capability.REPLY)
async def test_no_reply_means_none(bench: Bench) -> None:
    got: list[Any] = []

    @bench.subscriber(bench.address("work"), no_reply=True)
    async def work(body: int) -> int:
        got.append(body)
        return body + 1

    @bench.subscriber(bench.address("results"))
    async def results(body: int) -> None:
        got.append(("reply", body))

    await bench.start()
    await bench.broker.publish(
        1, bench.address("work"), reply_to=bench.address("results"), **bench.stored
    )
    await bench.until(lambda: got)
    await bench.quiet()
    assert got == [1]
