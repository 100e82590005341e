"""Fixtures of the command line's tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli import apps
from tests.cli.harness import Process, write
from tests.helpers import unique


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Tests of the logging set-up run without the handlers that pytest attaches."""
    if "fresh_logging" in pyfuncitem.fixturenames:
        logging.getLogger().handlers = []
    return (yield)


Run = Callable[..., Process]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts ``millstream ...`` in the test's folder; what still runs at the end is stopped."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> Process:
            return stack.enter_context(Process(*arguments, folder=tmp_path, **options))

        yield start


@pytest.fixture
def subject() -> str:
    """The first segment of this test's subjects."""
    return unique("cli")


@pytest.fixture
def plain(tmp_path: Path, nats: Any, subject: str) -> str:
    """main.py, a plain application; gives its subjects' first segment."""
    write(tmp_path, main=apps.PLAIN.format(url=nats.url, subject=subject))
    return subject


@pytest.fixture
def web(tmp_path: Path, nats: Any, subject: str) -> str:
    """web.py, a FastAPI application; gives its subjects' first segment."""
    write(tmp_path, web=apps.WEB.format(url=nats.url, subject=subject))
    return subject
