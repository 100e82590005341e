"""The command line's commands and options."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from .arguments import EXTRA, Commands, Json, Wanted, command, option, posix
from .dlq import dlq
from .options import RunOptions
from .target import TargetError

cli = typer.Typer(
    name="millstream",
    cls=Commands,
    help="Run and inspect message-driven services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cli.add_typer(dlq)

_SERVER = "Server (HTTP targets)"
_LOGS = "Logging"
_RELOAD = "Reload"


class Running(Wanted, kw_only=True):
    """What ``run`` and ``dev`` are told alike."""

    loop: Annotated[
        str,
        option(
            "--loop",
            metavar="auto|uvloop|asyncio",
            help="The event loop; auto takes uvloop where it is installed.",
        ),
    ] = "auto"
    reload_dir: Annotated[
        list[str] | None,
        option(
            "--reload-dir",
            panel=_RELOAD,
            metavar="DIR",
            help="Watched instead of the application's directory; may be repeated.",
        ),
    ] = None
    ext: Annotated[
        list[str] | None,
        option(
            *("--ext", "--extension", "--reload-ext", "--reload-extension"),
            panel=_RELOAD,
            metavar="EXT",
            help="File extension watched besides py; may be repeated.",
        ),
    ] = None
    host: Annotated[
        str | None,
        option("--host", panel=_SERVER, metavar="ADDRESS", help="Address; 127.0.0.1 by default."),
    ] = None
    port: Annotated[
        int | None,
        option(
            *("--port", "-p"),
            panel=_SERVER,
            min=0,
            max=65535,
            metavar="PORT",
            help="Port; 8000 by default, 0 picks a free one.",
        ),
    ] = None
    uds: Annotated[
        str | None,
        option("--uds", panel=_SERVER, metavar="PATH", help="Path of a Unix socket."),
    ] = None
    log_level: Annotated[
        str | None,
        option(
            *("--log-level", "-l"),
            panel=_LOGS,
            metavar="LEVEL",
            help="debug, info, warning, error or critical; info by default.",
        ),
    ] = None
    log_config: Annotated[
        str | None,
        option(
            "--log-config",
            panel=_LOGS,
            metavar="FILE",
            help="A dictConfig in .json, .toml or .yaml.",
        ),
    ] = None

    def options(self, context: typer.Context, **more: Any) -> RunOptions:
        """All that was said about the run.

        Raises:
            TargetError: an option has a value that means nothing.
        """
        options = RunOptions(**msgspec.structs.asdict(self), extra=list(context.args), **more)
        options.check()
        return options


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"millstream {__version__}")
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


@command(cli, context_settings=EXTRA)
def run(
    running: Running,
    context: typer.Context,
    workers: Annotated[int, option("--workers", "-w", min=1, metavar="N", help="Processes.")] = 1,
    reload: Annotated[
        bool, option("--reload", "-r", panel=_RELOAD, help="Restart when a file changes.")
    ] = False,
    log_json: Annotated[
        bool, option("--log-json", panel=_LOGS, help="One JSON object a line.")
    ] = False,
    health_socket: Annotated[
        str | None,
        option(
            "--health-socket",
            metavar="PATH",
            help="Where `millstream health` asks a plain application; its own path by default.",
        ),
    ] = None,
    no_health_socket: Annotated[
        bool, typer.Option("--no-health-socket", help="Do not answer `millstream health`.")
    ] = False,
) -> int:
    """Run an application: Millstream, a broker, FastAPI or any other ASGI application.

    Options that are not listed here go to the start-up hooks of a plain application
    ([bold]--env prod[/] becomes [bold]env="prod"[/]), and to uvicorn for an HTTP target.
    """
    options = running.options(
        context,
        log_json=log_json,
        health_socket=health_socket,
        no_health_socket=no_health_socket,
    )
    if reload and workers > 1:
        raise TargetError("--reload watches one process; leave --workers out")
    if reload or workers > 1:
        posix("--reload and --workers")
    if reload:
        from .reload import watch

        return watch(options)
    if workers > 1:
        from .workers import supervise

        return supervise(options, workers)
    from .run import execute

    return execute(options)


@command(cli, context_settings=EXTRA)
def dev(running: Running, context: typer.Context) -> int:
    """Run for its developer: reload, links, and a broker that starts by itself."""
    posix("dev")
    from .dev import DevDoorman
    from .reload import watch

    options = running.options(context, dev=True)
    return watch(options, DevDoorman(options))


@command(cli)
def check(wanted: Wanted) -> int:
    """Find wrong declarations, all in one go and without a broker."""
    from . import inspect

    return wanted.run(inspect.check)


@command(cli)
def show(wanted: Wanted, json: Json = False) -> int:
    """List subscriptions and publishers."""
    from . import inspect

    return wanted.run(lambda target: inspect.show(target, json=json))


@command(cli, context_settings=EXTRA)
def publish(
    wanted: Wanted,
    message: Annotated[
        str, typer.Argument(help="JSON, else text; [bold]-[/] reads it from standard input.")
    ],
    context: typer.Context,
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
) -> int:
    """Publish one message through the target's first broker.

    Further options are arguments of the broker's [bold]publish[/], such as --stream.
    """
    from . import inspect

    return wanted.run(
        lambda target: inspect.publish(
            target,
            message,
            to=to,
            headers=header or (),
            rpc=rpc,
            timeout=timeout,
            extra=context.args,
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
) -> int:
    """Ask running plain applications how they are.

    The exit code is 0 if all are ready, 1 if one is not or does not answer, 2 if there is none.
    """
    posix("health")
    from .health import health as ask

    return ask(path, timeout, json=json)


@cli.command()
def version() -> int:
    """Print the versions of what is installed."""
    from .inspect import versions

    return versions()


def main() -> None:
    """The entry point of the console script."""
    cli(prog_name="millstream")


if __name__ == "__main__":
    main()
