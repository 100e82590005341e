"""The tables of docs/delivery.md are what the scenarios' results say."""

from __future__ import annotations

import pytest

from tests.faults import table


def test_the_page_is_up_to_date() -> None:
    assert table.main(["--check"]) == 0


def test_every_result_holds() -> None:
    assert [row for row in table.load() if row["result"] != "holds"] == []


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="no place for the table"):
        table.page("nothing", [])


def test_a_row() -> None:
    row = {
        "scenario": "F01 x",
        "source": "s",
        "invariant": "i",
        "result": "holds",
        "sent": 3,
        "lost": 0,
        "duplicated": 1,
        "recovery": 1.23,
    }
    text = table.page(f"a{table.BEGIN}stale{table.END}b", [row, row | {"recovery": None}])
    assert "| F01 x | s | i | holds | 3 | 0 | 1 | 1.2 s |" in text
    assert "| fault | s |" in text and "| F01 x | holds +1 |" in text
    assert text.startswith("a") and text.endswith("b") and "stale" not in text


def test_the_overview_has_a_column_for_each_source() -> None:
    row = {"scenario": "F01", "source": "jetstream", "result": "holds", "recovery": None}
    row |= {"lost": 0, "duplicated": 0}
    rows = [
        row,
        row | {"source": "nats-core", "lost": 4, "recovery": 1.0},
        row | {"scenario": "F02", "source": "nats-core", "result": "lost ['m1']"},
    ]
    assert table.overview(rows).splitlines() == [
        "| fault | nats-core | jetstream |",
        "|---|---|---|",
        "| F01 | holds -4 1.0 s | holds |",
        f"| F02 | **fails** | {table.NEVER} |",
    ]
