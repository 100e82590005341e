"""One format for everything in a process."""

from __future__ import annotations

import io
import json
import logging
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import millstream.logging
from millstream.errors import SetupError
from millstream.logging import MessageFilter, join_server, level_of, load_config, setup
from millstream.message import current
from tests.cli.harness import LINE

NAMES = ("uvicorn", "uvicorn.error", "uvicorn.access", "gunicorn.error", "millstream", "shop")


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Loggers as in a fresh process, and afterwards as they were (see conftest.py as well)."""
    loggers = [logging.getLogger(), *map(logging.getLogger, NAMES)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def handling(**fields: Any) -> Iterator[None]:
    message: Any = SimpleNamespace(
        destination="orders.eu", message_id="m-1", link=SimpleNamespace(handler="invoice")
    )
    vars(message).update(fields)
    token = current.set(message)
    yield
    current.reset(token)


def like_uvicorn() -> io.StringIO:
    """Configure the server's loggers as `uvicorn main:app` does; gives what is written."""
    import logging.config

    import uvicorn.config

    out = io.StringIO()
    logging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)
    for name in ("uvicorn", "uvicorn.access"):
        for handler in logging.getLogger(name).handlers:
            assert isinstance(handler, logging.StreamHandler)
            handler.setStream(out)
    return out


def test_every_logger_writes_the_same_format() -> None:
    server, out = like_uvicorn(), io.StringIO()
    assert setup(stream=out)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 1)
    logging.getLogger("uvicorn.access").info(
        '%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", "/", "1.1", 200
    )
    logging.getLogger("millstream.nats").warning("lost")
    logging.getLogger("shop").info("an order")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and all(LINE.fullmatch(line) for line in lines), lines
    assert "uvicorn  Started" in lines[0]
    assert server.getvalue() == ""


def test_message_fields_ride_on_every_line() -> None:
    out = io.StringIO()
    setup(stream=out)
    with handling():
        logging.getLogger("shop").info("an order")
    logging.getLogger("shop").info("outside")
    first, second = out.getvalue().splitlines()
    assert first.endswith("an order  subject=orders.eu message_id=m-1 handler=invoice")
    assert second.endswith("outside")


def test_json_lines_carry_fields_extras_and_tracebacks() -> None:
    out = io.StringIO()
    setup(json=True, stream=out)
    with handling():
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            logging.getLogger("shop").exception(
                "failed %d", 1, extra={"tenant": "x", "path": Path("/a")}
            )
    logging.getLogger("shop").info("odd", extra={"odd": {("a", 1): 2}})
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (
        first["message"] == "failed 1" and first["level"] == "ERROR" and first["logger"] == "shop"
    )
    assert first["subject"] == "orders.eu" and first["handler"] == "invoice"
    assert first["tenant"] == "x" and "/a" in first["path"]
    assert "RuntimeError: boom" in first["exception"] and first["time"].endswith("+00:00")
    assert "worker_id" not in first and "args" not in first
    assert second["odd"] == {"('a', 1)": 2}


def test_a_line_for_people_has_colours_and_the_time_only() -> None:
    out = io.StringIO()
    setup(stream=out, colors=True)
    with handling():
        logging.getLogger("shop").error("bad", stack_info=True)
    text = out.getvalue()
    assert "\x1b[31mERROR" in text and "\x1b[2mshop" in text and "Stack (most recent" in text
    assert text.startswith("\x1b[2m") and text[4:6].isdigit() and "202" not in text


def test_setting_up_again_changes_the_settings_and_adds_nothing() -> None:
    first, second = io.StringIO(), io.StringIO()
    assert setup(stream=first) and setup(stream=second, level="warning")
    logging.getLogger("shop").info("quiet")
    logging.getLogger("shop").warning("loud")
    assert first.getvalue() == "" and second.getvalue().count("\n") == 1
    assert len(logging.getLogger().handlers) == 1


def test_the_applications_own_configuration_is_left_alone() -> None:
    theirs, out = io.StringIO(), io.StringIO()
    logging.basicConfig(stream=theirs, format="MINE %(message)s", level="INFO")
    assert not setup(stream=out)
    logging.getLogger("shop").info("one")
    assert theirs.getvalue() == "MINE one\n" and out.getvalue() == ""
    assert setup(stream=out, force=True)
    logging.getLogger("shop").info("two")
    assert LINE.fullmatch(out.getvalue().strip()) and "two" not in theirs.getvalue()


def test_levels() -> None:
    assert level_of("info") == level_of("INFO") == level_of(20) == 20
    with pytest.raises(SetupError, match="'loud' is no log level") as caught:
        setup(level="loud")
    assert "warning" in str(caught.value)


def test_an_access_log_that_was_switched_off_stays_off() -> None:
    like_uvicorn()
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False
    out = io.StringIO()
    setup(stream=out)
    access.info("hidden")
    assert out.getvalue() == ""


def test_under_a_plain_server_lines_go_out_in_its_format_until_somebody_configures() -> None:
    server = like_uvicorn()
    join_server()
    join_server()
    logging.getLogger("millstream.nats").info("connected")
    logging.getLogger("millstream.nats").debug("hidden")
    logging.getLogger("uvicorn.error").info("serving")
    assert [line.split(":")[0] for line in server.getvalue().splitlines()] == ["INFO", "INFO"]
    theirs = io.StringIO()
    logging.basicConfig(stream=theirs, format="MINE %(message)s", level="INFO")
    logging.getLogger("millstream.nats").info("again")
    assert theirs.getvalue() == "MINE again\n" and "again" not in server.getvalue()


def test_after_set_up_the_server_follows_even_if_it_configured_itself_later() -> None:
    out = io.StringIO()
    setup(stream=out)
    server = like_uvicorn()
    join_server()
    logging.getLogger("uvicorn.error").info("serving")
    logging.getLogger("millstream.nats").info("connected")
    assert all(LINE.fullmatch(line) for line in out.getvalue().splitlines())
    assert out.getvalue().count("\n") == 2 and server.getvalue() == ""


def test_set_up_after_joining_writes_each_line_once() -> None:
    server, out = like_uvicorn(), io.StringIO()
    join_server()
    setup(stream=out)
    logging.getLogger("millstream.nats").info("connected")
    assert out.getvalue().count("connected") == 1 and "connected" not in server.getvalue()


def test_without_a_server_joining_changes_nothing() -> None:
    join_server()
    assert logging.getLogger("millstream").handlers == []


def test_the_filter_serves_any_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_WORKER_ID", "3")
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(MessageFilter())
    handler.setFormatter(logging.Formatter("%(subject)s|%(handler)s|%(worker_id)s|%(message)s"))
    logging.getLogger("shop").addHandler(handler)
    logging.getLogger("shop").setLevel("INFO")
    with handling():
        logging.getLogger("shop").info("in")
        logging.getLogger("shop").info("own", extra={"subject": "mine"})
    logging.getLogger("shop").info("out")
    assert out.getvalue().splitlines() == [
        "orders.eu|invoice|3|in", "mine|invoice|3|own", "||3|out",
    ]  # fmt: skip


def test_a_message_that_cannot_be_read_costs_no_line() -> None:
    out = io.StringIO()
    setup(stream=out)
    with handling(link=None):
        logging.getLogger("shop").info("still")
    assert "still" in out.getvalue()


TOML = """
[formatters.own]
format = "OWN %(message)s %(subject)s"
[filters.message]
"()" = "millstream.logging.MessageFilter"
[handlers.out]
class = "logging.StreamHandler"
formatter = "own"
filters = ["message"]
stream = "ext://sys.stdout"
[root]
level = "INFO"
handlers = ["out"]
"""


@pytest.mark.parametrize("kind", ["toml", "json", "yaml"])
def test_configuration_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", SimpleNamespace(safe_load=json.loads))
    path = tmp_path / f"log.{kind}"  # JSON is YAML as well
    path.write_text(TOML if kind == "toml" else json.dumps(tomllib.loads(TOML)))
    load_config(path)
    with handling():
        logging.getLogger("shop").info("hello")
    assert capsys.readouterr().out == "OWN hello orders.eu\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.json", None, "No such file"),
        ("log.ini", "", "is no .json, .toml, .yaml"),
        ("log.json", "{", "Input data was truncated"),
        ("log.json", "[]", "a table is expected, not list"),
        ("log.toml", "a = ", "Invalid value"),
        ("log.json", '{"root": {"handlers": ["x"]}}', "root"),
    ],
)
def test_wrong_configuration_files(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(SetupError, match=says) as caught:
        load_config(path)
    assert name in str(caught.value)


def test_yaml_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "log.yaml").write_text("version: 1")
    with pytest.raises(SetupError, match="pip install pyyaml"):
        load_config(tmp_path / "log.yaml")


def test_the_import_configures_nothing() -> None:
    assert logging.getLogger().handlers == [] and millstream.logging.FIELDS
