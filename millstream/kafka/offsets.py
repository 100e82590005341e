"""What is done of a partition: which offset may be committed, and the notes that go with it.

A group's committed offset says that everything before it is done. Handlers finish in any order,
so only the highest offset without a gap before it is ever committed. A commit carries a text of
up to 4 KiB; in it stands what the offset cannot say, so that the next owner of the partition knows
it: what is done beyond the gap, how often a message was tried, which last attempt was begun, and
whether the owner let go of the partition in order or vanished.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

from ..letters import REPLAY_TO
from .message import Bundle, Record

#: Offsets that count as possibly begun when a process vanished, beyond what its notes say.
SUSPECTS = 500
#: Characters of a note; brokers take 4096 (offset.metadata.max.bytes).
_LARGEST = 3800


class Note(msgspec.Struct, omit_defaults=True):
    """What a commit says besides its offset; offsets are counted from the committed one.

    Fields:
        c: how many owners in a row vanished without moving on from here.
        h: the end of what may have been begun; 0 if the owner let go in order.
        d: what is done, as pairs of first and behind-last.
        t: the attempt that a message is at.
        b: messages whose last attempt was begun.
        o: who wrote it, unless he let go in order.
    """

    c: int = 0
    h: int = 0
    d: list[tuple[int, int]] = msgspec.field(default_factory=list)
    t: dict[int, int] = msgspec.field(default_factory=dict)
    b: list[int] = msgspec.field(default_factory=list)
    o: str = ""


_encode, _decoder = msgspec.json.encode, msgspec.json.Decoder(Note)


def _read(text: str | None) -> Note:
    """The note in a commit; none where somebody else wrote it."""
    if text and text.startswith("{"):
        try:
            return _decoder.decode(text)
        except msgspec.MsgspecError:
            pass
    return Note()


class Place(NamedTuple):
    """Where something stands in a topic."""

    topic: str
    partition: int


class Commit(NamedTuple):
    """What a group is told of one partition."""

    topic: str
    partition: int
    offset: int
    note: str


class Start(NamedTuple):
    """Where a partition begins that just came: the offset, and the note of its last commit."""

    topic: str
    partition: int
    offset: int
    note: str | None


class Partition:
    """One partition while this process owns it.

    Args:
        place: which one.
        start: the offset of the first message to come.
        note: what the last owner's commit says; None where nothing is settled.
        owner: what to sign notes with.
    """

    __slots__ = (
        "begun",
        "committable",
        "committed",
        "crashes",
        "done",
        "fenced",
        "given",
        "next",
        "odd",
        "open",
        "owner",
        "paused",
        "place",
        "plain",
        "running",
        "suspects",
        "tries",
    )
    #: Whether what is done beyond a gap is noted, so that it is not done again.
    notes_done: ClassVar[bool] = True

    def __init__(self, place: Place, start: int, note: str | None, owner: str = "") -> None:
        known = _read(note)
        self.place, self.owner = place, owner
        #: Messages in their order, from the oldest that is not done.
        self.open: deque[Record] = deque()
        #: The offset before which everything is done, and what was last committed.
        self.committable = start
        self.committed: Commit | None = None
        #: The offset behind the last message that was read, or given to a handler.
        self.next = self.given = start
        #: The offset behind the last message that was read with something to be noted of it.
        self.odd = start
        #: Messages that a handler has, or that wait for one.
        self.running = 0
        #: It belongs to another process, or will in a moment.
        self.fenced = False
        #: Nothing more is read for now.
        self.paused = False
        self.crashes = known.c + 1 if known.h else 0
        #: Before this offset messages may have been begun by an owner that vanished.
        self.suspects = start + max(known.h, SUSPECTS) if self.crashes else 0
        self.done = [(start + first, start + end) for first, end in known.d]
        self.tries = {start + offset: count for offset, count in known.t.items()}
        self.begun = {start + offset for offset in known.b}
        #: Nothing is known of messages to come.
        self.plain = not (self.suspects or self.done or self.tries)

    def admit(self, record: Record) -> bool:
        """Take account of a message that was read; whether a handler is to have it."""
        offset = record.offset
        if offset < self.next:
            return False  # known already
        self.next = offset + 1
        while self.done and offset >= self.done[0][1]:
            del self.done[0]
        if self.done and offset >= self.done[0][0]:
            if self.open:
                record.done = True
                self.odd = offset + 1
                self.open.append(record)
            else:
                self.committable = offset + 1
            return False
        if offset < self.suspects:
            record.count += self.crashes
        if offset in self.tries:
            record.count += self.tries.pop(offset) - 1
        if record.count > 1:
            record.unusual = True
            self.odd = offset + 1
        self.plain = offset >= self.suspects and not (self.done or self.tries)
        self.open.append(record)
        return True

    def finish(self, record: Record) -> None:
        """A message is done."""
        record.done = True
        waiting = self.open
        if waiting and waiting[0] is record:
            last = record
            while waiting and waiting[0].done:
                last = waiting.popleft()
            self.committable = last.offset + 1
            if self.crashes and self.committable >= self.suspects:
                self.crashes = 0

    def replace(self, bundle: Record, others: Sequence[Record]) -> None:
        """Keep account of a bundle's messages as of others, while it is there."""
        waiting = self.open
        if bundle not in waiting:
            return
        index = waiting.index(bundle)
        waiting.rotate(-index)
        waiting.popleft()
        waiting.extendleft(reversed(others))
        waiting.rotate(index)
        if bundle.given and not bundle.done:
            self.running += len(others) - 1

    def leave(self) -> None:
        """It is somebody else's; what was read of it and not begun is forgotten."""
        self.fenced = True
        noted = max(self.given, self.odd)
        while self.open and self.open[-1].offset >= noted:
            self.open.pop()

    def forget(self) -> None:
        """Let go of its messages, which know it as well, and are no garbage collector's."""
        self.open.clear()

    def signed(self, note: str | None) -> bool:
        """Whether a note is ours, so that nobody else has told the group anything since."""
        return bool(self.owner) and _read(note).o == self.owner

    def again(self) -> Partition:
        """The same partition, back with us: what we did of it stays done, and nobody crashed."""
        commit = self.commit()
        note = _read(commit.note)
        note.h = 0
        text = _encode(note).decode()
        part = type(self)(self.place, commit.offset, text, self.owner)
        if self.crashes:
            part.crashes, part.suspects, part.plain = self.crashes, self.suspects, False
        return part

    def commit(self, *, leaving: bool = False, base: int | None = None) -> Commit:
        """What the group is to be told now; ``leaving`` lets go of the partition in order.

        ``base`` is the offset before which everything is done, where that is not known yet.
        """
        base = self.committable if base is None else base
        note = Note()
        if not leaving:
            note.c, note.o = self.crashes, self.owner
            note.h = max(self.given + SUSPECTS - base, 0) or 1
        first = -1
        noted = max(self.given, self.odd)
        for record in self.open:
            if record.offset >= noted:
                break
            if record.offset < base or (record.done and not self.notes_done):
                continue
            if record.done:
                if first < 0:
                    first = record.offsets[0]
                continue
            if first >= 0:
                note.d.append((first - base, record.offsets[0] - base))
                first = -1
            attempt = max(record.count, record.tries)
            if leaving:
                attempt += record.given
            else:
                attempt -= self._vanished(record)
            if attempt > 1:
                note.t |= {offset - base: attempt for offset in record.offsets}
        if first >= 0:
            last = max(r.offset for r in self.open if r.offset < noted)
            note.d.append((first - base, last + 1 - base))
        for offset, attempt in self.tries.items():
            if offset >= self.next:
                note.t[offset - base] = attempt
        note.d += [(a - base, b - base) for a, b in self.done if a >= self.next]
        note.t = {offset: count for offset, count in note.t.items() if count > 1}
        self.begun = {offset for offset in self.begun if offset >= base}
        note.b = sorted(offset - base for offset in self.begun)
        text = _encode(note).decode()
        while len(text) > _LARGEST:  # what is forgotten is done, or tried, once more
            if len(note.d) > 1:
                del note.d[len(note.d) // 2 :]
            elif len(note.t) > 1:
                note.t = dict(list(note.t.items())[: len(note.t) // 2])
            else:
                del note.b[len(note.b) // 2 :]
            text = _encode(note).decode()
        return Commit(*self.place, base, "" if text == "{}" else text)

    def _vanished(self, record: Record) -> int:
        """What the next owner adds by itself, if this one vanishes."""
        return self.crashes if record.offset < self.suspects else 0


_topic, _number = operator.methodcaller("topic"), operator.methodcaller("partition")
_headers = operator.methodcaller("headers")


def _ours(pairs: Any) -> bool:
    """Whether headers say something of how a message is to be handled."""
    return any(key.startswith("ms-") for key, _ in pairs or ())


def mark(record: Record) -> None:
    """Note whether a message was replayed for somebody, as its headers say."""
    if any(key == REPLAY_TO for key, _ in record.pairs or ()):
        record.marked = record.unusual = True


def records(messages: list[Any], parts: Mapping[Any, Partition]) -> list[Record]:
    """Messages of the library as ours: those that belong to a partition, which admits them."""
    found: list[Record] = []
    part: Partition | None = None
    topic, number = "", -1
    for message in messages:
        if message.partition() != number or message.topic() != topic:  # they come in runs
            topic, number = message.topic(), message.partition()
            part = parts.get((topic, number))
        if part is None:
            continue
        offset, pairs = message.offset(), message.headers()
        made = Record(part, topic, number, offset, message.value(), message.key(), pairs, message)
        if pairs:
            mark(made)
        if part.plain and offset >= part.next:
            part.next = offset + 1
            part.open.append(made)
        elif not part.admit(made):
            continue
        found.append(made)
    return found


def bundles(
    messages: list[Any], parts: Mapping[Any, Partition], size: int, only: str | None = None
) -> list[Record]:
    """The same, in bundles of up to ``size`` where there is nothing to know of each.

    ``only`` is the topic of all of them, where there is but one.
    """
    found: list[Record] = []
    named: Iterable[tuple[str, Iterable[Any]]] = [(only, messages)] if only else ()
    for topic, same in named or itertools.groupby(messages, _topic):
        for number, run in itertools.groupby(same, _number):
            part, many = parts.get((topic, number)), list(run)
            if part is None:
                continue
            headers = list(map(_headers, many))
            if (
                not part.plain
                or many[0].offset() < part.next
                or (any(headers) and any(_ours(pairs) for pairs in headers))
            ):
                found += records(many, parts)
                continue
            part.next = many[-1].offset() + 1
            for start in range(0, len(many), size):
                some = many[start : start + size]
                last: int = some[-1].offset()
                made = Bundle(part, topic, number, last, None, None, None, some)
                part.open.append(made)
                found.append(made)
    return found
