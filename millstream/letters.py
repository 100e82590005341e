"""Dead letters as they lie there: read, sent back to where they failed, removed.

A letter is the original message with its cause in headers. Sent back, it goes to its origin
once more and carries in ``ms-replay-to`` whom it is for: all other subscriptions there
acknowledge it and do not handle it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from .errors import SetupError

if TYPE_CHECKING:
    from .message import Message

#: Whom a replayed message is for, as :attr:`Letter.handler` says it.
REPLAY_TO = "ms-replay-to"
#: How many times a message was replayed.
REPLAYS = "ms-replays"
#: What a failure says of itself; the next failure of the same message says it anew.
CAUSE = frozenset(
    {
        *("ms-error", "ms-error-type", "ms-traceback", "ms-origin", "ms-attempts"),
        *("ms-failed-at", "ms-handler", "ms-source", "ms-path", "ms-expected", "ms-got"),
    }
)


class Letter(msgspec.Struct, frozen=True):
    """One dead letter.

    Fields:
        id: its name among the dead letters of its address.
        message: the message, which cannot be settled.
        stored: when it came there.
    """

    id: str
    message: Message[Any]
    stored: datetime

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers: those of the original message, and the cause."""
        return self.message.headers

    @property
    def handler(self) -> str:
        """The subscription that failed: its handler's name, ``@`` and the address it declared."""
        name, source = self.headers.get("ms-handler", ""), self.headers.get("ms-source")
        return f"{name}@{source}" if name and source is not None else name

    @property
    def origin(self) -> str:
        """Where the message was sent to; empty where the letter does not tell."""
        return self.headers.get("ms-origin", "")

    @property
    def error_type(self) -> str:
        """The name of the exception's class."""
        return self.headers.get("ms-error-type", "")

    @property
    def error(self) -> str:
        """The exception's text."""
        return many_lines(self.headers.get("ms-error", ""))

    @property
    def traceback(self) -> str:
        """The end of its traceback."""
        return many_lines(self.headers.get("ms-traceback", ""))

    @property
    def attempts(self) -> int:
        """How often it was tried; 0 where the letter does not tell."""
        return _number(self.headers.get("ms-attempts", ""))

    @property
    def replays(self) -> int:
        """How often it was replayed."""
        return _number(self.headers.get(REPLAYS, ""))

    @property
    def failed_at(self) -> datetime:
        """When it failed; where the letter does not tell, when it was stored."""
        try:
            return datetime.fromisoformat(self.headers.get("ms-failed-at", ""))
        except ValueError:
            return self.stored


class Letters(Protocol):
    """The dead letters of one address."""

    def read(self, limit: int | None = None, after: str | None = None) -> AsyncIterator[Letter]:
        """The letters, oldest first; nothing is consumed.

        Args:
            limit: how many at most.
            after: the id behind which to begin; that letter need not be there any more.

        Raises:
            NoLetters: nothing keeps what is sent to the address.
        """
        ...

    async def count(self) -> int:
        """How many there are.

        Raises:
            NoLetters: as ``read``.
        """
        ...

    async def remove(self, id: str) -> bool:
        """Delete a letter for good; False if there is none of that id."""
        ...

    async def resend(self, letter: Letter, headers: dict[str, str]) -> None:
        """Publish a letter's body to its origin; returns when the broker has confirmed it.

        The same letter sent twice in a short time counts once where the broker can tell.

        Raises:
            NoResponders: nobody would get it.
            PublishError: the broker did not take it.
        """
        ...


async def replay(letters: Letters, letter: Letter, *, to_all: bool = False) -> bool:
    """Send a letter back to its origin and then remove it.

    What is kept in the headers: the original ones, and the cause without its traceback.

    Args:
        letters: where it lies.
        letter: the letter.
        to_all: let every subscription of the origin handle it, not only the one that failed.

    Returns:
        False if somebody else removed it meanwhile.

    Raises:
        SetupError: the letter does not tell where it came from.
        NoResponders: as ``resend``; the letter stays.
        PublishError: the same.
    """
    if not letter.origin:
        raise SetupError("the letter has no header ms-origin: nobody knows where it belongs")
    dropped = {"ms-traceback", REPLAY_TO}
    headers = {k: v for k, v in letter.headers.items() if k not in dropped}
    headers[REPLAYS] = str(letter.replays + 1)
    if letter.handler and not to_all:
        headers[REPLAY_TO] = letter.handler
    await letters.resend(letter, headers)
    return await letters.remove(letter.id)


#: What no header should hold: control characters, surrogates and what is no character at all.
#: One of them is enough for some servers to end the connection.
UNFIT = re.compile(
    "[\0-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
    + "]"
)
_ESCAPED = re.compile(r"\\(\\|[rnt]|x[\da-f]{2}|u[\da-f]{4}|U[\da-f]{8})")


def one_line(text: str) -> str:
    """A text as a header's value, which is one line of plain characters on every broker."""
    text = text.replace("\\", "\\\\")
    return UNFIT.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def many_lines(value: str) -> str:
    """The text that :func:`one_line` made a value of."""
    return _ESCAPED.sub(lambda m: m[0].encode().decode("unicode_escape"), value)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
