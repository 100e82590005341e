"""Every snippet of README.md and docs/*.md runs.

A ```python block is executed in a process of its own, with servers of its own in the place of
those that brokers have at their usual addresses (see SERVERS). Afterwards what it declared is
used: its applications, brokers and FastAPI applications are started and stopped, its ``test_*``
functions are called. ``await`` may stand at the top level.

A block whose first line is a comment like ``# main.py`` is saved under that name, so that
later blocks of the same page can import it. Two html comments right above a block change
what happens to it:

    <!-- snippet: continue -->             runs in the namespace of the block above
    <!-- snippet: skip-run: the reason --> is only compiled

Commands in ```bash blocks are checked against the command line and the Makefile.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.base import Server
from tests.servers.kafka import KafkaServer
from tests.servers.mqtt import MosquittoServer
from tests.servers.nats import NatsServer
from tests.servers.rabbit import RabbitServer
from tests.servers.redis import RedisServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- snippet: (?P<mark>.+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
HOST = r"(127\.0\.0\.1|localhost)"
NATS = re.compile(f"nats://{HOST}:4222")
#: What stands in the place of each other address.
SERVERS: dict[re.Pattern[str], Callable[[], Server]] = {
    re.compile(f"redis://{HOST}:6379"): RedisServer,
    re.compile(f"amqp://guest:guest@{HOST}:5672/?"): RabbitServer,
    re.compile(f"{HOST}:9092"): KafkaServer,
    re.compile(f"mqtt://{HOST}:1883"): MosquittoServer,
}
FILE_NAME = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Snippet:
    """One code block; ``before`` are the blocks of the same page above it."""

    page: str
    line: int
    language: str
    code: str
    mark: str
    before: tuple[Snippet, ...]

    @property
    def whole(self) -> str:
        """The code with what it continues."""
        if self.mark != "continue":
            return self.code
        python = [s for s in self.before if s.language == "python"]
        assert python, f"{self}: there is nothing to continue"
        return python[-1].whole + "\n" + self.code

    @property
    def files(self) -> dict[str, str]:
        """What stands in files next to this snippet."""
        named = ((FILE_NAME.match(s.code), s) for s in self.before if s.language == "python")
        return {name[1]: s.whole for name, s in named if name}

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    found: list[Snippet] = []
    for page in PAGES:
        text = page.read_text()
        earlier: list[Snippet] = []
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            indent = len(match["indent"])
            code = "".join(row[indent:] or "\n" for row in match["code"].splitlines(keepends=True))
            name = str(page.relative_to(ROOT))
            snippet = Snippet(
                name, line, match["language"], code, match["mark"] or "", tuple(earlier)
            )
            earlier.append(snippet)
            if snippet.language in languages:
                found.append(snippet)
    return found


PYTHON = snippets("python")


@pytest.mark.parametrize("snippet", PYTHON, ids=map(str, PYTHON))
def test_python(snippet: Snippet, nats_server: NatsServer, tmp_path: Path) -> None:
    compile(snippet.whole, str(snippet), "exec", flags=TOP_LEVEL_AWAIT)
    if snippet.mark.startswith("skip-run"):
        assert snippet.mark.removeprefix("skip-run").strip(" :"), f"{snippet}: say why"
        return
    assert snippet.mark in {"", "continue"}, f"{snippet}: unknown mark {snippet.mark!r}"

    files = {**snippet.files, "snippet_.py": snippet.whole}
    with ExitStack() as stack:
        urls = {NATS: nats_server.url}
        for address, server in SERVERS.items():
            if any(address.search(code) for code in files.values()):
                urls[address] = stack.enter_context(server()).url
        for name, code in files.items():
            for address, url in urls.items():
                code = address.sub(url, code)
            (tmp_path / name).write_text(code)
        runner = ROOT / "tests" / "run_snippet.py"
        done = subprocess.run(
            [sys.executable, "-P", "-W", "error", runner, nats_server.url],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert done.returncode == 0, f"{snippet}\n{done.stdout}\n{done.stderr}"


TOP_LEVEL_AWAIT = 0x2000  # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT

COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{snippet}: {line}")
    for snippet in snippets("bash", "sh", "console", "shell")
    for line in (
        row.strip().removeprefix("$ ") for row in snippet.code.replace("\\\n", " ").splitlines()
    )
    if line.startswith(("millstream ", "make "))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [w for w in rest if "=" not in w]
        assert all(re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE) for t in targets)
        return
    names = rest[:2] if rest[0] == "dlq" else rest[:1]
    done = subprocess.run(
        [sys.executable, "-m", "millstream.cli.main", *names, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    options = [w.split("=")[0] for w in rest[1:] if w.startswith("-") and w != "-"]
    assert not [o for o in options if not re.search(rf"(^|[\s,]){o}\b", done.stdout)], done.stdout


LINKS = [
    pytest.param(page, target, id=f"{page.name} → {target}")
    for page in PAGES
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    if "://" not in target and not target.startswith("mailto:")
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_link(page: Path, target: str) -> None:
    assert (page.parent / target).exists()
