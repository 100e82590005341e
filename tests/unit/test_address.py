"""Templates, wildcards and matching in the syntaxes of several brokers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.address import AddressSyntax
from millstream.errors import AddressError

NATS = AddressSyntax()
MQTT = AddressSyntax(separator="/", one="+", rest="#", rest_empty=True)
RABBIT = AddressSyntax(separator=".", one="*", rest="#", rest_empty=True)


@pytest.mark.parametrize(
    ("syntax", "template", "pattern"),
    [
        (NATS, "orders", "orders"),
        (NATS, "orders.{region}.created", "orders.*.created"),
        (NATS, "orders.*.{id}.>", "orders.*.*.>"),
        (MQTT, "house/{room}/temperature", "house/+/temperature"),
        (MQTT, "{house}/#", "+/#"),
    ],
)
def test_placeholders_become_the_wildcard_of_one_segment(
    syntax: AddressSyntax, template: str, pattern: str
) -> None:
    address = syntax.compile(template)
    assert (address.template, address.pattern) == (template, pattern)


@pytest.mark.parametrize(
    ("syntax", "template", "destination", "matches"),
    [
        (NATS, "orders", "orders", True),
        (NATS, "orders", "orders.eu", False),
        (NATS, "orders", "ordersx", False),
        (NATS, "orders.*", "orders.eu", True),
        (NATS, "orders.*", "orders", False),
        (NATS, "orders.*", "orders.eu.created", False),
        (NATS, "orders.*", "orders.", False),
        (NATS, "orders.>", "orders.eu.created", True),
        (NATS, "orders.>", "orders", False),
        (NATS, ">", "anything.at.all", True),
        (NATS, "*.created", "orders.created", True),
        (NATS, "a+b.c", "aab.c", False),
        (NATS, "a+b.c", "a+b.c", True),
        (MQTT, "house/#", "house", True),
        (MQTT, "house/#", "house/kitchen/oven", True),
        (MQTT, "house/#", "houses", False),
        (MQTT, "house/+/light", "house/kitchen/light", True),
        (MQTT, "house/+/light", "house/light", False),
        (RABBIT, "orders.#", "orders", True),
        (RABBIT, "*.created", "orders.eu.created", False),
    ],
)
def test_matching(syntax: AddressSyntax, template: str, destination: str, matches: bool) -> None:
    assert syntax.compile(template).matches(destination) is matches


def test_placeholders_are_read_from_their_segments() -> None:
    address = NATS.compile("orders.{region}.*.{id}")
    assert address.extract("orders.eu.created.17") == {"region": "eu", "id": "17"}
    assert address.extract("orders.eu") == {"region": "eu"}
    assert NATS.compile("orders").extract("orders") == {}


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("orders.{}", "not a placeholder"),
        ("orders.{a b}", "not a placeholder"),
        ("orders.x{id}", "not a placeholder"),
        ("orders.{id", "not a placeholder"),
        ("orders.{id}.{id}", "stands twice"),
        ("orders.>.created", "before the end"),
    ],
)
def test_a_template_that_is_not_well_formed_is_refused_with_the_fix(
    template: str, says: str
) -> None:
    with pytest.raises(AddressError, match=says) as caught:
        NATS.compile(template)
    assert caught.value.fix
    assert repr(template) in str(caught.value)


segment = st.text("abcxyz019-_", min_size=1, max_size=5)


@given(st.lists(segment, min_size=1, max_size=6), st.data())
def test_what_a_template_was_filled_with_is_what_it_reads(
    segments: list[str], data: st.DataObject
) -> None:
    free = data.draw(st.sets(st.integers(0, len(segments) - 1)))
    names = {i: f"p{i}" for i in free}
    template = ".".join(f"{{{names[i]}}}" if i in free else s for i, s in enumerate(segments))
    address = NATS.compile(template)
    destination = ".".join(segments)
    assert address.matches(destination)
    assert address.extract(destination) == {names[i]: segments[i] for i in free}
    assert not address.matches(destination + ".more")
