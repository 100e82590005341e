"""Options that the command does not know, and where they go."""

from __future__ import annotations

from typing import Any

import pytest

from millstream.cli.options import RunOptions, parse_extra, split_known
from millstream.cli.target import TargetError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--env", "prod"], {"env": "prod"}),
        (["--env=prod"], {"env": "prod"}),
        (["--env="], {"env": ""}),
        (["--dry-run"], {"dry_run": True}),
        (["--no-dry-run"], {"dry_run": False}),
        (["--tag", "a", "b"], {"tag": ["a", "b"]}),
        (["--tag", "a", "--tag", "b"], {"tag": ["a", "b"]}),
        (["--tag=a", "--tag=b", "--x"], {"tag": ["a", "b"], "x": True}),
        (["--offset", "-5"], {"offset": "-5"}),
        (["--no-dry-run", "--env", "prod"], {"dry_run": False, "env": "prod"}),
        (["-e", "prod"], {"e": "prod"}),
    ],
)
def test_extra_options_become_keyword_arguments(arguments: list[str], expected: Any) -> None:
    assert parse_extra(arguments) == expected


@pytest.mark.parametrize("arguments", [["prod"], ["--env=prod", "again"]])
def test_a_value_without_an_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(TargetError, match="belongs to no option"):
        parse_extra(arguments)


def test_server_options_reach_a_plain_application_as_text() -> None:
    options = RunOptions(target="main:app", port=5000, host="::", extra=["--env", "prod"])
    assert options.startup() == {"port": "5000", "host": "::", "env": "prod", "worker_id": None}


def test_known_options_take_the_types_of_their_parameters() -> None:
    def server(limit: int | None = None, wait: float = 1.0, path: str = "", proxy: bool = True): ...

    given = {"limit": "5", "wait": "0.5", "path": "7", "proxy": False, "env": "prod"}
    known, others = split_known(given, server)
    assert known == {"limit": 5, "wait": 0.5, "path": "7", "proxy": False}
    assert others == {"env": "prod"}
