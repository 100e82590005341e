"""Restarts the target whenever a file changes; the target is imported in the child only."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from .child import Child, either, ended
from .options import RunOptions
from .output import OK, USAGE
from .run import configure_logging
from .sockets import Doorman
from .workers import signals

log = logging.getLogger("millstream.reload")

#: Directories that never hold what a running application reads.
IGNORED = {"__pycache__", "node_modules", "site-packages", "venv"}
#: Seconds between two looks at the files where watchfiles is not installed.
POLL = 0.4
#: Seconds that a child gets to finish its work before it is told to stop at once.
PATIENCE = 5.0


class Watcher:
    """Waits for changes of files.

    Args:
        directories: watched with all that is below, but for hidden ones and caches.
        extensions: of files that count, such as ``py``.
        files: single files that count as well.
    """

    def __init__(
        self, directories: Sequence[str], extensions: Sequence[str], files: Sequence[str] = ()
    ) -> None:
        self.directories = [Path(directory).resolve() for directory in directories]
        self.suffixes = tuple("." + extension.removeprefix(".") for extension in extensions)
        self.files = {Path(file).resolve() for file in files}

    def counts(self, path: Path) -> bool:
        """Whether a change of this file matters."""
        if path in self.files:
            return True
        if not path.name.endswith(self.suffixes):
            return False
        for directory in self.directories:
            if path.is_relative_to(directory):
                parents = path.relative_to(directory).parts[:-1]
                return not any(part in IGNORED or part.startswith(".") for part in parents)
        return False

    async def changes(self) -> AsyncIterator[list[Path]]:
        """The changed files, in batches."""
        places = {*self.directories, *(file.parent for file in self.files)}
        if importlib.util.find_spec("watchfiles") is not None:
            import watchfiles

            logging.getLogger("watchfiles").setLevel(logging.WARNING)
            async for batch in watchfiles.awatch(
                *places,
                watch_filter=lambda _, path: self.counts(Path(path)),
                debounce=200,
                step=50,
            ):
                yield sorted({Path(path) for _, path in batch})
            return
        seen = await asyncio.to_thread(self._snapshot)
        while True:
            await asyncio.sleep(POLL)
            now = await asyncio.to_thread(self._snapshot)
            changed = [path for path in {*seen, *now} if seen.get(path) != now.get(path)]
            seen = now
            if changed:
                yield sorted(changed)

    def _snapshot(self) -> dict[Path, tuple[int, int]]:
        found: dict[Path, tuple[int, int]] = {}
        files = list(self.files)
        for directory in self.directories:
            for place, inner, names in os.walk(directory):
                inner[:] = [d for d in inner if d not in IGNORED and not d.startswith(".")]
                files += [Path(place, name) for name in names if name.endswith(self.suffixes)]
        for file in files:
            with contextlib.suppress(OSError):
                status = file.stat()
                found[file] = status.st_mtime_ns, status.st_size
        return found


class Reloader:
    """One child at a time, a new one after each change.

    Args:
        options: of the run.
        watcher: says when files changed.
        doorman: answers the children, and tells when the first one is up.
    """

    def __init__(self, options: RunOptions, watcher: Watcher, doorman: Doorman) -> None:
        self.options, self.watcher, self.doorman = options, watcher, doorman
        self._was_up = False
        self.child: Child | None = None
        self.stopping = asyncio.Event()
        self._hurried = asyncio.Event()

    def interrupted(self) -> None:
        """SIGINT or SIGTERM; the second one means now."""
        if self.stopping.is_set():
            self._hurried.set()
        self.stopping.set()
        if self.child is not None:
            self.child.terminate()

    async def run(self) -> int:
        """Run until a signal; returns the exit code."""
        changed = asyncio.Event()
        with signals(self.interrupted):
            watching = asyncio.create_task(self._watch(changed))
            try:
                first = True
                while True:
                    changed.clear()
                    code = await self._live(changed)
                    if self.stopping.is_set():
                        return OK if code in (OK, -15) else 1
                    if first and code == USAGE:
                        return USAGE  # a wrong command line is not cured by a save
                    first = False
                    if not changed.is_set():
                        log.info("the application %s; waiting for a change", ended(code))
                        await either(changed.wait(), self.stopping.wait())
                    if self.stopping.is_set():
                        return OK
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                self.doorman.close()

    async def _watch(self, changed: asyncio.Event) -> None:
        async for files in self.watcher.changes():
            names = ", ".join(_short(file) for file in files[:3])
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            log.info("%s%s changed, reloading", names, more)
            changed.set()

    async def _live(self, changed: asyncio.Event) -> int:
        """One child, from its start until it ended by itself or because something changed."""
        begun = asyncio.get_running_loop().time()
        child = self.child = Child(self.options, self.doorman.welcome)
        await child.start()
        exit = asyncio.create_task(child.wait())
        await either(child.ready.wait(), exit, changed.wait(), self.stopping.wait())
        if child.ready.is_set() and child.hello is not None:
            if self._was_up:
                log.info("reloaded in %.1f s", asyncio.get_running_loop().time() - begun)
            else:
                self.doorman.up(child.hello, "reloading on changes")
            self._was_up = True
        await either(exit, changed.wait(), self.stopping.wait())
        if not exit.done():
            await self._end(child, exit)
        return await exit

    async def _end(self, child: Child, exit: asyncio.Task[int]) -> None:
        if not self.stopping.is_set():
            child.terminate()
            await asyncio.wait((exit,), timeout=PATIENCE)
            if not exit.done():
                child.terminate()
                await asyncio.wait((exit,), timeout=2.0)
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(either(exit, self._hurried.wait()), child.grace)
            if not exit.done() and self._hurried.is_set():
                await asyncio.wait((exit,), timeout=2.0)
        if not exit.done():
            log.warning("the application did not stop in time; killing it")
            child.kill()


def _short(file: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def watch(options: RunOptions, doorman: Doorman | None = None) -> int:
    """Run the target and restart it on changes; returns the exit code.

    Args:
        options: of the run.
        doorman: answers the children, and tells when the first one is up.

    Raises:
        TargetError: the file of ``--log-config`` is wrong.
        BindError: the address cannot be listened on.
    """
    configure_logging(options)
    files = [options.log_config] if options.log_config else []
    directories = options.reload_dir or [options.app_dir]
    watcher = Watcher(directories, ["py", *(options.ext or ())], files)

    async def run() -> int:
        return await Reloader(options, watcher, doorman or Doorman(options)).run()

    return asyncio.run(run())
