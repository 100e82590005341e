"""From what stands on the command line to the object."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millstream.cli.target import (
    Target,
    TargetError,
    UserCodeError,
    brokers_of,
    find,
    kind_of,
    own_traceback,
)
from tests.helpers import unique

Module = Callable[[str], str]
HEAD = "from millstream import Millstream\nfrom millstream.nats import NatsBroker, NatsRouter\n"


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Module]:
    """Writes a module and gives its name; forgets it at the end."""
    names: list[str] = []
    path = list(sys.path)

    def write(text: str) -> str:
        names.append(unique("mod"))
        (tmp_path / f"{names[-1]}.py").write_text(text)
        importlib.invalidate_caches()
        return names[-1]

    yield write
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


async def load(target: str, folder: Path, factory: bool = False) -> Target:
    return await find(target, app_dir=str(folder), factory=factory).build()


async def refusal(target: str, folder: Path, factory: bool = False) -> str:
    with pytest.raises(TargetError) as caught:
        await load(target, folder, factory)
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_kinds_of_objects_that_can_be_run(module: Module, tmp_path: Path) -> None:
    name = module(
        HEAD
        + """
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware

broker = NatsBroker()
app = Millstream(broker)
fast = FastAPI()
star = Starlette()
wrapped = GZipMiddleware(fast)
hosted = app.as_asgi()

class Box:
    inner = app

async def raw(scope, receive, send): ...
def make(): return app
async def make_async(): return fast
def make_with(env="dev", *rest): return broker
"""
    )
    kinds = {
        "app": "app", "broker": "broker", "fast": "asgi", "star": "asgi", "wrapped": "asgi",
        "hosted": "asgi", "raw": "asgi", "make": "app", "make_async": "asgi",
        "make_with": "broker", "Box.inner": "app",
    }  # fmt: skip
    for attribute, kind in kinds.items():
        target = await load(f"{name}:{attribute}", tmp_path)
        assert target.kind == kind, attribute
        assert target.name == f"{name}:{attribute}"


async def test_without_a_name_the_only_application_is_taken(module: Module, tmp_path: Path) -> None:
    name = module(HEAD + "broker = NatsBroker()\nservice = Millstream(broker)\nalias = service\n")
    assert (await load(name, tmp_path)).name == f"{name}:service"


async def test_without_an_application_the_only_broker_is_taken(
    module: Module, tmp_path: Path
) -> None:
    name = module(HEAD + "events = NatsBroker()\n_hidden = NatsBroker()\n")
    assert (await load(name, tmp_path)).kind == "broker"


async def test_without_a_name_the_only_factory_is_taken(module: Module, tmp_path: Path) -> None:
    name = module(HEAD + "def create(): return Millstream(NatsBroker())\ndef other(x): ...\n")
    target = await load(name, tmp_path, factory=True)
    assert (target.name, target.kind) == (f"{name}:create", "app")


async def test_a_class_is_called_where_a_factory_is_said(module: Module, tmp_path: Path) -> None:
    name = module(
        HEAD + "class App(Millstream):\n def __init__(self): super().__init__(NatsBroker())\n"
    )
    assert "add --factory" in await refusal(f"{name}:App", tmp_path)
    assert (await load(f"{name}:App", tmp_path, factory=True)).kind == "app"


async def test_more_than_one_candidate(module: Module, tmp_path: Path) -> None:
    name = module(HEAD + "a = Millstream(NatsBroker())\nb = Millstream(NatsBroker())\n")
    text = await refusal(name, tmp_path)
    assert "more than one" in text and "a (Millstream), b (Millstream)" in text


@pytest.mark.parametrize(
    ("code", "attribute", "says"),
    [
        ("app = Millstream(NatsBroker())", "ap", "did you mean {name}:app?"),
        ("service = Millstream(NatsBroker())", "x", "there is service (Millstream)"),
        ("app = Millstream(NatsBroker())", "", "no name after the colon"),
        ("app = 5", "app", "is an int, neither an application nor a broker"),
        ("def app(a, b): ...", "app", "is a function that needs a, b"),
        ("def app(environ, start_response): ...", "app", "WSGI"),
        ("def app(): return 5", "app", "{name}:app() returned an int"),
        ("def app(): return NatsRouter()", "app", "returned a NatsRouter: include it"),
        ("router = NatsRouter()\nevents = NatsBroker()", "router", "there is events (NatsBroker)"),
        ("from fastapi import APIRouter\nr = APIRouter()", "r", "app.include_router(...)"),
        ("import os.path", "os.path", "is a module"),
        ("import os", "os.nothing", "has no 'nothing'"),
        ("x = 1", None, "has no application or broker"),
    ],
)
async def test_wrong_objects_are_explained_in_one_line(
    module: Module, tmp_path: Path, code: str, attribute: str | None, says: str
) -> None:
    name = module(HEAD + code)
    target = name if attribute is None else f"{name}:{attribute}"
    assert says.format(name=name) in await refusal(target, tmp_path)


async def test_wrong_modules_are_explained_in_one_line(module: Module, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "y.py").write_text("")
    assert "did you mean service?" in await refusal("servic:app", tmp_path)
    assert "found package, service" in await refusal("zzzzzz:app", tmp_path)
    assert "no module 'package.x' in package; found y" in await refusal("package.x:app", tmp_path)
    assert "service:app" in await refusal("service.py:app", tmp_path)
    assert "package.main:app" in await refusal("./package/main.py:app", tmp_path)
    assert "write module:name" in await refusal("", tmp_path)
    assert "write module:name" in await refusal(":app", tmp_path)
    assert "write module:name" in await refusal("a b:app", tmp_path)
    assert "no such directory" in await refusal("service:app", tmp_path / "nowhere")
    sys.modules.pop("package", None)


async def test_a_module_that_fails_shows_the_users_frames_only(
    module: Module, tmp_path: Path
) -> None:
    inner = module("import json\ndef parse(): json.loads('{')\n")
    name = module(f"import {inner}\n{inner}.parse()\n")
    with pytest.raises(UserCodeError) as caught:
        find(f"{name}:app", app_dir=str(tmp_path))
    text = str(caught.value)
    assert f"{name}.py" in text and f"{inner}.py" in text and "JSONDecodeError" in text
    assert "importlib" not in text and "json/decoder" not in text and "millstream/cli" not in text


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def (", "SyntaxError"),
        ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def app(): raise RuntimeError('from the factory')", "from the factory"),
    ],
)
async def test_failures_of_the_users_code(
    module: Module, tmp_path: Path, code: str, says: str
) -> None:
    name = module(code)
    with pytest.raises(UserCodeError) as caught:
        await load(f"{name}:app", tmp_path)
    assert says in str(caught.value) and f"{name}.py" in str(caught.value)


def test_causes_and_groups_are_pruned_as_well() -> None:
    try:
        try:
            importlib.import_module("no_such_module_here")
        except ImportError as error:
            raise ExceptionGroup("several", [ValueError("one")]) from error
    except ExceptionGroup as group:
        text = own_traceback(group)
    assert "no_such_module_here" in text and "ValueError: one" in text
    assert "importlib/__init__" not in text


async def test_brokers_of_everything(module: Module, tmp_path: Path) -> None:
    name = module(
        HEAD
        + """
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware

one, two = NatsBroker(), NatsBroker()
app = Millstream(one, two)
hosted = app.as_asgi()
fast = FastAPI()
fast.state.broker = two
outer = FastAPI()
outer.mount("/inner", GZipMiddleware(fast))
"""
    )
    find(name + ":app", app_dir=str(tmp_path))
    space = sys.modules[name]
    assert brokers_of(space.one) == [space.one]
    assert brokers_of(space.app) == brokers_of(space.hosted) == [space.one, space.two]
    assert brokers_of(space.fast) == brokers_of(space.outer) == [space.two]
    assert brokers_of(None) == brokers_of(5) == []


async def test_an_application_that_does_not_tell_has_the_brokers_of_its_module(
    module: Module, tmp_path: Path
) -> None:
    name = module(HEAD + "from fastapi import FastAPI\nbroker = NatsBroker()\napp = FastAPI()\n")
    target = await load(f"{name}:app", tmp_path)
    assert target.brokers == [sys.modules[name].broker]


def test_kinds_of_what_has_no_signature() -> None:
    assert kind_of(print) in ("", "factory")
    assert kind_of(object()) == ""
    assert kind_of("text") == ""
