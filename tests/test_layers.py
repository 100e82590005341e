"""The layers point one way: nothing of the core imports what stands above or beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import millstream

PACKAGE = Path(millstream.__file__).parent
#: Built on the core; the core does not know them.
ABOVE = {
    "spec",
    "cli",
    "embedded",
    "asgi",
    "fastapi",
    "testing",
    "recorder",
    "logging",
    "annotations",
    "__main__",
}
BROKERS = {"nats", "memory", "kafka", "confluent", "rabbit", "redis", "mqtt"}
#: What a broker's package offers for other surroundings, on top of both.
BRIDGES = {"fastapi", "testing", "annotations"}
#: Packages that only their own users may import.
HEAVY = {"typer", "rich", "fastapi", "starlette", "uvicorn", "pydantic", "nats", "watchfiles"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else "", path


def imports(path: Path, name: str, *, eager: bool) -> Iterator[str]:
    """Absolute names of what a module imports.

    What only type checkers see is left out; ``eager`` also leaves out what stands inside
    functions, and what is only done where the other package is loaded already.
    """
    package = ["millstream", *name.split(".")] if name else ["millstream"]
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if eager and isinstance(node, ast.If) and "sys.modules" in ast.unparse(node.test):
            return
        if eager and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


def first(name: str) -> str:
    return name.split(".")[0]


def own(imported: str) -> str | None:
    """The top module inside our package that an import names."""
    parts = imported.split(".")
    return parts[1] if parts[0] == "millstream" and len(parts) > 1 else None


ALL = list(modules())
CORE = [(n, p) for n, p in ALL if first(n) not in ABOVE | BROKERS]
IN_BROKERS = [(n, p) for n, p in ALL if first(n) in BROKERS and not set(n.split(".")[1:]) & BRIDGES]


@pytest.mark.parametrize(("name", "path"), CORE, ids=[n or "millstream" for n, _ in CORE])
def test_core_imports_only_core(name: str, path: Path) -> None:
    """Even inside functions, but for the doors that are meant to open late (``as_asgi``)."""
    eager = {own(i) for i in imports(path, name, eager=True)}
    assert not eager & (ABOVE | BROKERS)
    late = {own(i) for i in imports(path, name, eager=False)} & (ABOVE | BROKERS)
    # `app.as_asgi()`, the package's own lazy names (`TestApp`), and the adapter of a FastAPI
    # that is loaded already are such doors.
    allowed = {"app": {"asgi"}, "": {"testing", "fastapi"}}
    assert late <= allowed.get(name, set())


@pytest.mark.parametrize(("name", "path"), IN_BROKERS, ids=[n for n, _ in IN_BROKERS])
def test_brokers_import_only_the_core(name: str, path: Path) -> None:
    used = {own(i) for i in imports(path, name, eager=False)} - {None}
    own_names = {"confluent", "kafka"} if first(name) == "confluent" else {first(name)}
    others = (ABOVE | BROKERS) - own_names  # `confluent` is another name of `kafka`
    allowed = {"testing"} if name.endswith("__init__") or "." not in name else set()
    assert not {u for u in used & others if u not in allowed}


@pytest.mark.parametrize(("name", "path"), CORE, ids=[n or "millstream" for n, _ in CORE])
def test_core_needs_msgspec_alone(name: str, path: Path) -> None:
    assert not {first(i) for i in imports(path, name, eager=True)} & HEAVY


def test_no_cycle_at_import() -> None:
    """Modules import each other in one order, so that each can be read on its own."""
    names = {n for n, _ in ALL}
    graph: dict[str, set[str]] = {}
    for name, path in ALL:
        used = set()
        for imported in imports(path, name, eager=True):
            target = imported.removeprefix("millstream.")
            if imported.startswith("millstream.") and target in names and target != name:
                used.add(target)
        graph[name] = used
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for target in graph[name]:
            walk(target, (*trail, name))
        done.add(name)

    for name in graph:
        walk(name, ())


def test_fastapis_private_modules_are_imported_at_one_place() -> None:
    private = ("fastapi.dependencies", "fastapi._compat", "fastapi.utils")
    users = {
        name
        for name, path in ALL
        if any(i.startswith(private) for i in imports(path, name, eager=False))
    }
    assert len(users) <= 1, users
