"""What becomes of a message: acks, retries, dead letters, restarts."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from millstream import AckPolicy
from millstream.ack import Settlement
from millstream.broker import State
from millstream.driver import Batch, Capability
from millstream.errors import AckMessage, NackMessage, RejectMessage, StopApplication
from millstream.message import Message
from millstream.retry import DeadLetter, Exponential, Retry
from tests.conformance.bench import Bench
from tests.conformance.conftest import needs

REDELIVERS = Capability.ACK | Capability.NACK


class Order(msgspec.Struct):
    id: int
    amount: float = 0.0


class DeadLetters:
    """Everything that was sent to the address of dead letters."""

    def __init__(self, bench: Bench, address: str) -> None:
        self.got: list[tuple[bytes, dict[str, str]]] = []

        @bench.capture(address)
        async def dead(body: bytes, message: Message[Any]) -> None:
            self.got.append((body, dict(message.headers)))


@needs(Capability.ACK)
async def test_a_message_is_acknowledged_after_its_handler(bench: Bench) -> None:
    seen: list[Message[Any]] = []
    during: list[Any] = []
    gate = asyncio.Event()

    @bench.subscriber(bench.address("acked"))
    async def handler(body: int, message: Message[Any]) -> None:
        seen.append(message)
        await gate.wait()
        during.append(message.committed)

    await bench.start()
    await bench.broker.publish(1, bench.address("acked"))
    await bench.until(lambda: seen)
    assert seen[0].committed is None
    gate.set()
    await bench.until(lambda: seen[0].committed is Settlement.ACK)
    assert during == [None]
    await bench.quiet()
    assert len(seen) == 1


@needs(Capability.ACK)
async def test_ack_first_acknowledges_before_the_handler(bench: Bench) -> None:
    committed: list[Any] = []

    @bench.subscriber(bench.address("first"), ack_policy=AckPolicy.ACK_FIRST)
    async def handler(body: int, message: Message[Any]) -> None:
        committed.append(message.committed)
        raise ValueError("is not tried again")

    await bench.start()
    await bench.broker.publish(1, bench.address("first"))
    await bench.until(lambda: committed)
    await bench.quiet(1.5)
    assert committed == [Settlement.ACK]


@needs(REDELIVERS | Capability.DELIVERY_COUNT)
async def test_a_nack_delivers_again_and_counts(bench: Bench) -> None:
    counts: list[int] = []

    @bench.subscriber(bench.address("nacked"))
    async def handler(body: int, message: Message[Any]) -> None:
        counts.append(message.delivery_count)
        if len(counts) < 3:
            raise NackMessage(delay=0.05)

    await bench.start()
    await bench.broker.publish(1, bench.address("nacked"))
    await bench.until(lambda: len(counts) == 3)
    await bench.quiet()
    assert counts == [1, 2, 3]


@needs(REDELIVERS | Capability.NACK_DELAY)
async def test_the_delay_of_a_nack_is_respected(bench: Bench) -> None:
    times: list[float] = []

    @bench.subscriber(bench.address("later"))
    async def handler(body: int, message: Message[Any]) -> None:
        times.append(bench.now())
        if len(times) == 1:
            await message.nack(delay=0.5)

    await bench.start()
    await bench.broker.publish(1, bench.address("later"))
    await bench.until(lambda: len(times) == 2)
    assert 0.45 <= times[1] - times[0] < 3.0


@needs(REDELIVERS | Capability.NACK_DELAY)
async def test_a_nack_without_a_delay_is_no_hot_loop(bench: Bench) -> None:
    times: list[float] = []

    @bench.subscriber(
        bench.address("hot"), ack_policy=AckPolicy.NACK_ON_ERROR, retry=Retry(delay=0.4)
    )
    async def handler(body: int) -> None:
        times.append(bench.now())
        if len(times) == 1:
            raise NackMessage
        if len(times) == 2:
            raise ValueError("again")

    await bench.start()
    await bench.broker.publish(1, bench.address("hot"))
    await bench.until(lambda: len(times) == 3)
    assert times[1] - times[0] >= 0.35
    assert times[2] - times[1] >= 0.35


@needs(Capability.ACK | Capability.REJECT)
@pytest.mark.parametrize("how", ["raise", "call", "policy"])
async def test_a_rejected_message_does_not_come_again(bench: Bench, how: str) -> None:
    got: list[int] = []
    policy = AckPolicy.REJECT_ON_ERROR if how == "policy" else None

    @bench.subscriber(bench.address("rejected"), ack_policy=policy)
    async def handler(body: int, message: Message[Any]) -> None:
        got.append(body)
        if how == "raise":
            raise RejectMessage
        if how == "call":
            await message.reject()
        else:
            raise ValueError("bad")

    await bench.start()
    await bench.broker.publish(1, bench.address("rejected"))
    await bench.until(lambda: got)
    await bench.quiet(1.5)
    assert got == [1]


@needs(REDELIVERS)
async def test_an_error_is_retried_a_bounded_number_of_times_then_dead(bench: Bench) -> None:
    times: list[float] = []
    address, trash = bench.address("failing"), bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(
        address, retry=Retry(attempts=3, delay=Exponential(0.3, jitter=0.0)), dead_letter=trash
    )
    async def handler(order: Order) -> None:
        times.append(bench.now())
        raise RuntimeError("no stock")

    await bench.start()
    await bench.broker.publish(Order(1), address, headers={"tenant": "acme"})
    await bench.until(lambda: dead.got, 10.0)
    await bench.quiet(0.5)
    assert len(times) == 3
    assert 0.25 <= times[1] - times[0] < 2.0
    assert 0.55 <= times[2] - times[1] < 3.0
    [(body, headers)] = dead.got
    assert body == b'{"id":1,"amount":0.0}'
    assert headers["ms-error"] == "no stock"
    assert headers["ms-error-type"].endswith("RuntimeError")
    assert "no stock" in headers["ms-traceback"]
    assert headers["ms-origin"] == address
    assert headers["ms-attempts"] == "3"
    assert "handler" in headers["ms-handler"]
    assert headers["ms-failed-at"]
    assert headers["tenant"] == "acme"


@needs(REDELIVERS)
async def test_a_retry_that_succeeds_ends_there(bench: Bench) -> None:
    attempts: list[int] = []
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(bench.address("shaky"), retry=Retry(delay=0.1), dead_letter=trash)
    async def handler(body: int, message: Message[Any]) -> None:
        attempts.append(message.attempt)
        if len(attempts) < 3:
            raise ValueError("not yet")

    await bench.start()
    await bench.broker.publish(1, bench.address("shaky"))
    await bench.until(lambda: len(attempts) == 3)
    await bench.quiet(0.5)
    assert attempts == [1, 2, 3]
    assert not dead.got


@needs(REDELIVERS)
async def test_errors_that_are_not_worth_a_retry_are_dead_at_once(bench: Bench) -> None:
    got: list[int] = []
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(
        bench.address("hopeless"), retry=Retry(delay=0.1, on=ConnectionError), dead_letter=trash
    )
    async def handler(body: int) -> None:
        got.append(body)
        raise ValueError("hopeless")

    await bench.start()
    await bench.broker.publish(1, bench.address("hopeless"))
    await bench.until(lambda: dead.got)
    await bench.quiet(0.5)
    assert got == [1]


@needs(REDELIVERS)
async def test_a_body_that_cannot_be_decoded_is_dead_at_once_and_untouched(bench: Bench) -> None:
    got: list[Any] = []
    address, trash = bench.address("poison"), bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(address, dead_letter=trash)
    async def handler(order: Order) -> None:
        got.append(order)

    await bench.start()
    poison = b'{"id": "one",  "amount": 1}'
    await bench.broker.publish(poison, address)
    await bench.broker.publish(b"\xff\x00 not json", address)
    await bench.broker.publish(Order(2), address)
    await bench.until(lambda: len(dead.got) == 2 and got)
    await bench.quiet(0.5)
    assert got == [Order(2)]
    (body, headers), (other, _) = dead.got
    assert body == poison
    assert other == b"\xff\x00 not json"
    assert headers["ms-error-type"].endswith("DecodeError")
    assert "$.id" in headers["ms-error"]
    assert headers["ms-attempts"] == "1"


@needs(REDELIVERS)
async def test_the_dead_letter_can_be_bare(bench: Bench) -> None:
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(
        bench.address("bare"), dead_letter=DeadLetter(trash, headers=False), retry=Retry(attempts=1)
    )
    async def handler(body: int) -> None:
        raise ValueError("cause")

    await bench.start()
    await bench.broker.publish(1, bench.address("bare"))
    await bench.until(lambda: dead.got)
    assert not any(name.startswith("ms-") for name in dead.got[0][1])


@needs(REDELIVERS)
async def test_by_default_the_dead_letter_is_named_after_the_source(bench: Bench) -> None:
    dead = DeadLetters(bench, bench.kind.dead(bench, bench.address("named")))

    @bench.subscriber(bench.address("named"), retry=Retry(attempts=1))
    async def handler(body: int) -> None:
        raise ValueError("cause")

    await bench.start()
    await bench.broker.publish(1, bench.address("named"))
    await bench.until(lambda: dead.got)
    assert dead.got[0][0] == b"1"


@needs(Capability.ACK)
async def test_manual_settles_by_hand(bench: Bench) -> None:
    seen: list[Message[Any]] = []

    @bench.subscriber(bench.address("manual"), ack_policy=AckPolicy.MANUAL)
    async def handler(body: int, message: Message[Any]) -> None:
        seen.append(message)
        if body == 1:
            await message.ack()

    await bench.start()
    await bench.broker.publish(1, bench.address("manual"))
    await bench.broker.publish(2, bench.address("manual"))
    await bench.until(lambda: len(seen) == 2)
    await bench.until(lambda: not bench.broker.subscriptions[0].in_flight)
    assert [m.committed for m in seen] == [Settlement.ACK, None]
    assert await seen[1].ack()
    assert await seen[1].ack()
    assert not await seen[1].reject()


@needs(Capability.ACK)
async def test_a_handler_may_settle_by_an_exception(bench: Bench) -> None:
    seen: list[Message[Any]] = []

    @bench.subscriber(bench.address("raised"))
    async def handler(body: int, message: Message[Any]) -> None:
        seen.append(message)
        raise AckMessage

    await bench.start()
    await bench.broker.publish(1, bench.address("raised"))
    await bench.until(lambda: seen and seen[0].committed)
    assert seen[0].committed is Settlement.ACK


@needs(REDELIVERS, "hand-over")
async def test_what_a_consumer_left_unsettled_is_delivered_to_the_next(bench: Bench) -> None:
    got: list[tuple[str, int, int]] = []
    address = bench.address("left")

    first = bench.subscriber(address, group="g", ack_policy=AckPolicy.MANUAL, persistent=False)

    @first
    async def leaves(body: int, message: Message[Any]) -> None:
        got.append(("first", body, message.delivery_count))

    second = bench.subscriber(address, group="g", on=bench.second, persistent=False)

    @second
    async def takes(body: int, message: Message[Any]) -> None:
        got.append(("second", body, message.delivery_count))

    await bench.start()
    await first.start()
    await bench.broker.publish(1, address)
    await bench.until(lambda: got)
    await first.stop()
    await second.start()
    await bench.until(lambda: len(got) == 2, 10.0)
    await second.stop()
    assert got == [("first", 1, 1), ("second", 1, 2)]


@needs(REDELIVERS, "hand-over")
async def test_stop_finishes_what_runs_and_hands_back_the_rest(bench: Bench) -> None:
    begun: list[int] = []
    finished: list[int] = []
    others: list[int] = []
    gate = asyncio.Event()
    address = bench.address("stopped")

    first = bench.subscriber(address, group="g", concurrency=2, persistent=False)

    @first
    async def slow(body: int) -> None:
        begun.append(body)
        await gate.wait()
        finished.append(body)

    second = bench.subscriber(address, group="g", on=bench.second, persistent=False)

    @second
    async def quick(body: int) -> None:
        others.append(body)

    await bench.start()
    await first.start()
    for i in range(8):
        await bench.broker.publish(i, address)
    await bench.until(lambda: len(begun) == 2)
    stopping = asyncio.create_task(first.stop())
    await second.start()
    # The rest arrives while the first two still run: nobody waits for an ack deadline.
    await bench.until(lambda: len(others) == 6)
    assert not finished
    gate.set()
    await bench.within(stopping)
    assert sorted(finished) == sorted(begun)
    await bench.quiet()
    assert sorted(begun + others) == list(range(8))
    await second.stop()


@needs(REDELIVERS, "hand-over")
async def test_what_does_not_finish_in_time_is_handed_back(bench: Bench) -> None:
    got: list[tuple[str, int]] = []
    address = bench.address("cut")

    first = bench.subscriber(address, group="g", persistent=False)

    @first
    async def endless(body: int, message: Message[Any]) -> None:
        got.append(("first", message.delivery_count))
        await asyncio.Event().wait()

    second = bench.subscriber(address, group="g", on=bench.second, persistent=False)

    @second
    async def quick(body: int, message: Message[Any]) -> None:
        got.append(("second", message.delivery_count))

    await bench.start()
    await first.start()
    await bench.broker.publish(1, address)
    await bench.until(lambda: got)
    await second.start()
    await bench.within(first.running[0].stop(bench.now() + 0.1))
    await bench.until(lambda: len(got) == 2)
    assert [name for name, _ in got] == ["first", "second"]
    await second.stop()


@needs(Capability.ACK | Capability.TOUCH)
async def test_a_handler_may_take_longer_than_the_deadline(bench: Bench) -> None:
    got: list[int] = []
    finished: list[int] = []
    gate = asyncio.Event()

    @bench.subscriber(bench.address("long"))
    async def handler(body: int, message: Message[Any]) -> None:
        got.append(message.delivery_count)
        await gate.wait()
        finished.append(body)

    await bench.start()
    await bench.broker.publish(1, bench.address("long"))
    await bench.until(lambda: got)
    await bench.quiet(2 * bench.broker.subscriptions[0].spec.ack_wait)
    assert got == [1]
    gate.set()
    await bench.until(lambda: finished)
    await bench.quiet(0.2)
    assert got == [1]


@needs(REDELIVERS)
async def test_a_handler_over_its_time_counts_as_failed(bench: Bench) -> None:
    got: list[int] = []
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(
        bench.address("slow"), handler_timeout=0.05, retry=Retry(attempts=1), dead_letter=trash
    )
    async def handler(body: int) -> None:
        got.append(body)
        if body == 1:
            await asyncio.Event().wait()

    await bench.start()
    await bench.broker.publish(1, bench.address("slow"))
    await bench.broker.publish(2, bench.address("slow"))
    await asyncio.sleep(0.1)  # a handler's own time is real, whatever the bench's
    await bench.until(lambda: dead.got and len(got) == 2)
    assert dead.got[0][0] == b"1"
    assert dead.got[0][1]["ms-error-type"] == "TimeoutError"
    assert got == [1, 2]


@needs(REDELIVERS)
async def test_a_bad_message_does_not_spoil_its_batch(bench: Bench) -> None:
    got: list[list[int]] = []
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(bench.address("batch"), batch=Batch(size=4, wait=2.0), dead_letter=trash)
    async def handler(orders: list[Order]) -> None:
        got.append([order.id for order in orders])

    await bench.start()
    for body in (Order(1), b"poison", Order(2), Order(3)):
        await bench.broker.publish(body, bench.address("batch"))
    await bench.until(lambda: got and dead.got)
    await bench.quiet(0.5)
    assert got == [[1, 2, 3]]
    assert [body for body, _ in dead.got] == [b"poison"]


@needs(REDELIVERS)
async def test_a_batch_is_settled_as_one(bench: Bench) -> None:
    got: list[list[int]] = []

    @bench.subscriber(bench.address("batch"), batch=Batch(size=3, wait=0.5), retry=Retry(delay=0.2))
    async def handler(numbers: list[int]) -> None:
        got.append(sorted(numbers))
        if len(got) == 1:
            raise ValueError("once more")

    await bench.start()
    for i in range(3):
        await bench.broker.publish(i, bench.address("batch"))
    await bench.until(lambda: len(got) == 2)
    await bench.quiet(0.5)
    assert got == [[0, 1, 2], [0, 1, 2]]


@needs(REDELIVERS)
async def test_stop_application_hands_its_message_back(bench: Bench) -> None:
    got: list[tuple[str, int]] = []
    address = bench.address("ended")

    @bench.subscriber(address, group="g")
    async def ends(body: int) -> None:
        got.append(("first", body))
        raise StopApplication

    second = bench.subscriber(address, group="g", on=bench.second, persistent=False)

    @second
    async def takes(body: int) -> None:
        got.append(("second", body))

    await bench.start()
    await bench.broker.publish(1, address)
    await bench.until(lambda: bench.broker.state is State.STOPPED)
    await second.start()
    await bench.until(lambda: len(got) == 2)
    assert got == [("first", 1), ("second", 1)]
    await second.stop()


@needs(REDELIVERS)
async def test_what_happened_is_counted(bench: Bench) -> None:
    done: list[int] = []
    trash = bench.address("trash")
    dead = DeadLetters(bench, trash)

    @bench.subscriber(bench.address("counted"), retry=Retry(attempts=1), dead_letter=trash)
    async def handler(body: int) -> None:
        done.append(body)
        if body == 2:
            raise ValueError("two")

    await bench.start()
    for i in (1, 2, 3):
        await bench.broker.publish(i, bench.address("counted"))
    await bench.until(lambda: len(done) == 3 and dead.got)
    await bench.until(lambda: not bench.broker.health()["subscriptions"][-1]["in_flight"])
    [health] = [s for s in bench.broker.health()["subscriptions"] if "counted" in s["source"]]
    assert (health["handled"], health["failed"], health["dead_lettered"]) == (2, 1, 1)
    assert health["state"] == "running"
