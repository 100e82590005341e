"""check, show, publish, version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.harness import command, write
from tests.servers import free_port

#: Nothing listens there: neither `check` nor `show` needs a broker.
NOWHERE = "nats://127.0.0.1:1"

SHOP = """
from fastapi import FastAPI
from millstream import Millstream
from millstream.nats import JStream, NatsBroker, NatsRouter

broker = NatsBroker({url!r}, startup_timeout=2)
router = NatsRouter(prefix="{subject}.")
stream = JStream("{subject}", subjects=["{subject}.work"])


@router.subscriber("orders.{{region}}", queue="workers", concurrency=4)
@router.publisher("invoices")
async def invoice(body: dict, region: str) -> dict:
    return body


@router.subscriber("work", stream=stream, durable="worker")
async def work(body: int) -> None: ...


@router.subscriber("ask")
async def ask(body: dict) -> dict:
    if "boom" in body:
        raise ValueError("too much")
    return {{"got": body}}


lone = router.publisher("audit")
broker.include_router(router)
app = Millstream(broker)
"""


@pytest.fixture
def shop(tmp_path: Path, subject: str) -> str:
    write(tmp_path, main=SHOP.format(url=NOWHERE, subject=subject))
    return subject


def test_check_without_a_broker(shop: str, tmp_path: Path) -> None:
    done = command("check", "main:app", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "OK main:app (Millstream): 3 subscriptions, 2 publishers, 1 broker\n"


WRONG = """
from millstream import Millstream
from millstream.nats import NatsBroker

broker = NatsBroker("nats://127.0.0.1:1")
app = Millstream(broker)


@broker.subscriber("a.>.b")
async def one(body: dict) -> None: ...


@broker.subscriber("a.{x}")
async def two(first: dict, *, second: "Nowhere") -> None: ...
"""


def test_check_prints_all_errors_with_their_places(tmp_path: Path) -> None:
    write(tmp_path, main=WRONG)
    done = command("check", "main:app", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    for says in ("MS102", "one (", "main.py:9", "MS101", "two", "main.py:13", "fix:", "2 errors"):
        assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["check", "show", "publish"])
def test_wrong_targets(shop: str, tmp_path: Path, name: str) -> None:
    more = ["{}", "--to", "x"] if name == "publish" else []
    done = command(name, "main:ap", *more, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "Error: module main has no 'ap'; did you mean main:app?\n"
    write(tmp_path, bad="1 / 0")
    done = command(name, "bad:app", *more, folder=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert "importlib" not in done.stderr


def test_check_without_any_broker(tmp_path: Path) -> None:
    write(tmp_path, main="from fastapi import FastAPI\napp = FastAPI()\n")
    done = command("check", "main:app", folder=tmp_path)
    assert done.returncode == 1 and "main:app (FastAPI) has no broker" in done.stderr
    assert "has no broker" in command("show", "main:app", folder=tmp_path).stdout


def test_show_lists_everything(shop: str, tmp_path: Path) -> None:
    done = command("show", "main:app", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["NatsBroker", NOWHERE] in rows
    assert [
        f"{shop}.orders.{{region}}",
        "invoice",
        "at-most-once",
        "4",
        f"{shop}.invoices",
        "-",
    ] in rows
    assert [f"{shop}.work", "work", "at-least-once", "1", "-", f"{shop}.dlq"] in rows
    assert any(row[:1] == ["main.py:17"] and row[1:] == ["retry,", "5", "tries"] for row in rows), (
        rows
    )
    assert f"also publishes to {shop}.audit" in done.stdout


def test_show_as_json(shop: str, tmp_path: Path) -> None:
    done = command("show", "main:app", "--json", folder=tmp_path)
    shown = json.loads(done.stdout)
    assert shown["target"] == "main:app" and shown["type"] == "Millstream"
    (broker,) = shown["brokers"]
    assert broker["address"] == NOWHERE and broker["kind"] == "NatsBroker"
    assert {p["destination"] for p in broker["publishers"]} == {f"{shop}.invoices", f"{shop}.audit"}
    by_source = {s["source"]: s for s in broker["subscriptions"]}
    work = by_source[f"{shop}.work"]
    assert work["policy"] == "retry" and work["attempts"] == 5 and work["concurrency"] == 1
    assert work["guarantee"] == "at-least-once" and work["dead_letter"] == f"{shop}.dlq"
    orders = by_source[f"{shop}.orders.{{region}}"]
    assert orders["policy"] is None and orders["dead_letter"] is None
    assert orders["bindings"]["operation"]["nats"]["queue"] == "workers" and work["bindings"] == {}
    assert orders["publishes_to"] == [f"{shop}.invoices"] and orders["handlers"] == ["invoice"]


def test_show_tells_what_a_policy_of_the_broker_means(tmp_path: Path) -> None:
    code = """
from millstream import AckPolicy
from millstream.nats import NatsBroker

broker = NatsBroker(ack_policy=AckPolicy.ACK_FIRST)


@broker.subscriber("orders", stream="ORDERS", durable="d")
async def handle(body: dict): ...
"""
    write(tmp_path, main=code)
    shown = json.loads(command("show", "main:broker", "--json", folder=tmp_path).stdout)
    (told,) = shown["brokers"][0]["subscriptions"]
    assert (told["policy"], told["guarantee"]) == ("ack_first", "at-most-once")


def test_show_tells_where_dead_letters_really_go(tmp_path: Path) -> None:
    code = """
from millstream import Millstream
from millstream.kafka import KafkaBroker
from millstream.mqtt import MqttBroker
from millstream.redis import RedisBroker, StreamSub

mqtt, kafka, redis = MqttBroker(), KafkaBroker(), RedisBroker()
app = Millstream(mqtt, kafka, redis)

@mqtt.subscriber("sensors/{room}/temp")
@kafka.subscriber("orders", "returns", group_id="g")
@kafka.subscriber(pattern=r"audit\\.v\\d+", group_id="g")
@kafka.subscriber("own", group_id="g", dead_letter="bin")
@kafka.subscriber("none", group_id="g", dead_letter=None)
@redis.subscriber(stream=StreamSub("events", group="g"))
async def handle(body: dict) -> None: ...
"""
    write(tmp_path, main=code)
    shown = json.loads(command("show", "main:app", "--json", folder=tmp_path).stdout)
    found = [s["dead_letter"] for b in shown["brokers"] for s in b["subscriptions"]]
    wanted = {
        "sensors/room/temp/dlq",
        "orders.dlq",
        "audit.vd.dlq",
        "bin",
        None,
        "stream://events.dlq",
    }
    assert set(found) == wanted


def test_show_what_can_be_shown_beside_errors(tmp_path: Path) -> None:
    write(tmp_path, main=WRONG + "\n@broker.subscriber('good')\nasync def good(body: dict): ...\n")
    done = command("show", "main:app", folder=tmp_path)
    assert done.returncode == 1 and "good" in done.stdout and "MS102" in done.stderr


FAST = """
from fastapi import FastAPI
from millstream.nats.fastapi import NatsRouter

router = NatsRouter("nats://127.0.0.1:1")
app = FastAPI(lifespan=router.lifespan_context)
inner = FastAPI()


@router.subscriber("{subject}.{{region}}")
async def order(body: dict, region: str) -> None: ...


inner.include_router(router)
"""


@pytest.mark.parametrize("target", ["main:app", "main:inner"])
def test_fastapi_applications(tmp_path: Path, subject: str, target: str) -> None:
    write(tmp_path, main=FAST.format(subject=subject))
    done = command("check", target, folder=tmp_path)
    assert done.stdout.endswith("(FastAPI): 1 subscription, 0 publishers, 1 broker\n"), done.stderr
    assert f"{subject}.{{region}}" in command("show", target, folder=tmp_path).stdout
    refused = command("show", "main:router", folder=tmp_path)
    assert refused.returncode == 2 and "include it into an application" in refused.stderr


@pytest.fixture
def running(run: Run, tmp_path: Path, subject: str, nats: Any) -> Any:
    write(tmp_path, main=SHOP.format(url=nats.url, subject=subject))
    process = run("run", "main:app")
    process.expect("Millstream runs")
    return process


def test_publish(running: Any, tmp_path: Path, subject: str) -> None:
    done = command(
        "publish", "main:app", '{"a": 1}', "--to", f"{subject}.orders.eu", folder=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"sent to {subject}.orders.eu\n"), done.stderr
    done = command(
        "publish", "main", "5", "--subject", f"{subject}.work", "--stream", subject, folder=tmp_path
    )
    receipt = json.loads(done.stdout)
    assert receipt["stream"] == subject and receipt["seq"] == 1


def test_publish_and_wait_for_the_reply(running: Any, tmp_path: Path, subject: str) -> None:
    ask = ("--rpc", "--subject", f"{subject}.ask")
    done = command("publish", "main:app", "-", *ask, folder=tmp_path, stdin='{"a": [1]}')
    assert (done.returncode, json.loads(done.stdout)) == (0, {"got": {"a": [1]}})
    failed = command("publish", "main:app", '{"boom": 1}', *ask, folder=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr == "Error: the handler failed: ValueError: too much\n"
    nobody = command("publish", "main:app", "1", "--rpc", "--to", f"{subject}.no", folder=tmp_path)
    assert nobody.returncode == 1 and nobody.stderr.startswith("Error: ")


HEADERS = """
import logging
from millstream import Millstream
from millstream.nats import NatsBroker, NatsMessage

broker = NatsBroker({url!r})
app = Millstream(broker)


@broker.subscriber("{subject}")
async def show(body: str, message: NatsMessage) -> None:
    kind = message.headers["kind"]
    logging.getLogger("shop").info("%s|%s|%s", body, kind, message.correlation_id)
"""


def test_publish_with_headers_and_options(
    run: Run, tmp_path: Path, subject: str, nats: Any
) -> None:
    write(tmp_path, main=HEADERS.format(url=nats.url, subject=subject))
    process = run("run", "main:app")
    process.expect("Millstream runs")
    more = ("--header", "kind=a=b", "--correlation-id", "c-1")
    done = command("publish", "main:app", "just text", "--to", subject, *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    process.expect(r"shop  just text\|a=b\|c-1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no address: add --subject ADDRESS"),
        (["--topic", "x"], "NatsBroker cannot publish with --topic"),
        (["--to", "x", "--header", "novalue"], "--header novalue: write name=value"),
    ],
)
def test_wrong_options_of_publish(
    shop: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = command("publish", "main:app", "1", *arguments, folder=tmp_path)
    assert done.returncode == 2 and done.stderr == f"Error: {says}\n"


def test_publish_to_a_broker_that_is_not_there(tmp_path: Path, subject: str) -> None:
    url = f"nats://me:secret@127.0.0.1:{free_port()}"
    write(tmp_path, main=SHOP.format(url=url, subject=subject))
    done = command("publish", "main:app", "1", "--to", "x", "--timeout", "0.5", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("Error: nats://")
    assert "secret" not in done.stderr and "Traceback" not in done.stderr


def test_version(tmp_path: Path) -> None:
    done = command("version", folder=tmp_path)
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"millstream", "python", "platform", "nats-py", "fastapi", "uvicorn"} <= set(rows)
