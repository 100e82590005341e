"""Who gets in: users, virtual hosts, TLS, client certificates."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.errors import ConnectError, SetupError
from millstream.rabbit import RabbitBroker, RabbitExternalAuth, RabbitQueue
from millstream.rabbit.driver import RabbitDriver
from millstream.security import BaseSecurity, SASLPlaintext, SASLScram256
from tests.helpers import unique
from tests.servers import free_port, missing
from tests.servers.rabbit import RabbitServer, rabbit_script

CONFIG = """
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
ssl_cert_login_from = common_name
"""


class Secured:
    """A server with TLS, two users and a virtual host."""

    def __init__(self, server: RabbitServer, tls: int, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.plain, self.tls = server.port, tls

    def context(self, *, client: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.folder / "ca.pem")
        if client:
            context.load_cert_chain(self.folder / "client.pem", self.folder / "client.key")
        return context


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if rabbit_script() is None:
        missing("no rabbitmq-server: apt-get install rabbitmq-server")
    if shutil.which("openssl") is None:
        missing("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def run(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    authority = ("-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca")
    run("req", "-x509", *new, *authority)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        run("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signer)
    tls = free_port()
    config = CONFIG.format(port=tls, folder=folder)
    with RabbitServer(config=config, plugins=("rabbitmq_auth_mechanism_ssl",)) as server:
        server.control("add_vhost", "shop/eu")
        for user, host in (("worker", "shop/eu"), ("client", "/")):
            server.control("add_user", user, "s3cret")
            server.control("set_permissions", "-p", host, user, ".*", ".*", ".*")
        server.control("add_user", "reader", "s3cret")
        server.control("set_permissions", "-p", "/", "reader", "^$", "^$", ".*")
        yield Secured(server, tls, folder)


async def lets_in(url: str, **options: Any) -> None:
    driver = RabbitDriver(url, **options)
    await driver.connect()
    assert await driver.ping(5)
    await driver.close()


async def keeps_out(url: str, **options: Any) -> str:
    """The error, which is permanent and tells no secret."""
    driver = RabbitDriver(url, **options)
    with pytest.raises(ConnectError) as caught:
        await driver.connect()
    await driver.close()
    assert caught.value.permanent
    text = str(caught.value) + repr(caught.value) + driver.describe() + repr(options)
    assert "s3cret" not in text and "wrong" not in text
    assert "127.0.0.1:" in text
    return str(caught.value)


async def test_user_and_password_and_virtual_host(secured: Secured) -> None:
    where = f"127.0.0.1:{secured.plain}"
    await lets_in(f"amqp://worker:s3cret@{where}/shop%2Feu")
    await lets_in(f"amqp://{where}/", security=SASLPlaintext("client", "s3cret"))
    await lets_in(
        f"amqp://{where}",
        security=SASLPlaintext(lambda: "worker", lambda: "s3cret"),
        virtualhost="shop/eu",
    )
    await lets_in("amqp://client:s3cret@nowhere:1/", host="127.0.0.1", port=secured.plain)
    assert "credentials" in await keeps_out(f"amqp://client:wrong@{where}/")
    assert "credentials" in await keeps_out(where, security=SASLPlaintext("client", "wrong"))
    assert "virtual host" in await keeps_out(f"amqp://client:s3cret@{where}/nowhere")
    assert "virtual host" in await keeps_out(f"amqp://client:s3cret@{where}/shop%2Feu")


async def test_tls(secured: Secured) -> None:
    where = f"client:s3cret@127.0.0.1:{secured.tls}/"
    await lets_in(f"amqps://{where}", security=BaseSecurity(secured.context()))
    await lets_in(
        f"amqp://127.0.0.1:{secured.tls}",
        security=SASLPlaintext("client", "s3cret", ssl_context=secured.context()),
    )
    assert "not trusted" in await keeps_out(f"amqps://{where}")
    driver = RabbitDriver(f"amqps://client:s3cret@127.0.0.1:{secured.plain}/")
    with pytest.raises(ConnectError):  # the server speaks no TLS there
        await driver.connect()
    driver = RabbitDriver(f"amqp://{where}", timeout=2)
    with pytest.raises(ConnectError):
        await driver.connect()


async def test_a_client_certificate_says_who_we_are(secured: Secured) -> None:
    url = f"amqps://127.0.0.1:{secured.tls}/"
    await lets_in(url, security=RabbitExternalAuth(secured.context(client=True)))
    await keeps_out(url, security=RabbitExternalAuth(secured.context()))


async def test_what_is_not_permitted_is_said(secured: Secured) -> None:
    queue, where = unique(), f"127.0.0.1:{secured.plain}/"
    async with RabbitBroker(f"amqp://{where}", security=SASLPlaintext("client", "s3cret")) as other:
        await other.declare_queue(queue)
    broker = RabbitBroker(f"amqp://reader:s3cret@{where}")

    @broker.subscriber(RabbitQueue(unique()))
    async def handler(body: int) -> None: ...

    with pytest.raises(SetupError, match="access to queue") as caught:
        await broker.start()
    assert "right to configure" in (caught.value.fix or "")


async def test_several_servers_are_tried_in_turn(secured: Secured) -> None:
    urls = ["amqp://127.0.0.1:1/", f"amqp://client:s3cret@127.0.0.1:{secured.plain}/"]
    broker = RabbitBroker(urls, logger=None)
    async with broker:
        assert await broker.ping()


def test_logins_that_rabbitmq_does_not_know() -> None:
    with pytest.raises(SetupError, match="SASLScram256"):
        RabbitBroker(security=SASLScram256("u", "p"))
