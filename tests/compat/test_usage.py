"""Programs written for the closest peer run after a mechanical rename of their imports.

The files in ``usage/`` are our own, written after the peer's documented behaviour, and hold
for it as they stand: where it is installed, ``python tests/compat/test_usage.py URL`` runs them
with it. Here their imports are renamed first.
"""

from __future__ import annotations

import asyncio
import re
import sys
import types
from pathlib import Path
from typing import Any

USAGE = sorted((Path(__file__).parent / "usage").glob("*.py"))
PEER, OURS = "faststream", "millstream"


def load(path: Path, url: str, package: str) -> types.ModuleType:
    """The program as a module, its server replaced and its imports renamed."""
    source = path.read_text().replace("nats://localhost:4222", url)
    source = re.sub(rf"\b{PEER}\b", package, source)
    module = types.ModuleType(f"usage_{path.stem}")
    sys.modules[module.__name__] = module
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def pytest_generate_tests(metafunc: Any) -> None:
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", USAGE, ids=[p.stem for p in USAGE])


async def test_usage(path: Path, nats: Any) -> None:
    await load(path, nats.url, OURS).check()


if __name__ == "__main__":
    for file in USAGE:
        asyncio.run(load(file, sys.argv[1], PEER).check())
        print(file.stem, "ok")
