"""compose.yaml offers the servers that the documentation and the examples speak of."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from examples.flights.brokers import KINDS
from millstream.embedded import EMBEDDED
from tests.servers.kafka import VERSION as KAFKA

ROOT = Path(__file__).parent.parent
FILE = ROOT / "compose.yaml"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", FILE, *sorted((ROOT / "docs").glob("*.md"))]


def section(name: str) -> str:
    """The lines below a key at the left margin."""
    found = re.search(rf"^{name}:\n((?:(?: .*)?\n)+)", FILE.read_text(), re.MULTILINE)
    assert found, name
    return found[1]


def services() -> dict[str, str]:
    """Each service and its lines."""
    parts = re.split(r"^  ([a-z]+):\n", section("services"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def ports(lines: str) -> dict[int, int]:
    """The ports that a service opens on this machine, and which of its own they are."""
    (found,) = re.findall(r"^    ports: \[(.+)\]$", lines, re.MULTILINE)
    each = [re.fullmatch(r'"127\.0\.0\.1:(\d+):(\d+)"', port) for port in found.split(", ")]
    return {int(port[1]): int(port[2]) for port in each if port is not None}


SERVICES = services()


def test_every_kind_of_server_is_there() -> None:
    assert set(SERVICES) == {"nats", "redis", "valkey", "rabbitmq", "kafka", "mosquitto"}
    assert {kind.service for kind in KINDS.values()} == set(SERVICES) - {"valkey"}


@pytest.mark.parametrize("name", SERVICES)
def test_each_has_a_version_ports_on_loopback_and_a_health_check(name: str) -> None:
    lines = SERVICES[name]
    image = re.findall(r"^    image: (\S+)$", lines, re.MULTILINE)
    assert len(image) == 1 and re.search(r":\d", image[0]), "a version, not whatever is newest"
    assert lines.count("    healthcheck:\n      test: [") == 1
    listed = re.search(r"ports: \[(.+)\]", lines)
    assert listed and len(ports(lines)) == len(listed[1].split(", ")), "some port is not loopback's"


def test_no_port_is_opened_twice() -> None:
    all_ports = [port for lines in SERVICES.values() for port in ports(lines)]
    assert len(all_ports) == len(set(all_ports))


def test_the_ports_are_those_that_brokers_have_by_default() -> None:
    for kind in KINDS.values():
        usual = kind.usual if "://" in kind.usual else f"//{kind.usual}"
        assert urlsplit(usual).port in ports(SERVICES[kind.service]), kind.title
        if kind.embedded is not None:
            assert kind.embedded.usual_port == urlsplit(usual).port
    assert {kind.embedded for kind in KINDS.values()} - {None} == set(EMBEDDED)
    assert ports(SERVICES["valkey"]) == {6380: 6379}


def test_kafka_is_of_the_version_that_is_tested_and_tells_clients_where_it_is() -> None:
    lines = SERVICES["kafka"]
    assert f"apache/kafka:{'.'.join(KAFKA.split('.')[:2])}." in lines
    assert "KAFKA_ADVERTISED_LISTENERS: PLAINTEXT://127.0.0.1:9092" in lines


def test_every_config_that_is_used_is_given() -> None:
    used = re.findall(r"^      - source: (\w+)$", section("services"), re.MULTILINE)
    assert used == re.findall(r"^  (\w+):$", section("configs"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_services_that_are_there(page: Path) -> None:
    for line in re.findall(r"docker compose up ([^\n`]*)", page.read_text()):
        named = re.findall(r"[a-z]+", re.sub(r"(^| )-+[a-z]+", "", line))
        assert set(named) <= set(SERVICES), line


def test_docker_understands_it() -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no docker compose")
    done = subprocess.run(
        [docker, "compose", "-f", str(FILE), "config", "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
