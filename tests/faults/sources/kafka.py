"""Kafka: a consumer group, by the classic protocol and by the one of KIP-848, and with aiokafka."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any, ClassVar, Literal

import msgspec
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, TopicPartition
from confluent_kafka import admin as _admin

from millstream.errors import RequestTimeout
from millstream.kafka import KafkaBroker, Topic
from millstream.kafka.options import KafkaSubscription
from millstream.security import SASLPlaintext
from tests.faults.sources.base import Setup, Source
from tests.servers.kafka import KafkaServer

ADMIN: Any = _admin
#: The keys that senders use spread over these so that two workers both have some.
PARTITIONS = 3
_LOGINS = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required "
    'user_worker="pw" user_sender="pw";'
)


class KafkaGroup(Source):
    """A group whose members share partitions."""

    name = "kafka"
    keyed = True
    capabilities = KafkaSubscription("a", group_id="g").capabilities
    deadline = False
    # Between two commits, and until the reader's thread has a moment for one.
    behind = 0.2
    max_message = 1_048_576
    nobody = RequestTimeout
    forbids = ("fetch", "acknowledge")
    client: ClassVar[Literal["confluent", "aiokafka"]] = "confluent"
    denied = "AUTHORIZATION_FAILED|[Aa]uthorization failed"

    def __init__(self) -> None:
        #: Asks the cluster, by its address; whichever library the broker under test has.
        self._admins: dict[str, Any] = {}

    def server(self, setup: Setup) -> KafkaServer:
        settings = {
            # Confirmed is what is on the disk.
            "log.flush.interval.messages": "1",
            # Whoever sends first is not to make a topic as nobody said it.
            "auto.create.topics.enable": "false",
            "group.consumer.session.timeout.ms": "1500",
            "group.consumer.heartbeat.interval.ms": "300",
        }
        if setup.watched:
            settings["connections.max.idle.ms"] = "2000"
        if not setup.logins:
            return KafkaServer(settings=settings, proxied="PLAINTEXT")
        settings |= {
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.proxied.plain.sasl.jaas.config": _LOGINS,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "allow.everyone.if.no.acl.found": "true",
        }
        return KafkaServer(settings=settings, proxied="SASL_PLAINTEXT")

    def way(self, server: Any) -> tuple[int, int]:
        return server.inside, server.outside

    def url(self, port: int, user: str = "") -> str:
        # Only who comes through the proxy has to say who he is.
        return f"{user}@127.0.0.1:{port}" if user == "worker" else f"127.0.0.1:{port}"

    def broker(self, setup: Setup) -> KafkaBroker:
        user, _, address = setup.url.rpartition("@")
        return KafkaBroker(
            address,
            client=self.client,
            security=SASLPlaintext(user, "pw") if user else None,
            graceful_timeout=setup.grace,
            publish_timeout=setup.publish_timeout,
            reconnect_backoff_max_ms=int(setup.reconnect * 1000),
            request_timeout_ms=int(2000 * setup.ping),
            metadata_max_age_ms=1000,
        )

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {
            "address": Topic(self.address(setup), PARTITIONS),
            "group_id": f"{setup.name}-workers",
            "auto_commit_interval_ms": 50,
            "session_timeout_ms": int(max(setup.ack_wait, 1.5) * 1000),
            "heartbeat_interval_ms": 200,
        }

    def answering(self, setup: Setup) -> dict[str, Any]:
        # Without a group, which would answer callers that are gone since long.
        return {}

    def asking(self, broker: Any) -> int:
        return len(broker.driver.asked)

    async def held(self, broker: Any, setup: Setup) -> int:
        topic, group = self.address(setup), f"{setup.name}-workers"
        places = [TopicPartition(topic, n) for n in range(PARTITIONS)]
        asked = [ConsumerGroupTopicPartitions(group, places)]
        [found] = (await self._ask(broker, "list_consumer_group_offsets", asked)).values()
        done = {p.partition: p.offset for p in found.topic_partitions}
        beyond = sum(_beyond(p.metadata) for p in found.topic_partitions)
        first, last = [
            await self._ask(broker, "list_offsets", dict.fromkeys(places, edge))
            for edge in (ADMIN.OffsetSpec.earliest(), ADMIN.OffsetSpec.latest())
        ]
        behind = [last[p].offset - max(done.get(p.partition, -1), first[p].offset) for p in places]
        return sum(behind) - beyond

    async def dead(self, broker: Any, setup: Setup) -> list[tuple[bytes, dict[str, str]]]:
        found = await asyncio.to_thread(_stored, broker, f"{self.address(setup)}.dlq")
        return [
            (m.value(), {key: value.decode() for key, value in m.headers() or ()}) for m in found
        ]

    async def made(self, broker: Any, setup: Setup) -> list[bytes]:
        found = await asyncio.to_thread(_stored, broker, self.address(setup, "out"))
        return [m.value() for m in found]

    def wipe(self, server: Any) -> None:
        shutil.rmtree(server.data)

    async def delete_source(self, broker: Any, setup: Setup) -> None:
        await self._ask(broker, "delete_topics", [self.address(setup)])

    async def refuse_letters(self, broker: Any, setup: Setup) -> None:
        topic = ADMIN.NewTopic(f"{self.address(setup)}.dlq", 1, 1)
        await self._ask(broker, "create_topics", [topic])
        await self._limit(broker, setup, "1")

    async def take_letters(self, broker: Any, setup: Setup) -> None:
        await self._limit(broker, setup, "1048588")

    async def _limit(self, broker: Any, setup: Setup, bytes: str) -> None:
        change = ADMIN.ConfigEntry(
            "max.message.bytes", bytes, incremental_operation=ADMIN.AlterConfigOpType.SET
        )
        topic = ADMIN.ConfigResource(
            ADMIN.ResourceType.TOPIC, f"{self.address(setup)}.dlq", incremental_configs=[change]
        )
        await self._ask(broker, "incremental_alter_configs", [topic])

    async def _ask(self, broker: Any, method: str, *args: Any) -> dict[Any, Any]:
        where = broker.driver.describe()
        admin = self._admins.get(where)
        if admin is None:
            settings = {
                "bootstrap.servers": where,
                "reconnect.backoff.max.ms": 500,
                # It asks a leader that is none any more for as long as it remembers it.
                "topic.metadata.refresh.interval.ms": 1000,
                "log_level": 0,
            }
            admin = self._admins[where] = ADMIN.AdminClient(settings)
        futures = getattr(admin, method)(*args, request_timeout=3)
        return {key: await asyncio.wrap_future(future) for key, future in futures.items()}

    def forbid(self, server: Any, what: str) -> None:
        admin = ADMIN.AdminClient({"bootstrap.servers": server.url})
        kinds = {"fetch": ADMIN.ResourceType.TOPIC, "acknowledge": ADMIN.ResourceType.GROUP}
        common = (
            "*",
            ADMIN.ResourcePatternType.LITERAL,
            "User:worker",
            "*",
            ADMIN.AclOperation.READ,
            ADMIN.AclPermissionType.DENY,
        )
        if what:
            calls = admin.create_acls([ADMIN.AclBinding(kinds[what], *common)])
        else:
            calls = admin.delete_acls([ADMIN.AclBindingFilter(k, *common) for k in kinds.values()])
        for call in calls.values():
            call.result(5)


class KafkaNext(KafkaGroup):
    """A group whose partitions the server shares out (KIP-848)."""

    name = "kafka-848"
    forbids = ()

    def subscription(self, setup: Setup) -> dict[str, Any]:
        return {
            "address": Topic(self.address(setup), PARTITIONS),
            "group_id": f"{setup.name}-workers",
            "auto_commit_interval_ms": 50,
            "group_protocol": "consumer",
        }


class KafkaAio(KafkaGroup):
    """The classic group with the other client library, where all partitions move at a rebalance.

    It has neither transactions nor KIP-848, so it takes part in no scenario of those.
    """

    name = "kafka-aiokafka"
    client = "aiokafka"


def _beyond(note: str | None) -> int:
    """How many messages behind a committed offset are done all the same, as its note says."""
    ranges = msgspec.json.decode(note).get("d", []) if note else []
    return sum(end - begin for begin, end in ranges)


def _stored(broker: Any, topic: str) -> list[Any]:
    """All messages of a topic of one partition or more."""
    settings = {
        "bootstrap.servers": broker.driver.describe(),
        "group.id": "faults-look",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
        "log_level": 0,
    }
    found: list[Any] = []
    with Consumer(settings) as consumer:
        known = consumer.list_topics(timeout=3).topics.get(topic)
        open = set(known.partitions) if known is not None and known.error is None else set()
        consumer.assign([TopicPartition(topic, n, 0) for n in open])
        while open:
            message = consumer.poll(3)
            if message is None:
                raise TimeoutError(topic)
            error = message.error()
            if error is None:
                found.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                open.discard(message.partition())
            else:
                raise RuntimeError(str(error))
    return found
