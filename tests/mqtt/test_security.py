"""Who gets in, and by which way: users, rights, TLS, certificates of clients."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from millstream.errors import ConnectError, PublishError, SetupError
from millstream.mqtt import MqttBroker
from millstream.retry import Retry
from millstream.security import BaseSecurity, SASLPlaintext, SASLScram256
from tests.helpers import eventually, unique
from tests.servers import missing
from tests.servers.mqtt import MosquittoServer


async def works(broker: MqttBroker) -> None:
    """A session, a publication and a request."""
    name, got = unique(), list[str]()

    @broker.subscriber(name)
    async def handler(body: str) -> str:
        got.append(body)
        return body.upper()

    await broker.start()
    try:
        await broker.publish("a", name)
        assert await broker.request("b", name, response_model=str) == "B"
        await eventually(lambda: got == ["a", "b"])
    finally:
        await broker.stop()


async def keeps_out(broker: MqttBroker) -> str:
    """The error, which is permanent and tells no secret."""
    with pytest.raises(ConnectError) as caught:
        await broker.connect()
    assert caught.value.permanent
    text = str(caught.value)
    assert "s3cret" not in text and "wrong" not in text
    return text


def users(folder: Path, *names: str) -> list[str]:
    """The lines of a configuration with these users, whose password is s3cret."""
    path = folder / "users"
    path.touch(mode=0o600)
    for name in names:
        subprocess.run(["mosquitto_passwd", "-b", path, name, "s3cret"], check=True)
    return [f"password_file {path}"]


@pytest.mark.parametrize("version", ["5.0", "3.1.1"])
async def test_a_user_and_a_password(tmp_path: Path, version: str) -> None:
    with MosquittoServer(anonymous=False, settings=users(tmp_path, "ann", "b@b")) as server:

        def broker(user: str = "", **options: BaseSecurity) -> MqttBroker:
            url = server.url.replace("//", f"//{user}@" if user else "//")
            return MqttBroker(url, version=version, **options)  # type: ignore[arg-type]

        if version == "5.0":
            await works(broker("ann:s3cret"))
            await works(broker("b%40b:s3cret"))
            await works(broker(security=SASLPlaintext("ann", "s3cret", use_ssl=False)))
        else:
            await broker("ann:s3cret").connect()
        for wrong in (broker("ann:wrong"), broker("eve:s3cret"), broker()):
            assert "not authorized" in await keeps_out(wrong)


def test_what_mqtt_has_not() -> None:
    with pytest.raises(SetupError, match="SASLPlaintext"):
        MqttBroker(security=SASLScram256("a", "b"))


async def test_missing_rights_are_told_and_lose_nothing(tmp_path: Path) -> None:
    rights = tmp_path / "acl"
    rights.write_text("topic readwrite in/#\ntopic readwrite ms/#\ntopic deny in/a/dlq/#\n")
    rights.chmod(0o600)
    with MosquittoServer(settings=[f"acl_file {rights}"]) as server:
        broker = MqttBroker(server.url)
        tries: list[str] = []

        @broker.subscriber("in/a", retry=Retry(attempts=1, delay=0.1))
        async def handler(body: str) -> None:
            tries.append(body)
            raise ValueError("never")

        await broker.start()
        with pytest.raises(PublishError, match=r"'elsewhere' was not published: not authorized"):
            await broker.publish("x", "elsewhere")
        await broker.publish("x", "in/a")
        await eventually(lambda: tries)
        await asyncio.sleep(0.2)  # nothing is to happen
        await broker.stop()
        # The letter was refused, so the message stayed: the session brings it again.
        rights.write_text("topic readwrite #\n")
        os.kill(server.pid, signal.SIGHUP)
        again = MqttBroker(server.url)

        @again.subscriber("in/a", retry=Retry(attempts=1))
        async def later(body: str) -> None:
            tries.append(body)

        await again.start()
        await eventually(lambda: tries == ["x", "x"])
        await again.stop()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's and a client's certificate of it, and another authority."""
    if shutil.which("openssl") is None:
        missing("no openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test")
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-keyout", "other.key", "-out", "other.pem")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        ask = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}")
        openssl(*ask, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key")
        openssl(*sign, "-CAcreateserial", "-days", "2", "-extfile", "san", "-out", f"{name}.pem")
    return folder


def listener(folder: Path, *more: str) -> Sequence[str]:
    files = {"cafile": "ca.pem", "certfile": "server.pem", "keyfile": "server.key"}
    return [*(f"{name} {folder / file}" for name, file in files.items()), *more]


def trusting(folder: Path, authority: str = "ca.pem", client: str = "") -> BaseSecurity:
    context = ssl.create_default_context(cafile=str(folder / authority))
    if client:
        context.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return BaseSecurity(ssl_context=context)


async def test_tls(certificates: Path, tmp_path: Path) -> None:
    with MosquittoServer(
        listener=listener(certificates), tls=True, anonymous=False, settings=users(tmp_path, "ann")
    ) as server:
        assert server.url.startswith("mqtts://")
        context = trusting(certificates).ssl_context
        assert context is not None
        await works(MqttBroker(server.url, security=SASLPlaintext("ann", "s3cret", context)))
        plain = server.url.replace("mqtts", "mqtt").replace("//", "//ann:s3cret@")
        await works(MqttBroker(plain, security=trusting(certificates)))
        wrong = MqttBroker(server.url, security=trusting(certificates, "other.pem"))
        assert "not trusted" in await keeps_out(wrong)
        # By default the authorities of the system decide, and they do not know this one.
        assert "not trusted" in await keeps_out(MqttBroker(server.url))
        # The wrong one of the two schemes.
        with pytest.raises(ConnectError, match="has TLS, write mqtts://"):
            await MqttBroker(plain, startup_timeout=0).connect()
    with MosquittoServer() as server, pytest.raises(ConnectError, match="has no TLS, write mqtt:"):
        await MqttBroker(server.url.replace("mqtt", "mqtts"), startup_timeout=0).connect()


async def test_certificates_of_clients(certificates: Path) -> None:
    lines = listener(certificates, "require_certificate true", "use_identity_as_username true")
    with MosquittoServer(listener=lines, tls=True) as server:
        security = trusting(certificates, client="client")
        await works(MqttBroker(server.url, security=security))
        assert "u'client'" in server.log  # who it is comes from the certificate
        with pytest.raises(ConnectError, match="CERTIFICATE_REQUIRED") as caught:
            await MqttBroker(server.url, security=trusting(certificates)).connect()
        assert caught.value.permanent  # it is not tried again
