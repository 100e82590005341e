"""The command line's commands and options."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import USAGE, AppDir, Factory, Json, TargetArg, guarded, leave, posix
from .dlq import dlq
from .output import fail

cli = typer.Typer(
    name="millstream",
    help="Run and inspect message-driven services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cli.add_typer(dlq)

_SERVER = "Server (HTTP targets)"
_LOGS = "Logging"
_RELOAD = "Reload"

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
    health_socket: Annotated[
        str | None,
        typer.Option(
            envvar="MILLSTREAM_HEALTH_SOCKET",
            metavar="PATH",
            help="Where `millstream health` asks a plain application; its own path by default.",
        ),
    ] = None,
    no_health_socket: Annotated[
        bool, typer.Option("--no-health-socket", help="Do not answer `millstream health`.")
    ] = False,
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
        health_socket=health_socket,
        no_health_socket=no_health_socket,
        extra=list(context.args),
    )
    if code := guarded(options.check):
        leave(code)
    if reload and workers > 1:
        leave(fail("--reload watches one process; leave --workers out", USAGE))
    if reload or workers > 1:
        posix("--reload and --workers")
    if reload:
        from .reload import watch

        leave(guarded(lambda: watch(options, directories=reload_dir or (), extensions=ext or ())))
    if workers > 1:
        from .workers import supervise

        leave(guarded(lambda: supervise(options, workers)))
    leave(guarded(lambda: runner.execute(options)))


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

    posix("dev")
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
    if code := guarded(options.check):
        leave(code)
    leave(guarded(lambda: develop(options, directories=reload_dir or (), extensions=ext or ())))


@cli.command()
def check(target: TargetArg, app_dir: AppDir = ".", factory: Factory = False) -> None:
    """Find wrong declarations, all in one go and without a broker."""
    from .inspect import check as command

    leave(guarded(lambda: command(target, app_dir, factory)))


@cli.command()
def show(
    target: TargetArg,
    json: Json = False,
    app_dir: AppDir = ".",
    factory: Factory = False,
) -> None:
    """List subscriptions and publishers."""
    from .inspect import show as command

    leave(guarded(lambda: command(target, app_dir, factory, json=json)))


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

    leave(
        guarded(
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
def health(
    path: Annotated[
        str | None,
        typer.Option(
            "--socket",
            envvar="MILLSTREAM_HEALTH_SOCKET",
            metavar="PATH",
            help="Of the process; by default all processes of this user are asked.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds to wait for an answer.")] = 3.0,
    json: Json = False,
) -> None:
    """Ask running plain applications how they are.

    The exit code is 0 if all are ready, 1 if one is not or does not answer, 2 if there is none.
    """
    posix("health")
    from .health import health as command

    leave(guarded(lambda: command(path, timeout, json=json)))


@cli.command()
def version() -> None:
    """Print the versions of what is installed."""
    from .inspect import versions

    leave(versions())


def main() -> None:
    """The entry point of the console script."""
    cli(prog_name="millstream")


if __name__ == "__main__":
    main()
