"""The public options are typed once and both type checkers see them: mypy and pyright."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.xdist_group("typing")]

#: (line, severity, text)
Finding = tuple[int, str, str]


@cache
def mypy() -> dict[str, list[Finding]]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-pretty", *FILES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found: dict[str, list[Finding]] = {name: [] for name in FILES}
    for match in re.finditer(r"^(\S+?):(\d+): (error|note): (.*)$", done.stdout, re.MULTILINE):
        path, line, severity, text = match.groups()
        assert path in found, done.stdout
        found[path].append((int(line), severity, text))
    assert done.returncode == 1, done.stdout + done.stderr  # bad.py
    return found


@cache
def pyright() -> dict[str, list[Finding]]:
    program = shutil.which("pyright", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run(
        [program, "--outputjson", "--pythonpath", sys.executable, *FILES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found: dict[str, list[Finding]] = {name: [] for name in FILES}
    for item in json.loads(done.stdout)["generalDiagnostics"]:
        name = str(Path(item["file"]).relative_to(ROOT))
        line = item["range"]["start"]["line"] + 1
        found[name].append((line, item["severity"], item["message"]))
    return found


GOOD, BAD, REVEALS = FILES = [
    str((HERE / name).relative_to(ROOT)) for name in ("good.py", "bad.py", "reveals.py")
]
CHECKERS = pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])


def marked(name: str, mark: str) -> dict[int, str]:
    """Line → what stands behind the mark."""
    lines = (ROOT / name).read_text().splitlines()
    return {i: line.partition(mark)[2].strip() for i, line in enumerate(lines, 1) if mark in line}


@CHECKERS
def test_right_uses_are_accepted(checker: object) -> None:
    assert callable(checker)
    assert [f for f in checker()[GOOD] if f[1] == "error"] == []


@CHECKERS
def test_wrong_uses_are_refused(checker: object) -> None:
    assert callable(checker)
    refused = {line for line, severity, _ in checker()[BAD] if severity == "error"}
    assert refused == set(marked(BAD, "# refused"))


@CHECKERS
def test_options_are_shown(checker: object) -> None:
    assert callable(checker)
    shown: dict[int, str] = {}
    for line, severity, text in checker()[REVEALS]:
        assert severity != "error", (line, text)
        shown[line] = shown.get(line, "") + text
    for line, wanted in marked(REVEALS, "# shows:").items():
        # mypy spells types in full.
        text = re.sub(r"\b(builtins|typing)\.", "", shown[line + 1])
        for part in wanted.split("; "):
            assert part in text, f"line {line}: {part!r} is not in {text}"
