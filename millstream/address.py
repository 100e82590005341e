"""Addresses: templates with ``{placeholders}``, a broker's wildcards, and matching.

A template such as ``orders.{region}.created`` names a pattern in the broker's own syntax
(``orders.*.created`` on NATS) and tells where each placeholder's value stands in the
address of an arriving message.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import msgspec

from .errors import AddressError

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class Address(msgspec.Struct, frozen=True):
    """A compiled template."""

    template: str
    #: What the broker is asked for.
    pattern: str
    #: Placeholder name → index of its segment.
    places: Mapping[str, int]
    separator: str
    matcher: re.Pattern[str]

    def matches(self, destination: str) -> bool:
        """Whether a message sent to ``destination`` belongs here."""
        return self.matcher.fullmatch(destination) is not None

    def extract(self, destination: str) -> dict[str, str]:
        """The placeholders' values."""
        segments = destination.split(self.separator)
        return {name: segments[i] for name, i in self.places.items() if i < len(segments)}

    def getter(self, name: str) -> Callable[[str], str]:
        """What takes a placeholder's value from the address of a message."""
        place, separator = self.places[name], self.separator
        return lambda destination: destination.split(separator)[place]


class MatchedAddress(Address, frozen=True):
    """A template whose placeholders stand anywhere: a group of its matcher each."""

    def extract(self, destination: str) -> dict[str, str]:
        found = self.matcher.fullmatch(destination) if self.places else None
        return found.groupdict() if found is not None else {}

    def getter(self, name: str) -> Callable[[str], str]:
        match = self.matcher.fullmatch
        return lambda destination: match(destination)[name]  # type: ignore[index]


class AddressSyntax(msgspec.Struct, frozen=True):
    """How one kind of broker writes addresses.

    ``one`` matches exactly one segment, ``rest`` all that remain; ``rest_empty`` says
    whether ``rest`` also matches nothing (MQTT's and RabbitMQ's ``#`` do, NATS's ``>``
    does not), ``rest_anywhere`` whether it may stand before the end (RabbitMQ's ``#``).
    """

    separator: str = "."
    one: str = "*"
    rest: str = ">"
    rest_empty: bool = False
    rest_anywhere: bool = False

    def compile(self, template: str) -> Address:
        """Compile a template.

        Raises:
            AddressError: a placeholder is not a whole segment, is not an identifier, stands
                twice or behind a ``rest`` wildcard, or that is not the last segment.
        """
        return _compile(self, template)

    def literal(self, template: str) -> str:
        """A template as one address: placeholders by their names, wildcards as words."""
        words = {self.one: "any", self.rest: "all"}
        segments = template.split(self.separator)
        return self.separator.join(words.get(s, s.strip("{}")) for s in segments)


@functools.lru_cache(maxsize=4096)
def _compile(syntax: AddressSyntax, template: str) -> Address:
    segments = template.split(syntax.separator)
    separator = re.escape(syntax.separator)
    pattern: list[str] = []
    expression = ""
    places: dict[str, int] = {}
    joint, rest = "", False
    for i, segment in enumerate(segments):
        if segment == syntax.rest and segment:
            if i != len(segments) - 1 and not syntax.rest_anywhere:
                raise AddressError(
                    f"{template!r}: {syntax.rest!r} stands before the end",
                    fix=f"use {syntax.one!r} for a single segment",
                )
            some = f"{joint}.*" if syntax.rest_empty else f"{joint}.+"
            if not joint and i != len(segments) - 1:  # the separator behind it belongs to it
                some = f".*{separator}"
            else:
                joint = separator
            expression += f"(?:{some})?" if syntax.rest_empty else some
            pattern.append(segment)
            rest = True
            continue
        if "{" in segment or "}" in segment:
            found = _PLACEHOLDER.fullmatch(segment)
            name = found[1] if found else ""
            if not name.isidentifier():
                raise AddressError(
                    f"{template!r}: {segment!r} is not a placeholder",
                    fix=f"a placeholder is a whole segment, such as "
                    f"orders{syntax.separator}{{region}}",
                )
            if rest:
                raise AddressError(
                    f"{template!r}: nobody knows where {{{name}}} stands behind {syntax.rest!r}",
                    fix=f"put {syntax.rest!r} last",
                )
            if name in places:
                raise AddressError(
                    f"{template!r}: {{{name}}} stands twice",
                    fix="give each placeholder its own name",
                )
            places[name] = i
            segment = syntax.one
        pattern.append(segment)
        one = f"[^{separator}]+"
        expression += joint + (one if segment == syntax.one and segment else re.escape(segment))
        joint = separator
    return Address(
        template, syntax.separator.join(pattern), places, syntax.separator, re.compile(expression)
    )
