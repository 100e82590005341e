"""From what stands on the command line to the object that is run.

``module``, ``module:name``, ``module:outer.name``; the object may be a Millstream, a broker,
any ASGI application, or a function without parameters (sync or async) that returns one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import msgspec

from ..app import Millstream
from ..broker import Broker
from ..endpoints import Router
from ..errors import MillstreamError

RUNNABLE = ("app", "broker", "asgi")


class TargetError(MillstreamError):
    """What was asked for on the command line does not exist or cannot be run."""

    code = "MS500"


class UserCodeError(MillstreamError):
    """The user's own code failed; the text shows the user's frames only."""

    code = "MS501"

    def __init__(self, error: BaseException) -> None:
        super().__init__(own_traceback(error))


class Target(msgspec.Struct, frozen=True):
    """Something that can be run.

    Fields:
        name: as it was found, such as ``main:app``.
        kind: ``app`` (a Millstream), ``broker`` or ``asgi``.
        object: the object itself.
        module: where it was found.
    """

    name: str
    kind: str
    object: Any
    module: ModuleType

    @property
    def title(self) -> str:
        """For people: ``main:app (FastAPI)``."""
        return f"{self.name} ({type(self.object).__name__})"

    @property
    def brokers(self) -> list[Broker]:
        """The object's brokers; where it does not tell any, those of its module, which code
        such as a hand-written lifespan starts."""
        own = [thing for thing in vars(self.module).values() if isinstance(thing, Broker)]
        return brokers_of(self.object) or list(dict.fromkeys(own))

    @property
    def app(self) -> Millstream:
        """The target as a plain application; a broker gets one around it."""
        return Millstream(self.object) if self.kind == "broker" else self.object


class Found(msgspec.Struct, frozen=True):
    """An object of an imported module, before factories are called."""

    name: str
    module: ModuleType
    object: Any
    factory: bool

    async def build(self) -> Target:
        """Call the object if it is a factory.

        Raises:
            TargetError: it is nothing that can be run.
            UserCodeError: the factory failed.
        """
        thing, kind = self.object, kind_of(self.object)
        if self.factory or kind == "factory":
            try:
                thing = thing()
                if inspect.isawaitable(thing):
                    thing = await thing
            except Exception as error:
                raise UserCodeError(error) from error
            kind = kind_of(thing)
        if kind in RUNNABLE:
            return Target(self.name, kind, thing, self.module)
        called = f"{self.name}() returned" if thing is not self.object else f"{self.name} is"
        raise TargetError(f"{called} {_explain(thing, kind)}{_runnable(self.module)}")


def find(target: str, *, app_dir: str = ".", factory: bool = False) -> Found:
    """Import the module of a target and look the object up.

    Args:
        target: ``module``, ``module:name`` or ``module:outer.name``. Without a name, the one
            application of the module, or its one broker if it has no application.
        app_dir: put first on the import path.
        factory: the object is to be called, whatever it looks like.

    Raises:
        TargetError: no such module or object.
        UserCodeError: the module cannot be imported.
    """
    directory = Path(app_dir).resolve()
    if not directory.is_dir():
        raise TargetError(f"--app-dir {app_dir}: no such directory")
    if str(directory) not in sys.path[:1]:
        sys.path.insert(0, str(directory))
    name, colon, attribute = target.partition(":")
    _check_name(name, colon + attribute, directory)
    module = _import(name, directory)
    if colon and not attribute:
        raise TargetError(f"{target!r}: no name after the colon{_runnable(module)}")
    if attribute:
        return Found(target, module, _look_up(module, name, attribute), factory)
    if factory:
        what, found = "function without parameters", _things(module, "factory")
        names = [n for n, thing in found.items() if isinstance(thing, FunctionType)]
    else:
        what, found = "application or broker", _things(module, *RUNNABLE)
        names = [n for n, thing in found.items() if kind_of(thing) != "broker"] or list(found)
    if len(names) != 1:
        problem = f"has no {what}" if not names else f"has more than one {what}"
        raise TargetError(f"{name} {problem}: write {name}:NAME{_listed(module, names)}")
    return Found(f"{name}:{names[0]}", module, getattr(module, names[0]), factory)


def _check_name(name: str, rest: str, directory: Path) -> None:
    if name.endswith(".py") or "/" in name or os.sep in name:
        path = Path(name.removesuffix(".py"))
        if path.is_absolute() and path.is_relative_to(directory):
            path = path.relative_to(directory)
        dotted = ".".join(part for part in path.parts if part not in (".", "..", os.sep))
        raise TargetError(
            f"{name!r} is a file, a module is wanted: {dotted}{rest}"
            + (" with --app-dir" if ".." in path.parts or path.is_absolute() else "")
        )
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name + rest!r} is no target: write module:name, such as main:app")


def _import(name: str, directory: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserCodeError(error) from error
        package, _, last = name.rpartition(".")
        parent = sys.modules.get(package)
        place = f"in {directory}" if parent is None else f"in {package}"
        places = [directory] if parent is None else map(Path, getattr(parent, "__path__", ()))
        choice = [found for path in places for found in _modules(path)]
        near = difflib.get_close_matches(last, choice, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and choice:
            hint = f"; found {', '.join(choice[:8])}{', ...' if len(choice) > 8 else ''}"
        raise TargetError(f"no module {name!r} {place}{hint}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() in a module included
        raise UserCodeError(error) from error


def _modules(directory: Path) -> list[str]:
    """The modules and packages that stand in a directory."""
    found = [entry.stem for entry in directory.glob("*.py") if not entry.stem.startswith("_")]
    found += [entry.parent.name for entry in directory.glob("*/__init__.py")]
    return sorted(found)


def _look_up(module: ModuleType, name: str, attribute: str) -> Any:
    thing: Any = module
    walked = name
    for part in attribute.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            owner = "module" if thing is module else type(thing).__name__
            choice = _runnable(module, part) if thing is module else ""
            raise TargetError(f"{owner} {walked} has no {part!r}{choice}") from None
        except Exception as error:
            raise UserCodeError(error) from error
        walked += f":{part}" if thing is module else f".{part}"
    return thing


def _things(module: ModuleType, *kinds: str) -> dict[str, Any]:
    """The public objects of a module that are of some kinds, each once."""
    found: dict[str, Any] = {}
    for name, thing in vars(module).items():
        # A function counts where it was written, not where it was imported to.
        foreign = isinstance(thing, FunctionType) and thing.__module__ != module.__name__
        if name.startswith("_") or foreign or kind_of(thing) not in kinds:
            continue
        if not any(thing is other for other in found.values()):
            found[name] = thing
    return found


def _listed(module: ModuleType, names: Iterable[str]) -> str:
    listed = ", ".join(f"{name} ({type(vars(module)[name]).__name__})" for name in names)
    return f"; there is {listed}" if listed else ""


def _runnable(module: ModuleType, near: str = "") -> str:
    """What can be run instead: what is called nearly so, else everything."""
    names = _things(module, *RUNNABLE)
    close = difflib.get_close_matches(near, names, 1)
    return f"; did you mean {module.__name__}:{close[0]}?" if close else _listed(module, names)


def kind_of(thing: Any) -> str:
    """``app``, ``broker``, ``asgi`` or ``factory``; what cannot be run has a kind as well:
    ``router``, ``http-router``, ``wsgi``, ``class``, ``module`` or an empty string."""
    if isinstance(thing, Millstream):
        return "app"
    if isinstance(thing, Broker):
        return "broker"
    if isinstance(thing, Router):
        return "router"
    if isinstance(thing, ModuleType):
        return "module"
    if isinstance(thing, type):
        return "class"
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(thing, fastapi.APIRouter):
        return "http-router"
    if not callable(thing):
        return ""
    needed = _parameters(thing)
    if needed is None:
        return ""
    named = needed[:1] == ["scope"]  # for a plain function, only its parameters' names tell
    asynchronous = not inspect.isroutine(thing) and inspect.iscoroutinefunction(
        type(thing).__call__
    )
    if len(needed) == 3 and (named or asynchronous):
        return "asgi"
    if needed in (["environ", "start_response"], ["env", "start_response"]):
        return "wsgi"
    return "factory" if not needed and inspect.isroutine(thing) else ""


def _parameters(thing: Any) -> list[str] | None:
    """The names of the parameters that a call must fill."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return None
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _explain(thing: Any, kind: str) -> str:
    name = type(thing).__name__
    match kind:
        case "router" | "http-router":
            owner = "a broker: broker" if kind == "router" else "an application: app"
            return f"a {name}: include it into {owner}.include_router(...), and run that"
        case "wsgi":
            return "a WSGI application; only ASGI applications can be run"
        case "class":
            return f"the class {thing.__name__}: name an object, or add --factory to call it"
        case "factory":
            return "a function again; name the one that makes the application"
        case "module":
            return "a module: name an object in it"
    if isinstance(thing, FunctionType):
        needs = ", ".join(_parameters(thing) or ())
        return f"a function that needs {needs}; a factory has no parameters"
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"{article} {name}, neither an application nor a broker"


def brokers_of(thing: Any) -> list[Broker]:
    """The brokers of anything that can be run: a broker itself, those of an application, of
    its routers and of what it mounts, each once, in the order they are found."""
    return list(dict.fromkeys(_walk(thing, set())))


def _walk(thing: Any, seen: set[int]) -> Iterator[Broker]:
    if thing is None or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Broker):
        yield thing
        return
    if isinstance(thing, Millstream):
        yield from thing.brokers
        return
    state = getattr(thing, "state", None)
    for owner in (thing, state, getattr(state, "millstream", None)):
        brokers = getattr(owner, "brokers", None)
        yield from (b for b in _items(brokers) if isinstance(b, Broker))
        if isinstance(broker := getattr(owner, "broker", None), Broker):
            yield broker
    # Middleware wraps `app`; routes of frameworks hold endpoints, routers and sub-applications;
    # a lifespan of ours holds parts with brokers.
    for name in ("app", "router", "original_router", "lifespan_context", "routes", "parts"):
        part = getattr(thing, name, None)
        for item in _items(part) if name in ("routes", "parts") else (part,):
            if not isinstance(item, str | Mapping | type):
                yield from _walk(item, seen)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else []


def own_traceback(error: BaseException) -> str:
    """An exception as its author wants to see it: frames of the user's own files only."""
    shown = traceback.TracebackException.from_exception(error)
    _prune(shown)
    return "".join(shown.format()).rstrip()


def _prune(shown: traceback.TracebackException) -> None:
    packages = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib"))
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    own, installed = [], []
    for frame in shown.stack:
        file = frame.filename
        if file.startswith(("<frozen", str(Path(__file__).parents[1]))) or file.endswith(".pyx"):
            continue
        if file.startswith(packages):
            installed.append(frame)
        elif not file.startswith(library):
            own.append(frame)
    # An application that is itself installed has no other frames.
    shown.stack = traceback.StackSummary.from_list(own or installed)
    for other in (shown.__cause__, shown.__context__, *(shown.exceptions or ())):
        if other is not None:
            _prune(other)
