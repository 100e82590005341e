"""Logging for applications: one format for everything that runs in the process.

The library itself only writes to ``logging.getLogger("millstream...")`` and installs no
handler. An application calls :func:`setup` once (``millstream run`` does it for those that
did not configure logging themselves)::

    import millstream.logging

    millstream.logging.setup(level="INFO")

Fields of the message in work (subject, id, handler) are read when a record is written, so
they stand on the application's own lines and on those of its client libraries too.
"""

from __future__ import annotations

import logging
import logging.config
import os
import sys
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

from .errors import SetupError
from .log import WORKER_VARIABLE
from .message import current

#: What :class:`MessageFilter` puts on a record; an empty string where there is nothing to say.
FIELDS = ("subject", "message_id", "handler", "worker_id")

#: Loggers to which servers attach handlers of their own.
_SERVERS = (
    *("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"),
    *("gunicorn", "gunicorn.error", "gunicorn.access"),
    *("hypercorn.error", "hypercorn.access"),
)
#: Names under which servers write lines that are no errors.
_SHOWN = {"uvicorn.error": "uvicorn", "gunicorn.error": "gunicorn", "hypercorn.error": "hypercorn"}
_STANDARD = {*vars(logging.makeLogRecord({})), *FIELDS, "message", "asctime", "color_message"}
_COLORS = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


class MessageFilter(logging.Filter):
    """Adds ``subject``, ``message_id``, ``handler`` and ``worker_id`` to every record.

    For any handler: ``handler.addFilter(MessageFilter())``, or ``{"()":
    "millstream.logging.MessageFilter"}`` under ``filters`` of a ``dictConfig``. The fields are
    those of the message that the running task handles, and are empty strings outside of one;
    a field that the caller gave in ``extra`` stays as it is.

    Args:
        worker_id: the worker's number; by default the one that ``millstream run --workers``
            gave to this process.
    """

    def __init__(self, worker_id: int | str | None = None) -> None:
        super().__init__()
        self.worker_id = os.environ.get(WORKER_VARIABLE, "") if worker_id is None else worker_id

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True: records are completed, none is dropped."""
        subject = message_id = handler = ""
        message = current.get()
        if message is not None:
            try:
                subject, message_id = message.destination, message.message_id
                handler = message.link.handler
            except Exception:  # a message that cannot be read must not cost a log line
                pass
        fields = record.__dict__
        for name, value in zip(FIELDS, (subject, message_id, handler, self.worker_id), strict=True):
            fields.setdefault(name, value)
        return True


class LineFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.123 INFO    orders  text  subject=orders.eu handler=invoice ...``.

    Args:
        colors: for people at a terminal: coloured, and with the time of day only.
    """

    def __init__(self, *, colors: bool = False) -> None:
        super().__init__()
        self.colors = colors

    def formatMessage(self, record: logging.LogRecord) -> str:
        clock = "%H:%M:%S" if self.colors else "%Y-%m-%d %H:%M:%S"
        when = f"{time.strftime(clock, time.localtime(record.created))}.{int(record.msecs):03d}"
        level = f"{record.levelname:<7}"
        name = _SHOWN.get(record.name, record.name)
        pairs = ((name, getattr(record, name, "")) for name in FIELDS)
        tail = " ".join(f"{name}={value}" for name, value in pairs if value != "")
        if self.colors:
            level = f"\x1b[{_COLORS.get(record.levelname, '0')}m{level}\x1b[0m"
            when, name = f"\x1b[2m{when}\x1b[0m", f"\x1b[2m{name}\x1b[0m"
            tail = f"\x1b[2m{tail}\x1b[0m" if tail else ""
        line = f"{when} {level} {name}  {record.message}"
        return f"{line}  {tail}" if tail else line


class JSONFormatter(logging.Formatter):
    """One JSON object a line, ``extra`` fields and tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": _SHOWN.get(record.name, record.name),
            "message": record.getMessage(),
        }
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, "")) != ""}
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if trace := [part for part in (record.exc_text, record.stack_info) if part]:
            entry["exception"] = "\n".join(trace)
        return msgspec.json.encode(entry, enc_hook=repr).decode()


class _Handler(logging.StreamHandler[TextIO]):
    """The handler of :func:`setup`, recognisable for the next call."""


def level_of(level: int | str) -> int:
    """The number of a level given by name or number.

    Raises:
        SetupError: there is no such level.
    """
    if isinstance(level, int):
        return level
    names = logging.getLevelNamesMapping()
    found = names.get(level.upper())
    if found is None:
        choice = ", ".join(name.lower() for name in names)
        raise SetupError(f"{level!r} is no log level", fix=f"one of {choice}")
    return found


def setup(
    *,
    level: int | str = "INFO",
    json: bool = False,
    colors: bool | None = None,
    stream: TextIO | None = None,
    force: bool = False,
) -> bool:
    """Give the application, Millstream, the server and client libraries one log format.

    The root logger gets one handler, and the handlers that uvicorn, gunicorn and hypercorn
    attached to their own loggers are removed, so that their lines arrive there as well.
    Calling it again changes the settings. Where the root logger has handlers of somebody
    else, nothing is touched.

    Args:
        level: the lowest level to be written.
        json: one JSON object a line instead of text.
        colors: for people at a terminal; by default where ``stream`` is one and the variable
            ``NO_COLOR`` is not set.
        stream: standard error by default.
        force: replace handlers that somebody else attached to the root logger.

    Returns:
        False where logging was configured by somebody else, and left alone.

    Raises:
        SetupError: there is no such level.
    """
    root, number = logging.getLogger(), level_of(level)
    if not force and any(not isinstance(handler, _Handler) for handler in root.handlers):
        return False
    out: TextIO = sys.stderr if stream is None else stream
    if colors is None:
        colors = out.isatty() and not os.environ.get("NO_COLOR")
    handler = _Handler(out)
    handler.setFormatter(JSONFormatter() if json else LineFormatter(colors=colors))
    handler.addFilter(MessageFilter())
    root.handlers[:] = [handler]
    root.setLevel(number)
    _unify()
    voice = logging.getLogger("millstream")
    if any(isinstance(handler, _ServerVoice) for handler in voice.handlers):
        voice.handlers[:] = [h for h in voice.handlers if not isinstance(h, _ServerVoice)]
        voice.setLevel(logging.NOTSET)
    return True


def _unify() -> None:
    """Let what servers write go to the root logger instead of to handlers of their own."""
    for name in _SERVERS:
        logger = logging.getLogger(name)
        if logger.handlers:  # without any, it was switched off on purpose (--no-access-log)
            logger.handlers = []  # a new list: gunicorn's worker shares one between loggers
            logger.propagate = True
        if logger.propagate:
            logger.setLevel(logging.NOTSET)


class _ServerVoice(logging.Handler):
    """Speaks through the server's handlers while nobody configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        for handler in _server().handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


def _server() -> logging.Logger:
    """The logger of the server this process runs in, or one without handlers."""
    names = ("uvicorn", "uvicorn.error", "gunicorn.error", "hypercorn.error")
    loggers = [logging.getLogger(name) for name in names]
    return next((logger for logger in loggers if logger.handlers), loggers[0])


def join_server() -> None:
    """Called when an application starts inside somebody else's server, such as ``uvicorn``.

    Where :func:`setup` was called, the server's loggers follow it. Where nobody configured
    logging, Millstream's lines go out in the server's own format and at its level; as soon as
    the root logger gets a handler, they go there only. Otherwise nothing changes.
    """
    root, server = logging.getLogger(), _server()
    if any(isinstance(handler, _Handler) for handler in root.handlers):
        _unify()
    elif not root.handlers and server.handlers:
        voice = logging.getLogger("millstream")
        if not voice.handlers:
            voice.addHandler(_ServerVoice())
            if voice.level == logging.NOTSET:
                voice.setLevel(server.getEffectiveLevel())


def load_config(path: str | Path) -> None:
    """Configure logging from a file in the schema of :func:`logging.config.dictConfig`.

    ``version`` may be left out, and loggers that exist stay enabled unless the file says
    otherwise.

    Args:
        path: a ``.json``, ``.toml``, ``.yaml`` or ``.yml`` file.

    Raises:
        SetupError: no such file, not readable as its kind, not a valid configuration, or YAML
            without PyYAML.
    """
    path = Path(path)
    try:
        config = _read(path)
        if not isinstance(config, dict):
            raise ValueError(f"a table is expected, not {type(config).__name__}")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False} | config)
    except SetupError:
        raise
    except Exception as error:  # each reader and dictConfig have errors of their own
        reason = f"{error}: {error.__cause__}" if error.__cause__ else f"{error}"
        if isinstance(error, OSError):
            reason = error.strerror or reason
        raise SetupError(f"{path}: {reason}") from error


def _read(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind == ".json":
        return msgspec.json.decode(path.read_bytes())
    if kind == ".toml":
        return tomllib.loads(path.read_text("utf-8"))
    if kind not in (".yaml", ".yml"):
        raise SetupError(f"{path} is no .json, .toml, .yaml or .yml file")
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise SetupError(f"{path} needs PyYAML: pip install pyyaml") from None
    return yaml.safe_load(path.read_text("utf-8"))
