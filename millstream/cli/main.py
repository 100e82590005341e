"""The command line's commands and options."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..errors import MillstreamError
from .output import fail

USAGE = 2

cli = typer.Typer(
    name="millstream",
    help="Run and inspect message-driven services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_SERVER = "Server (HTTP targets)"
_LOGS = "Logging"
_RELOAD = "Reload"

TargetArg = Annotated[
    str, typer.Argument(metavar="TARGET", help="[bold]module:name[/] of the application.")
]
AppDir = Annotated[
    str,
    typer.Option(envvar="MILLSTREAM_APP_DIR", metavar="DIR", help="Where modules are looked for."),
]
Factory = Annotated[
    bool,
    typer.Option(
        "--factory", "-f", envvar="MILLSTREAM_FACTORY", help="TARGET is a function to call."
    ),
]
Host = Annotated[
    str | None,
    typer.Option(
        envvar="MILLSTREAM_HOST",
        metavar="ADDRESS",
        rich_help_panel=_SERVER,
        help="Address; 127.0.0.1 by default.",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        "-p",
        min=0,
        max=65535,
        envvar="MILLSTREAM_PORT",
        metavar="PORT",
        rich_help_panel=_SERVER,
        help="Port; 8000 by default, 0 picks a free one.",
    ),
]
Uds = Annotated[
    str | None,
    typer.Option(
        envvar="MILLSTREAM_UDS",
        metavar="PATH",
        rich_help_panel=_SERVER,
        help="Path of a Unix socket.",
    ),
]
Loop = Annotated[
    str,
    typer.Option(
        envvar="MILLSTREAM_LOOP",
        metavar="auto|uvloop|asyncio",
        help="The event loop; auto takes uvloop where it is installed.",
    ),
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        "-l",
        envvar="MILLSTREAM_LOG_LEVEL",
        metavar="LEVEL",
        rich_help_panel=_LOGS,
        help="debug, info, warning, error or critical; info by default.",
    ),
]
LogConfig = Annotated[
    str | None,
    typer.Option(
        envvar="MILLSTREAM_LOG_CONFIG",
        rich_help_panel=_LOGS,
        metavar="FILE",
        help="A dictConfig in .json, .toml or .yaml.",
    ),
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        envvar="MILLSTREAM_LOG_JSON",
        rich_help_panel=_LOGS,
        help="One JSON object a line.",
    ),
]
ReloadDir = Annotated[
    list[str] | None,
    typer.Option(
        envvar="MILLSTREAM_RELOAD_DIR",
        rich_help_panel=_RELOAD,
        metavar="DIR",
        help="Watched instead of the application's directory; may be repeated.",
    ),
]
Ext = Annotated[
    list[str] | None,
    typer.Option(
        "--ext",
        "--extension",
        "--reload-ext",
        "--reload-extension",
        envvar="MILLSTREAM_EXT",
        rich_help_panel=_RELOAD,
        metavar="EXT",
        help="File extension watched besides py; may be repeated.",
    ),
]
_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(wanted: bool) -> None:
    if wanted:
        from .inspect import own_version

        print(f"millstream {own_version()}")
        raise typer.Exit()


@cli.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-v", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


@cli.command(context_settings=_EXTRA)
def run(
    context: typer.Context,
    target: TargetArg,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", "-w", min=1, envvar="MILLSTREAM_WORKERS", metavar="N", help="Processes."
        ),
    ] = 1,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload",
            "-r",
            envvar="MILLSTREAM_RELOAD",
            rich_help_panel=_RELOAD,
            help="Restart when a file changes.",
        ),
    ] = False,
    reload_dir: ReloadDir = None,
    ext: Ext = None,
    host: Host = None,
    port: Port = None,
    uds: Uds = None,
    loop: Loop = "auto",
    log_level: LogLevel = None,
    log_config: LogConfig = None,
    log_json: LogJson = False,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> None:
    """Run an application: Millstream, a broker, FastAPI or any other ASGI application.

    Options that are not listed here go to the start-up hooks of a plain application
    ([bold]--env prod[/] becomes [bold]env="prod"[/]), and to uvicorn for an HTTP target.
    """
    from . import run as runner
    from .options import RunOptions

    options = RunOptions(
        target=target,
        app_dir=app_dir,
        factory=factory,
        host=host,
        port=port,
        uds=uds,
        loop=loop,
        log_level=log_level,
        log_config=log_config,
        log_json=log_json,
        extra=list(context.args),
    )
    _exit_on_error(options.check)
    if reload and workers > 1:
        _exit(fail("--reload watches one process; leave --workers out", USAGE))
    if reload or workers > 1:
        _posix("--reload and --workers")
    if reload:
        from .reload import watch

        _exit(_guarded(lambda: watch(options, directories=reload_dir or (), extensions=ext or ())))
    if workers > 1:
        from .workers import supervise

        _exit(_guarded(lambda: supervise(options, workers)))
    _exit(_guarded(lambda: runner.execute(options)))


@cli.command(context_settings=_EXTRA)
def dev(
    context: typer.Context,
    target: TargetArg,
    reload_dir: ReloadDir = None,
    ext: Ext = None,
    host: Host = None,
    port: Port = None,
    uds: Uds = None,
    loop: Loop = "auto",
    log_level: LogLevel = None,
    log_config: LogConfig = None,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> None:
    """Run for its developer: reload, links, and a broker that starts by itself."""
    from .dev import develop
    from .options import RunOptions

    _posix("dev")
    options = RunOptions(
        target=target,
        app_dir=app_dir,
        factory=factory,
        host=host,
        port=port,
        uds=uds,
        loop=loop,
        log_level=log_level,
        log_config=log_config,
        extra=list(context.args),
        dev=True,
    )
    _exit_on_error(options.check)
    _exit(_guarded(lambda: develop(options, directories=reload_dir or (), extensions=ext or ())))


@cli.command()
def check(target: TargetArg, app_dir: AppDir = ".", factory: Factory = False) -> None:
    """Find wrong declarations, all in one go and without a broker."""
    from .inspect import check as command

    _exit(_guarded(lambda: command(target, app_dir, factory)))


@cli.command()
def show(
    target: TargetArg,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> None:
    """List subscriptions and publishers."""
    from .inspect import show as command

    _exit(_guarded(lambda: command(target, app_dir, factory, json=json)))


@cli.command(context_settings=_EXTRA)
def publish(
    context: typer.Context,
    target: TargetArg,
    message: Annotated[
        str, typer.Argument(help="JSON, else text; [bold]-[/] reads it from standard input.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Also under the broker's word: --subject, --topic, ..."
        ),
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")
    ] = None,
    rpc: Annotated[bool, typer.Option("--rpc", help="Wait for the reply and print it.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 5.0,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> None:
    """Publish one message through the target's first broker.

    Further options are arguments of the broker's [bold]publish[/], such as --stream.
    """
    from .inspect import publish as command

    _exit(
        _guarded(
            lambda: command(
                target,
                message,
                app_dir=app_dir,
                factory=factory,
                to=to,
                headers=header or (),
                rpc=rpc,
                timeout=timeout,
                extra=context.args,
            )
        )
    )


@cli.command()
def version() -> None:
    """Print the versions of what is installed."""
    from .inspect import versions

    _exit(versions())


def _posix(what: str) -> None:
    if os.name != "posix":
        _exit(fail(f"{what}: only on Linux and macOS", USAGE))


def _guarded(call: Callable[[], int]) -> int:
    """The command's exit code; errors that were foreseen become one message."""
    from .target import TargetError

    try:
        return call()
    except TargetError as error:
        return fail(error, USAGE)
    except MillstreamError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def _exit_on_error(check: Callable[[], None]) -> None:
    def call() -> int:
        check()
        return 0

    if code := _guarded(call):
        _exit(code)


def _exit(code: int) -> Any:
    raise typer.Exit(code)


def main() -> None:
    """The entry point of the console script."""
    cli(prog_name="millstream")


if __name__ == "__main__":
    main()
