"""Bundles: what a batch is kept account of must say the same as message by message."""

from __future__ import annotations

import random
from typing import Any

import pytest

from millstream.kafka.message import Bundle, Record
from millstream.kafka.offsets import Partition, Place, bundles, records


class Sent:
    """A message as the client library has it."""

    def __init__(self, offset: int, headers: Any = None, partition: int = 0) -> None:
        self.at, self.pairs, self.number = offset, headers, partition

    def topic(self) -> str:
        return "t"

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return None

    def value(self) -> bytes | None:
        return b"%d" % self.at if self.at % 7 else None

    def headers(self) -> Any:
        return self.pairs


def partition(start: int = 0, note: str | None = "", number: int = 0) -> Partition:
    return Partition(Place("t", number), start, note)


def give(part: Partition, record: Record) -> None:
    """As the pump does."""
    part.running += 1
    record.given = True
    part.given = max(part.given, record.offset + 1)


def finish(part: Partition, record: Record) -> None:
    part.running -= 1
    part.finish(record)


@pytest.mark.parametrize("seed", range(60))
def test_notes_are_those_of_single_messages(seed: int) -> None:
    dice = random.Random(seed)
    offsets = sorted(dice.sample(range(300), 200))  # a log has gaps
    one, other = partition(), partition()
    singles = {r.offset: r for r in records([*map(Sent, offsets)], {("t", 0): one})}
    made = bundles([*map(Sent, offsets)], {("t", 0): other}, 32)
    assert [type(b) for b in made] == [Bundle] * 7 and sum(b.size for b in made) == 200
    waiting, running = list(made), list[Record]()
    while waiting or running:
        if waiting and dice.random() < 0.5:
            bundle = waiting.pop(0)
            if isinstance(bundle, Bundle) and bundle.size > 1 and dice.random() < 0.3:
                waiting.insert(0, bundle.split(dice.randrange(1, bundle.size)))
            give(other, bundle)
            mine = [sent.at for sent in bundle.origin] if isinstance(bundle, Bundle) else []
            for offset in mine:
                give(one, singles[offset])
            running.append(bundle)
        elif running:
            record = running.pop(dice.randrange(len(running)))
            if isinstance(record, Bundle) and dice.random() < 0.4:
                running += record.apart()
                assert record.apart() is record.apart()
            elif isinstance(record, Bundle):
                for sent in record.origin:
                    finish(one, singles[sent.at])
                finish(other, record)
                assert all(single.done for single in record.apart())
            else:
                finish(one, singles[record.offset])
                finish(other, record)
        for leaving in (False, True):
            assert other.commit(leaving=leaving) == one.commit(leaving=leaving)
        assert bool(other.running) == bool(one.running)
        assert other.committable == one.committable
    assert other.committable == offsets[-1] + 1 and not other.open and not other.running


def test_bodies_of_tombstones_are_empty() -> None:
    [bundle] = bundles([Sent(6), Sent(7), Sent(8)], {("t", 0): partition()}, 10)
    assert isinstance(bundle, Bundle) and bundle.bodies() == [b"6", b"", b"8"]
    assert [single.value for single in bundle.apart()] == [b"6", None, b"8"]


def test_what_has_to_be_looked_at_is_in_no_bundle() -> None:
    crashed, known = partition(0, '{"h":5}'), partition(3, number=1)
    foreign = [("content-type", b"text/plain")]
    ours = [("ms-replay-to", b"somebody")]
    messages = [
        Sent(0),  # somebody crashed on one of these
        Sent(2, partition=1),  # known already
        Sent(3, foreign, partition=1),
        Sent(4, partition=1),
        Sent(1, partition=9),  # not ours
        Sent(5, ours, partition=1),
        Sent(6, partition=1),
    ]
    parts = {("t", 0): crashed, ("t", 1): known}
    found = bundles(messages, parts, 10)
    assert [(type(r), r.partition, r.offset) for r in found] == [
        (Record, 0, 0),
        (Record, 1, 3),
        (Record, 1, 4),
        (Record, 1, 5),
        (Record, 1, 6),
    ]
    assert found[0].count == 2 and found[3].marked
    [last] = bundles([Sent(7, foreign, 1), Sent(8, None, 1)], parts, 10)
    assert isinstance(last, Bundle) and last.offsets == [7, 8]
