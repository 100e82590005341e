"""What the commands of ``millstream dlq`` do."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..broker import Broker
from ..endpoints import default_scope
from ..errors import MillstreamError, NoLetters, NotConnected
from ..letters import CAUSE, REPLAYS, Letter, Letters, many_lines, replay
from ..subscriber import Subscriber
from ..subscription import Subscription
from .inspect import console_of_stdout, plain_table, plural, print_json
from .output import FAILED, OK, fail, note
from .target import Target, TargetError

if TYPE_CHECKING:
    from .dlq import Which

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
#: Letters that ``show`` prints where nothing is said.
_SHOWN = 10
#: Headers that ``show`` prints in words of its own.
_PRINTED = CAUSE - {"ms-path", "ms-expected", "ms-got"} | {REPLAYS}
#: Kinds of problems that are told one by one.
_TOLD = 5


def age(option: str, text: str | None) -> float | None:
    """Seconds of an age such as ``10m``, ``2h`` or ``1d12h``.

    Raises:
        TargetError: it is none.
    """
    if text is None:
        return None
    if not re.fullmatch(r"(\d+(\.\d+)?[smhdw])+", text):
        raise TargetError(f"{option} {text}: write an age such as 30s, 10m, 2h or 3d")
    return sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)([smhdw])", text))


def pause_of(rate: str | None) -> float:
    """Seconds between two letters at a rate such as ``50/s``, ``100/m`` or ``50``.

    Raises:
        TargetError: it is none.
    """
    if rate is None:
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/([smh]))?", rate)
    if found is None or not float(found[1]):
        raise TargetError(f"--rate {rate}: write a number a second, such as 50/s (or /m, /h)")
    return _UNITS[found[2] or "s"] / float(found[1])


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant; ages are in seconds."""

    handler: str | None = None
    error: str | None = None
    older: float | None = None
    newer: float | None = None
    ids: tuple[str, ...] = ()

    def takes(self, name: str, letter: Letter, now: datetime) -> bool:
        """Whether a letter is one of them; ``name`` is ``ADDRESS:ID``."""
        if self.handler not in (None, letter.handler, letter.headers.get("ms-handler")):
            return False
        if self.error not in (None, letter.error_type):
            return False
        if self.ids and name not in self.ids and letter.id not in self.ids:
            return False
        old = (now - letter.failed_at).total_seconds()
        return old >= (self.older or 0.0) and (self.newer is None or old <= self.newer)


class Place(msgspec.Struct, frozen=True):
    """One address of dead letters, and who can handle what is replayed from there."""

    address: str
    letters: Letters
    handlers: set[str]

    def name(self, letter: Letter) -> str:
        """What a letter is called on the command line."""
        return f"{self.address}:{letter.id}"


class Group(msgspec.Struct):
    """Letters of one address, handler and error."""

    address: str
    handler: str
    error: str
    count: int
    oldest: datetime
    newest: datetime


class Groups(dict[tuple[str, str, str], Group]):
    """Counts letters."""

    def add(self, place: Place, letter: Letter) -> None:
        """Count one."""
        key, at = (place.address, letter.handler, letter.error_type), letter.failed_at
        group = self.setdefault(key, Group(*key, 0, at, at))
        group.count += 1
        group.oldest, group.newest = min(group.oldest, at), max(group.newest, at)

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(group.count for group in self.values())

    def print(self) -> None:
        """Print a table."""
        columns = ("address", "handler", "error", "count", "oldest", "newest")
        table = plain_table(*columns, right=columns[3:])
        for g in self.values():
            words = (g.address, g.handler or "-", g.error or "-", str(g.count))
            table.add_row(*map(escape, words), _ago(g.oldest), _ago(g.newest))
        console_of_stdout().print(table)


class Desk:
    """One call of a command.

    Args:
        told: which letters of which target are meant.
        dry_run: change nothing.
        rate: how fast letters are handled, such as ``50/s``.

    Raises:
        TargetError: an age or the rate is none.
    """

    def __init__(self, told: Which, dry_run: bool = False, rate: str | None = None) -> None:
        self.target, self.json, self.timeout = told.target, told.json, told.timeout
        self.addresses = told.address or []
        self.dry_run, self.pause = dry_run, pause_of(rate)
        self.which = Filter(
            handler=told.handler,
            error=told.error,
            older=age("--older", told.older),
            newer=age("--newer", told.newer),
            ids=tuple(told.id or ()),
        )
        self.limit = told.limit

    # The commands; each returns the exit code.

    async def ls(self, target: Target) -> int:
        """Print groups."""
        groups, places = await self._count(target)
        if self.json:
            total = groups.total
            print_json({"target": self.target, "total": total, "groups": [*groups.values()]})
        elif groups:
            groups.print()
        else:
            print(self._nothing(places))
        return self._missing(groups.total)

    async def show(self, target: Target) -> int:
        """Print letters."""
        most, said = max(_SHOWN, len(self.which.ids)), self.limit is not None
        self.limit = self.limit if said else most + 1
        async with self._places(target) as places:
            found = [pair async for pair in self._each(places)]
        shown = found if said else found[:most]
        if self.json:
            print_json([_described(place, letter) for place, letter in shown])
        elif not shown:
            print(self._nothing(places))
        else:
            console = console_of_stdout()
            for place, letter in shown:
                _print_letter(console, place, letter)
            if len(found) > len(shown):
                note(f"the first {most}; --limit shows more")
        return self._missing(len(shown))

    async def replay(self, target: Target, *, to_all: bool) -> int:
        """Send letters back."""

        async def act(place: Place, letter: Letter) -> None:
            if letter.handler and not to_all and letter.handler not in place.handlers:
                raise MillstreamError(
                    f"{self.target} has no subscription {letter.handler!r}: "
                    "--to-all sends to every subscription of the origin"
                )
            if not self.dry_run:
                await replay(place.letters, letter, to_all=to_all)

        return await self._work(target, act, "replayed")

    async def drop(self, target: Target, *, yes: bool) -> int:
        """Delete letters."""
        if not (yes or self.dry_run):
            if self.json or not sys.stdin.isatty():
                raise TargetError(
                    "drop asks before it deletes, and nobody is there to answer: --yes"
                )
            # The connection is closed while somebody thinks.
            groups, places = await self._count(target)
            if not groups:
                print(self._nothing(places))
                return self._missing(0)
            groups.print()
            if not typer.confirm(f"Drop {_letters(groups.total)} for good?"):
                print("nothing was dropped")
                return FAILED

        async def act(place: Place, letter: Letter) -> None:
            if not self.dry_run:
                await place.letters.remove(letter.id)

        return await self._work(target, act, "dropped")

    # How

    @asynccontextmanager
    async def _places(self, target: Target) -> AsyncIterator[list[Place]]:
        """Connect, and find where the letters are."""
        if not target.brokers:
            raise TargetError(f"{target.title} has no broker")
        async with AsyncExitStack() as stack:
            places: dict[tuple[int, str], Place] = {}
            for broker in target.brokers:
                broker.logger = None
                broker.startup_timeout = min(self.timeout, broker.startup_timeout)
                await stack.enter_async_context(broker)
                subscriptions = list(_subscriptions(broker))
                handlers = {s.failing.identity for s in subscriptions}
                handlers |= {s.name for s in subscriptions}
                addresses = self.addresses or await _addresses(broker, subscriptions)
                for address in addresses:
                    letters = broker.driver.letters(address)
                    places[id(broker), address] = Place(address, letters, handlers)
            if not places:
                raise NoLetters(f"no subscription of {target.title} has dead letters: --address?")
            if len(places) > 1 and (bare := [i for i in self.which.ids if ":" not in i]):
                where = ", ".join(sorted({place.address for place in places.values()}))
                raise TargetError(f"--id {bare[0]}: write ADDRESS:{bare[0]}, of {where}")
            yield list(places.values())

    async def _each(self, places: Sequence[Place]) -> AsyncIterator[tuple[Place, Letter]]:
        """The letters that are meant and were there at the beginning."""
        left, now, kept = self.limit, datetime.now(UTC), False
        unseen = set(self.which.ids)
        for place in places:
            try:
                # Letters that fail again come behind, and are not touched twice.
                count = await place.letters.count()
                kept = True
            except NoLetters:
                continue
            async for letter in place.letters.read(limit=count):
                if self.which.takes(place.name(letter), letter, now):
                    yield place, letter
                    left = None if left is None else left - 1
                    unseen -= {letter.id, place.name(letter)}
                    if left == 0 or (self.which.ids and not unseen):
                        return
        if self.addresses and not kept:
            raise NoLetters(f"nothing keeps {', '.join(self.addresses)}: no dead letters")
        for name in sorted(unseen):
            fail(f"there is no such dead letter {name}")

    async def _count(self, target: Target) -> tuple[Groups, Sequence[Place]]:
        groups = Groups()
        async with self._places(target) as places:
            async for place, letter in self._each(places):
                groups.add(place, letter)
        return groups, places

    async def _work(
        self, target: Target, act: Callable[[Place, Letter], Awaitable[None]], done: str
    ) -> int:
        """Do something with each letter; those that it fails for are counted and stay."""
        groups, problems, names = Groups(), Counter[str](), []
        ended: MillstreamError | None = None
        loop = asyncio.get_running_loop()
        quiet = self.json or not sys.stderr.isatty()
        async with self._places(target) as places:
            due = loop.time()
            with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
                task = progress.add_task(done, total=None)
                try:
                    async for place, letter in self._each(places):
                        if not self.dry_run:
                            await asyncio.sleep(due - loop.time())
                            due = max(due + self.pause, loop.time())
                        try:
                            await act(place, letter)
                        except NotConnected:
                            raise
                        except MillstreamError as error:
                            problems[str(error)] += 1
                            continue
                        groups.add(place, letter)
                        names.append(place.name(letter))
                        progress.advance(task)
                except NoLetters:
                    raise
                except MillstreamError as error:
                    ended = error
        failed = problems.total()
        code = FAILED if failed or ended is not None else self._missing(groups.total)
        if self.json:
            result = {done: groups.total, "failed": failed, "dry_run": self.dry_run, "ids": names}
            ending = None if ended is None else str(ended)
            told = {"problems": dict(problems), "ended": ending, "groups": [*groups.values()]}
            print_json(result | told)
            return code
        if self.dry_run and groups:
            groups.print()
        for problem, count in problems.most_common(_TOLD):
            fail(f"{_letters(count)}: {problem}")
        if ended is not None:
            fail(ended)
        if failed:
            print(f"{done} {groups.total} of {_letters(groups.total + failed)}; {failed} stay")
        elif not groups and ended is None:
            print(self._nothing(places))
        else:
            print(f"{'would be ' if self.dry_run else ''}{done}: {_letters(groups.total)}")
        return code

    def _nothing(self, places: Sequence[Place]) -> str:
        every = self.which == Filter()
        what = "no dead letters" if every else "no such dead letters"
        return f"{what} at {', '.join(place.address for place in places)}"

    def _missing(self, found: int) -> int:
        """The exit code: a failure where letters were named that are not there."""
        return FAILED if found < len(self.which.ids) else OK


def _subscriptions(broker: Broker) -> list[Subscription]:
    """Those that are declared, also where some cannot be compiled."""
    return [
        Subscription(declaration, scope, broker)
        for declaration, scope in broker.walk(default_scope(broker.codec))
        if isinstance(declaration, Subscriber) and declaration.entries
    ]


async def _addresses(broker: Broker, subscriptions: Sequence[Subscription]) -> list[str]:
    """Where their dead letters go."""
    found: dict[str, None] = {}
    for subscription in subscriptions:
        letter = subscription.failing.dead_letter
        if letter is None:
            continue
        try:
            address = await broker.driver.dead_letter(
                subscription.spec, letter.destination, declare=False
            )
        except MillstreamError:
            raise
        except Exception as error:  # whatever the client library calls a refusal
            raise MillstreamError(f"{broker.driver.describe()}: {error}") from error
        found[address] = None
    return list(found)


def _letters(count: int) -> str:
    return plural(count, "dead letter")


def _ago(then: datetime) -> str:
    seconds = max((datetime.now(UTC) - then).total_seconds(), 0.0)
    unit = next((u for u in "dhm" if seconds >= _UNITS[u]), "s")
    return f"{int(seconds / _UNITS[unit])} {unit} ago"


def _described(place: Place, letter: Letter) -> dict[str, Any]:
    body = letter.message.body
    found: dict[str, Any] = {"id": place.name(letter)}
    for name in (
        *("handler", "origin", "error_type", "error", "traceback"),
        *("attempts", "replays", "failed_at", "stored"),
    ):
        found[name] = getattr(letter, name)
    found["headers"] = dict(letter.headers)
    try:
        return found | {"body": msgspec.json.decode(body)}
    except ValueError:
        pass
    try:
        return found | {"text": body.decode()}
    except UnicodeDecodeError:
        return found | {"base64": base64.b64encode(body).decode()}


def _print_letter(console: Console, place: Place, letter: Letter) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    say(f"\n{place.name(letter)}  {letter.handler or '(no handler told)'}", "bold")
    say(f"{letter.error_type or '(no error told)'}: {letter.error}", "red")
    parts = [
        f"sent to {letter.origin or '(unknown)'}",
        plural(letter.attempts, "attempt"),
        f"failed {_ago(letter.failed_at)} ({letter.failed_at.isoformat(timespec='seconds')})",
        f"replayed {plural(letter.replays, 'time')}" if letter.replays else "",
    ]
    say(", ".join(part for part in parts if part), "dim")
    others = (f"{k}: {many_lines(v)}" for k, v in letter.headers.items() if k not in _PRINTED)
    for title, text in (
        ("headers", "\n".join(others)),
        ("traceback", letter.traceback),
        (f"body, {plural(len(letter.message.body), 'byte')}", _text(letter.message.body)),
    ):
        if text:
            say(title, "dim")
            say("\n".join(f"  {line}" for line in text.rstrip().splitlines()))


def _text(body: bytes) -> str:
    try:
        return msgspec.json.format(body, indent=2).decode()
    except ValueError:
        return body.decode("utf-8", "backslashreplace")
