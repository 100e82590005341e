"""Who gets in, and who may do what: SASL, TLS, client certificates, rights."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import admin as _admin

from millstream.errors import ConnectError, PublishError, SetupError
from millstream.kafka import KafkaBroker
from millstream.security import (
    SASLGSSAPI,
    BaseSecurity,
    SASLOAuthBearer,
    SASLPlaintext,
    SASLScram256,
    SASLScram512,
)
from tests.helpers import eventually, unique
from tests.servers import free_port, missing
from tests.servers.kafka import KafkaServer, Listener

ADMIN: Any = _admin
PLAIN = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required "
    'user_worker="s3cret" user_reader="s3cret" user_nobody="s3cret";'
)
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
OAUTH = (
    "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required "
    'unsecuredLoginStringClaim_sub="server";'
)


class Secured:
    """A server that can be reached in every way there is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sasl, self.both, self.tls = free_port(), free_port(), free_port()
        store = folder / "server.all"
        store.write_text((folder / "server.key").read_text() + (folder / "server.pem").read_text())
        settings = {
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(folder / "ca.pem"),
            "listener.name.tls.ssl.client.auth": "required",
            "ssl.principal.mapping.rules": "RULE:^CN=(.*?)$/$1/",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:worker;User:client",
        }
        for listener in ("sasl", "both"):
            prefix = f"listener.name.{listener}"
            settings |= {
                f"{prefix}.plain.sasl.jaas.config": PLAIN,
                f"{prefix}.scram-sha-256.sasl.jaas.config": SCRAM,
                f"{prefix}.scram-sha-512.sasl.jaas.config": SCRAM,
                f"{prefix}.oauthbearer.sasl.jaas.config": OAUTH,
            }
        listeners = {
            "SASL": Listener("SASL_PLAINTEXT", self.sasl),
            "BOTH": Listener("SASL_SSL", self.both),
            "TLS": Listener("SSL", self.tls),
        }
        self.server = KafkaServer(settings=settings, listeners=listeners)

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / "ca.pem")

    def admin(self) -> Any:
        return ADMIN.AdminClient({"bootstrap.servers": self.server.url})


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if shutil.which("openssl") is None:
        missing("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def run(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    pair = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    authority = ("-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca")
    run("req", "-x509", *pair, *authority)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        run("req", *pair, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", "2", *signer)
    where = Secured(folder)
    with where.server:
        mechanisms, admin = ADMIN.ScramMechanism, where.admin()
        for kind in (mechanisms.SCRAM_SHA_256, mechanisms.SCRAM_SHA_512):
            info = ADMIN.ScramCredentialInfo(kind, 4096)
            new = [ADMIN.UserScramCredentialUpsertion("worker", info, b"s3cret")]
            for future in admin.alter_user_scram_credentials(new).values():
                future.result(10)
        yield where


both_clients = pytest.mark.parametrize("client", ["confluent", "aiokafka"])


async def works(port: int, **options: Any) -> None:
    """A topic is made, and a message goes there, to a group and on."""
    topic, got = unique(), list[Any]()
    broker = KafkaBroker(f"127.0.0.1:{port}", **options)

    @broker.subscriber(topic, group_id=topic)
    @broker.publisher(f"{topic}.out")
    async def first(body: int) -> int:
        return body + 1

    @broker.subscriber(f"{topic}.out", group_id=topic)
    async def second(body: int) -> None:
        got.append(body)

    await broker.start()
    try:
        await broker.publish(1, topic)
        await eventually(lambda: got == [2], 10)
    finally:
        await broker.stop()


async def keeps_out(port: int, **options: Any) -> str:
    """The error, which is permanent and tells no secret."""
    broker = KafkaBroker(f"127.0.0.1:{port}", **options)
    begin = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        await broker.connect()
    assert caught.value.permanent
    assert time.monotonic() - begin < 8
    text = str(caught.value) + repr(broker) + broker.driver.describe()
    assert "s3cret" not in text and "wrong" not in text
    assert f"127.0.0.1:{port}" in text
    return text


@both_clients
@pytest.mark.parametrize("kind", [SASLPlaintext, SASLScram256, SASLScram512])
async def test_user_and_password(secured: Secured, kind: type[Any], client: str) -> None:
    sasl, both = secured.sasl, secured.both
    await works(sasl, client=client, security=kind("worker", "s3cret"))
    tls = kind("worker", "s3cret", ssl_context=secured.context)
    await works(both, client=client, security=tls)
    text = await keeps_out(sasl, client=client, security=kind("worker", "wrong"))
    assert "uthentication" in text


@both_clients
async def test_tokens(secured: Secured, client: Any) -> None:
    asked = list[float]()

    def token(seconds: float = 60.0) -> tuple[str, float]:
        asked.append(time.time())
        end = time.time() + seconds
        claims = {"sub": "worker", "iat": time.time() - 1, "exp": end}
        parts = [
            base64.urlsafe_b64encode(json.dumps(p).encode()) for p in ({"alg": "none"}, claims)
        ]
        return b".".join([*(part.rstrip(b"=") for part in parts), b""]).decode(), end

    security = SASLOAuthBearer(ssl_context=secured.context)
    options: dict[str, Any] = {"client": client, "security": security}
    await works(secured.both, **options, sasl_oauth_token_provider=token)
    assert asked
    with pytest.raises(SetupError, match="without a token"):
        KafkaBroker(f"127.0.0.1:{secured.both}", **options)


@both_clients
async def test_tls_and_client_certificates(secured: Secured, client: str) -> None:
    folder = secured.folder
    files = {"ssl_cafile": str(folder / "ca.pem"), "security": BaseSecurity(use_ssl=True)}
    files["client"] = client
    own = {"ssl_certfile": str(folder / "client.pem"), "ssl_keyfile": str(folder / "client.key")}
    await works(secured.tls, **files, **own)
    # Without a certificate of ours the server ends the connection, after the handshake.
    nameless = KafkaBroker(f"127.0.0.1:{secured.tls}", startup_timeout=1, **files)
    with pytest.raises(ConnectError):
        await nameless.connect()
    # A certificate that nobody vouches for.
    assert "ertificate" in await keeps_out(
        secured.both, client=client, security=SASLPlaintext("worker", "s3cret", use_ssl=True)
    )


@both_clients
async def test_a_missing_right_is_named(secured: Secured, client: Any) -> None:
    topic = unique()
    broker = KafkaBroker(
        f"127.0.0.1:{secured.sasl}",
        client=client,
        security=SASLPlaintext("nobody", "s3cret"),
        startup_timeout=5,
    )

    @broker.subscriber(topic, group_id=topic)
    async def handle(body: int) -> None: ...

    with pytest.raises(SetupError, match="grant the right"):
        await broker.start()
    await broker.stop()


@both_clients
async def test_a_reader_needs_no_more_than_to_read(secured: Secured, client: Any) -> None:
    topic, got = unique(), list[int]()
    user = ("User:reader", "*")
    kinds, rights = ADMIN.ResourceType, ADMIN.AclOperation
    literal, allow = ADMIN.ResourcePatternType.LITERAL, ADMIN.AclPermissionType.ALLOW
    new = [
        ADMIN.AclBinding(kind, topic, literal, *user, right, allow)
        for kind, right in (
            (kinds.TOPIC, rights.READ),
            (kinds.TOPIC, rights.DESCRIBE),
            (kinds.GROUP, rights.READ),
        )
    ]
    admin = secured.admin()
    for future in admin.create_acls(new).values():
        future.result(10)
    for future in admin.create_topics([ADMIN.NewTopic(topic, 1, 1)]).values():
        future.result(10)
    broker = KafkaBroker(
        f"127.0.0.1:{secured.sasl}",
        client=client,
        security=SASLPlaintext("reader", "s3cret"),
        allow_auto_create_topics=False,
    )

    @broker.subscriber(topic, group_id=topic, auto_commit_interval_ms=50)
    async def handle(body: int) -> None:
        got.append(body)

    async with KafkaBroker(secured.server.url) as sender:
        await broker.start()
        try:
            await sender.publish(1, topic)
            await eventually(lambda: got == [1], 10)
            with pytest.raises(PublishError, match=r"(?i)authoriz"):
                await broker.publish(2, topic)
            await sender.publish(3, topic)  # and it reads on
            await eventually(lambda: got == [1, 3], 10)
        finally:
            await broker.stop()


async def test_kerberos_says_what_is_missing(kafka: Any) -> None:
    broker = KafkaBroker(kafka.url, security=SASLGSSAPI())
    with pytest.raises(ConnectError, match="built without Kerberos") as caught:
        await broker.connect()
    assert caught.value.permanent
    with pytest.raises(SetupError, match="needs gssapi"):
        KafkaBroker(kafka.url, security=SASLGSSAPI(), client="aiokafka")
