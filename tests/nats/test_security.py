"""Who gets in: users, tokens, keys, JWT, TLS."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess

import nkeys
import pytest

from millstream.errors import ConnectError, SetupError
from millstream.nats import (
    NatsCredentials,
    NatsJWT,
    NatsNKey,
    NatsSecurity,
    NatsToken,
    NatsUserPassword,
)
from millstream.nats.driver import NatsDriver
from millstream.security import BaseSecurity, SASLPlaintext, SASLScram256
from tests.helpers import eventually
from tests.servers import NatsServer, missing


async def lets_in(server, url=None, **options):
    driver = NatsDriver(url or server.url, **options)
    await driver.connect()
    assert await driver.ping(2)
    await driver.close()


async def keeps_out(server, url=None, **options):
    """The error, which is permanent and tells no secret."""
    driver = NatsDriver(url or server.url, **options)
    with pytest.raises(ConnectError) as caught:
        await driver.connect()
    await driver.close()
    assert caught.value.permanent
    text = str(caught.value) + repr(caught.value) + driver.describe() + repr(options)
    assert "s3cret" not in text and "wrong" not in text
    assert f"127.0.0.1:{server.port}" in text
    return str(caught.value)


# Users and tokens


async def test_user_and_password():
    with NatsServer(args=["--user", "u", "--pass", "s3cret"]) as server:
        await lets_in(server, security=NatsUserPassword("u", "s3cret"))
        await lets_in(server, security=NatsUserPassword(lambda: "u", lambda: "s3cret"))
        await lets_in(server, user="u", password="s3cret")
        await lets_in(server, server.url.replace("//", "//u:s3cret@"))
        assert "credentials" in await keeps_out(server, security=NatsUserPassword("u", "wrong"))
        await keeps_out(server, server.url.replace("//", "//u:wrong@"))
        await keeps_out(server)


async def test_the_logins_that_brokers_share():
    context = ssl.create_default_context()
    with NatsServer(args=["--user", "u", "--pass", "s3cret"]) as server:
        await lets_in(server, security=SASLPlaintext("u", "s3cret"))
        assert "credentials" in await keeps_out(server, security=SASLPlaintext("u", "wrong"))
        await keeps_out(server, security=BaseSecurity())
        assert "no TLS" in await keeps_out(
            server, security=SASLPlaintext("u", "s3cret", ssl_context=context)
        )
    with pytest.raises(SetupError, match="NATS has no SASLScram256"):
        NatsDriver(security=SASLScram256("u", "s3cret"))
    with pytest.raises(SetupError, match="use_ssl=False"):
        NatsSecurity(ssl_context=context, use_ssl=False)


async def test_token():
    with NatsServer(args=["--auth", "s3cret"]) as server:
        await lets_in(server, security=NatsToken("s3cret"))
        await lets_in(server, token=lambda: "s3cret")
        await lets_in(server, server.url.replace("//", "//s3cret@"))
        await keeps_out(server, security=NatsToken("wrong"))


async def test_a_callable_that_fails_is_a_failed_connect():
    def broken():
        raise RuntimeError("s3cret vault is sealed")

    with NatsServer(args=["--auth", "s3cret"]) as server:
        driver = NatsDriver(server.url, security=NatsToken(broken))
        with pytest.raises(ConnectError, match="callable failed: RuntimeError") as caught:
            await driver.connect()
        assert not caught.value.permanent and "s3cret" not in str(caught.value)
        await driver.close()


# nats-py leaves the socket of a refused reconnect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_rotated_token_is_used_after_a_reconnect():
    token = "one"
    with NatsServer(args=["--auth", "one"]) as server:
        driver = NatsDriver(server.url, security=NatsToken(lambda: token), reconnect_time_wait=0.1)
        events = []
        driver.notify = lambda event, reason: events.append(event)
        await driver.connect()
        server.stop()
        server.args = ["--auth", "two"]
        server.start()
        await eventually(lambda: "disconnected" in events)
        token = "two"
        await eventually(lambda: "reconnected" in events)
        await driver.close()


def test_a_repr_tells_nothing():
    for security in (
        NatsUserPassword("u", "s3cret"),
        NatsToken("s3cret"),
        NatsNKey.from_seed("SU"),
    ):
        assert "s3cret" not in repr(security) and "SU" not in repr(security)


# Keys


def key(prefix):
    seed = nkeys.encode_seed(os.urandom(32), prefix)
    return nkeys.from_seed(bytearray(seed)), seed.decode()


async def test_nkeys(tmp_path):
    pair, seed = key(nkeys.PREFIX_BYTE_USER)
    _, other = key(nkeys.PREFIX_BYTE_USER)
    path = tmp_path / "user.nk"
    path.write_text(seed)
    config = f"authorization {{ users = [{{nkey: {pair.public_key.decode()}}}] }}"
    with NatsServer(config=config) as server:
        await lets_in(server, security=NatsNKey.from_seed(seed))
        await lets_in(server, security=NatsNKey.from_file(path))
        await lets_in(server, security=NatsNKey(str(path)))
        await keeps_out(server, security=NatsNKey.from_seed(other))
        assert "seed" in await keeps_out(server, security=NatsNKey.from_seed("rubbish"))
        missing = NatsNKey.from_file(tmp_path / "none")
        assert "cannot be read" in await keeps_out(server, security=missing)


def part(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(issuer, subject, kind, **claims):
    """A NATS JWT (docs.nats.io, JWTs): version 2, signed by ``issuer``."""
    body = {
        "jti": "x",
        "iat": 1700000000,
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": kind,
        "nats": {"type": kind, "version": 2, **claims},
    }
    head = part(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    signed = f"{head}.{part(json.dumps(body).encode())}"
    return f"{signed}.{part(issuer.sign(signed.encode()))}"


@pytest.fixture
def account():
    """A server's configuration with an operator, and a user of one account."""
    operator, _ = key(nkeys.PREFIX_BYTE_OPERATOR)
    account, _ = key(nkeys.PREFIX_BYTE_ACCOUNT)
    user, seed = key(nkeys.PREFIX_BYTE_USER)
    limits = dict.fromkeys(("subs", "conn", "leaf", "imports", "exports", "data", "payload"), -1)
    account_jwt = token(operator, account, "account", limits={**limits, "wildcards": True})
    user_jwt = token(account, user, "user", subs=-1, data=-1, payload=-1)
    config = (
        f"operator: {token(operator, operator, 'operator')}\n"
        "resolver: MEMORY\n"
        f"resolver_preload: {{ {account.public_key.decode()}: {account_jwt} }}"
    )
    return config, user_jwt, seed, user


async def test_jwt_credentials(account, tmp_path):
    config, jwt, seed, user = account

    def sign(nonce):
        return base64.b64encode(user.sign(nonce.encode()))

    text = (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    creds, jwt_file, seed_file = (tmp_path / name for name in ("a.creds", "a.jwt", "a.nk"))
    creds.write_text(text)
    jwt_file.write_text(jwt)
    seed_file.write_text(seed)
    with NatsServer(config=config, jetstream=False) as server:
        await lets_in(server, security=NatsCredentials(creds))
        await lets_in(server, security=NatsCredentials.from_file(str(creds)))
        await lets_in(server, security=NatsCredentials.from_files(jwt=jwt_file, seed=seed_file))
        await lets_in(server, security=NatsCredentials.from_raw(text))
        await lets_in(
            server,
            security=NatsJWT(
                lambda: jwt.encode(), lambda n: base64.b64encode(user.sign(n.encode()))
            ),
        )
        await keeps_out(server)
        missing = NatsCredentials(tmp_path / "none.creds")
        assert "cannot be read" in await keeps_out(server, security=missing)
        creds.write_text("nothing of the kind")
        # nats-py looks for the JWT for ever in a file that has none.
        wrong = NatsJWT(lambda: b"x.y.z", sign)
        await keeps_out(server, security=wrong)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate authority, and a server's and a client's certificate from it."""
    if shutil.which("openssl") is None:
        missing("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def run(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run(
        "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca"
    )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        run("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signer)
    return folder


def tls_config(folder, extra=""):
    return (
        f'tls {{ cert_file: "{folder}/server.pem", key_file: "{folder}/server.key", '
        f'ca_file: "{folder}/ca.pem" {extra} }}'
    )


async def test_tls(certificates):
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    with NatsServer(config=tls_config(certificates)) as server:
        await lets_in(server, security=NatsSecurity(ssl_context=context))
        await lets_in(server, tls=context)
        await lets_in(server, security=NatsSecurity(ssl_context=context, tls_hostname="localhost"))
        text = await keeps_out(server, security=NatsSecurity(use_ssl=True))
        assert "certificate is not trusted" in text
        await keeps_out(server)
        elsewhere = NatsSecurity(ssl_context=context, tls_hostname="elsewhere")
        assert "certificate" in await keeps_out(server, security=elsewhere)


async def test_tls_with_a_clients_certificate_and_a_password(certificates):
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    config = (
        tls_config(certificates, ", verify: true") + '\nauthorization {user: u, password: "s3cret"}'
    )
    with NatsServer(config=config) as server:
        await lets_in(server, security=NatsUserPassword("u", "s3cret", ssl_context=context))
        await keeps_out(server, security=NatsUserPassword("u", "wrong", ssl_context=context))


async def test_no_plain_connection_where_tls_is_asked_for(certificates):
    with NatsServer() as server:
        text = await keeps_out(server, security=NatsSecurity(use_ssl=True))
        assert "offers no TLS" in text
        assert "offers no TLS" in await keeps_out(server, server.url.replace("nats:", "tls:"))
