"""The driver of topics inside the process, and their dead letters."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn

from ..ack import Settlement
from ..address import Address, AddressSyntax
from ..clock import Clock, LoopClock
from ..driver import PublishCommand, Sink, Spec, SubscriptionSpec
from ..errors import (
    AddressError,
    CapabilityError,
    MessageTooLarge,
    NoLetters,
    NoResponders,
    NotConnected,
    RequestTimeout,
)
from ..letters import Letter
from ..message import Link, Message, new_id
from .bus import Delivery, Entry, MemoryBus, MemoryIntake, Record, Source, Store
from .options import MemoryMessage, MemoryPublish

#: Seconds a publisher waits for room when nothing else is said.
_PATIENCE = 5.0


class MemoryLetters:
    """The dead letters of one address of the bus; they end with the process."""

    #: What the ids are ordered by.
    order: ClassVar[Callable[[str], Any]] = int

    def __init__(self, driver: MemoryDriver, address: str) -> None:
        self.driver, self.address = driver, address
        self._link = Link(driver, None)

    def records(self) -> dict[str, Record]:
        """The letters by their ids, oldest first.

        Raises:
            NoLetters: nothing keeps what is sent to the address.
        """
        if not self.driver.keeps_letters(self.address):
            raise NoLetters(f"nothing keeps {self.address!r} in this process")
        return {str(r.sequence): r for r in self.driver.bus.records(self.address)}

    async def read(
        self, limit: int | None = None, after: str | None = None
    ) -> AsyncIterator[Letter]:
        order, found = type(self).order, self.records().items()
        for id, record in [p for p in found if after is None or order(p[0]) > order(after)][:limit]:
            raw = self.driver.raw(Delivery(Entry(record)), None)
            message = self.driver.reply_envelope()(raw, self._link)
            yield Letter(id, message, datetime.fromtimestamp(record.timestamp, UTC))

    async def count(self) -> int:
        return len(self.records())

    async def remove(self, id: str) -> bool:
        return self.driver.bus.forget(self.address, int(id))

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        command = self.driver.command()
        taken = await self.driver._send(command, letter.origin, letter.message.body, headers, "")
        if not taken and not self.driver.bus.keeps(letter.origin):
            raise NoResponders(f"nobody listens at {letter.origin!r}")


class MemoryDriver:
    """Topics in this process.

    A subclass gives them the address rules and the raw objects of another broker, by the
    class's attributes and by ``source``, ``raw``, ``letters_at`` and ``keep_letters``.

    Args:
        bus: the topics; its own by default.
        clock: what all delays and deadlines go by.
    """

    name: ClassVar[str] = "memory"
    syntax: ClassVar[AddressSyntax] = AddressSyntax()
    command: ClassVar[type[PublishCommand]] = MemoryPublish
    control_headers: ClassVar[str | tuple[str, ...]] = ""
    #: Bytes of the largest body and its headers; 0 is no limit.
    max_payload: int = 0
    #: What wraps a reply and a letter.
    envelope: ClassVar[type[Message[Any]]] = MemoryMessage
    bus_class: ClassVar[type[MemoryBus]] = MemoryBus
    letters_class: ClassVar[type[MemoryLetters]] = MemoryLetters

    def __init__(self, bus: MemoryBus | None = None, *, clock: Clock | None = None) -> None:
        self.bus = bus if bus is not None else self.bus_class()
        self.clock: Clock = clock if clock is not None else LoopClock()
        self.notify: Callable[[str, str], None] = lambda event, reason: None
        #: Called with each message for each of its takers, before they get it.
        self.routed: Callable[[Entry], None] = lambda entry: None
        self.connected = False
        self._intakes: list[MemoryIntake] = []

    # What another broker's double overrides

    def source(self, spec: Any) -> Source:
        """Where a subscription takes its messages from."""
        if spec.durable is None:
            return Source(patterns=(spec.subject,), group=spec.queue)
        return Source(
            patterns=(spec.subject,),
            durable=spec.durable,
            ack_wait=spec.ack_deadline,
            replay="all",
        )

    def compile(self, source: Source) -> list[Address]:
        return [self.syntax.compile(pattern) for pattern in source.patterns]

    def raw(self, delivery: Delivery, source: Source | None) -> Any:
        """The object that the message class wraps; ``source`` is None for a reply or a letter."""
        return delivery

    def letters_at(self, spec: Any, name: str | None) -> str:
        """The address of a subscription's dead letters."""
        return name or f"{_literal(spec.destination, self.syntax)}.dlq"

    async def keep_letters(self, address: str) -> None:
        """Keep what is sent to an address from now on."""
        self.bus.keep(address, self.compile(Source(patterns=(address,))))

    def keeps_letters(self, address: str) -> bool:
        """Whether what is sent to an address is kept."""
        return self.bus.keeps(address)

    def settlement(self, how: Settlement, options: Mapping[str, Any]) -> Settlement:
        """What a broker's own options make of a settlement; here they mean nothing."""
        return how

    @classmethod
    def only_real(cls, what: str) -> NoReturn:
        """Refuse what needs a server."""
        raise CapabilityError(
            f"{what} needs a server",
            fix=f"test it with Test{cls.name.capitalize()}Broker(broker, with_real=True)",
        )

    # The driver

    def reply_envelope(self) -> type[Message[Any]]:
        return self.envelope

    def describe(self) -> str:
        return f"{self.name} (in memory)" if self.name != "memory" else "memory"

    async def connect(self) -> None:
        self.connected = True

    async def close(self) -> None:
        self.connected = False
        for intake in self._intakes:
            await intake.close()
        self._intakes.clear()

    async def ping(self, timeout: float) -> bool:
        return self.connected

    async def declare(self, specs: Sequence[Spec]) -> None:
        for spec in specs:
            if isinstance(spec, SubscriptionSpec):
                source = self.source(spec)
                addresses = self.compile(source)
                if source.kept:
                    self.bus.keep(source.kept, addresses)
                if source.durable:
                    self.bus.store(source, addresses)

    async def subscribe(
        self, spec: SubscriptionSpec, sink: Sink, lost: Callable[[Exception], None]
    ) -> MemoryIntake:
        self._check_connected()
        intake = MemoryIntake(self, spec, sink, lost)
        self._intakes = [i for i in self._intakes if not i.task.done()]
        self._intakes.append(intake)
        return intake

    async def publish(self, command: Any, data: bytes, headers: dict[str, str] | None) -> Any:
        await self._send(command, command.destination, data, headers, command.reply_to)
        return None

    async def request(
        self, command: Any, data: bytes, headers: dict[str, str] | None, timeout: float
    ) -> Any:
        inbox = f"_INBOX.{new_id()}"
        future = asyncio.get_running_loop().create_future()
        self.bus.inboxes[inbox] = future
        late = RequestTimeout(f"no reply from {command.destination!r} within {timeout:g} s")
        timer = self.clock.call_later(timeout, _expire, future, late)
        try:
            if not await self._send(command, command.destination, data, headers, inbox):
                raise NoResponders(f"nobody listens at {command.destination!r}")
            return self.raw(Delivery(Entry(await future)), None)
        finally:
            timer.cancel()
            del self.bus.inboxes[inbox]

    async def dead_letter(
        self, spec: SubscriptionSpec, name: str | None, *, declare: bool = True
    ) -> str:
        address = self.letters_at(spec, name)
        if declare:
            await self.keep_letters(address)
        return address

    def letters(self, address: str) -> MemoryLetters:
        return self.letters_class(self, address)

    # Sending

    def _check_connected(self) -> None:
        if not self.connected:
            raise NotConnected(
                f"the {self.name} broker is not connected: start it, or `await broker.connect()`",
                state="closed",
                wanted="connected",
            )

    async def _send(
        self,
        command: PublishCommand,
        destination: str,
        data: bytes,
        headers: dict[str, str] | None,
        reply_to: str,
    ) -> int:
        """Send a message and return how many takers it has."""
        self._check_connected()
        self._check_address(destination)
        if self.max_payload:
            size = len(data) + sum(len(k) + len(v) + 4 for k, v in (headers or {}).items())
            if size > self.max_payload:
                raise MessageTooLarge(
                    f"{size} bytes to {destination!r}: the broker takes {self.max_payload} at most"
                )
        bus, patience = self.bus, _PATIENCE if command.timeout is None else command.timeout
        await bus.room(destination, patience, self.clock)
        bus.sequence += 1
        record = Record(
            destination, data, dict(headers or {}), reply_to, bus.sequence, self.clock.wall()
        )
        inbox = bus.inboxes.get(destination)
        if inbox is not None:
            if not inbox.done():
                inbox.set_result(record)
            return 1
        if bus.keeps(destination):
            bus.held.setdefault(destination, deque(maxlen=bus.kept)).append(record)
        takers = bus.takers(destination)
        for store in takers:
            self.hand(record, store)
        return len(takers)

    def hand(self, record: Record, store: Store) -> None:
        """Give a message to a store."""
        entry = Entry(record, store)
        self.routed(entry)
        store.put(entry)

    def _check_address(self, destination: str) -> None:
        segments = destination.split(self.syntax.separator)
        if not destination or self.syntax.one in segments or self.syntax.rest in segments:
            raise AddressError(
                f"a message cannot be sent to {destination!r}",
                fix="give an address without wildcards",
            )


def _expire(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _literal(template: str, syntax: AddressSyntax) -> str:
    """An address that messages can be sent to, made from a pattern."""
    words = {syntax.one: "any", syntax.rest: "all"}
    segments = template.split(syntax.separator)
    return syntax.separator.join(words.get(s, s.strip("{}")) for s in segments)
