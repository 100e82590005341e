"""Short lines for people, without a library: children of the supervisor import this too."""

from __future__ import annotations

import os
import sys

#: Exit codes.
OK, FAILED, USAGE = 0, 1, 2


def styled(text: str, code: str) -> str:
    """The text in an ANSI style where standard error is a terminal."""
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stderr.isatty() and not no_color() else text


def no_color() -> bool:
    """Whether the user asked for plain output (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def fail(problem: object, code: int = FAILED) -> int:
    """Print an error and return the exit code."""
    print(styled("Error:", "1;31"), problem, file=sys.stderr, flush=True)
    return code


def note(text: str) -> None:
    """Print a line about what happens."""
    print(text, file=sys.stderr, flush=True)
