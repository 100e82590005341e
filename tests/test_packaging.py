"""The wheel: built with the standard tools, installed where nothing else is, and used."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import millstream

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow,
    pytest.mark.xdist_group("packaging"),  # one wheel and one environment serve all
]

TINY_APP = """
import asyncio
from millstream import Millstream
from millstream.memory import MemoryBroker

broker = MemoryBroker()
app = Millstream(broker)

@broker.subscriber("numbers.{name}")
@broker.publisher("doubled")
async def double(number: int, name: str) -> dict:
    return {name: number * 2}

@broker.subscriber("doubled")
async def show(result: dict) -> None:
    print(result)
    app.exit()

@app.after_startup
async def first() -> None:
    await broker.publish(21, "numbers.x")

if __name__ == "__main__":
    asyncio.run(app.run())
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an index would get both."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that holds the wheel and its hard dependencies."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run(scripts / "python", "-m", "pip", "install", "-q", *constraints, wheel, cwd=folder)
    return scripts


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        info = Parser().parsestr(archive.read(metadata).decode())
    assert "millstream/py.typed" in names
    assert all(n.startswith(("millstream/", "millstream-")) for n in names)
    assert any(n.endswith("/LICENSE") for n in names)
    assert info["Version"] == millstream.__version__
    assert info["License-Expression"] == "Apache-2.0"
    hard = [r for r in info.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(r.split(">")[0].strip() for r in hard) == ["msgspec", "typer"]


def test_command(installed: Path, tmp_path: Path) -> None:
    assert millstream.__version__ in run(installed / "millstream", "version", cwd=tmp_path)


def test_tiny_app(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY_APP)
    assert "{'x': 42}" in run(installed / "python", "tiny.py", cwd=tmp_path)
    assert "{'x': 42}" in run(installed / "millstream", "run", "tiny:app", cwd=tmp_path)


def test_a_missing_extra_is_named(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "python", "-c", "import millstream.nats"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'pip install "millstream[nats]"' in done.stderr
