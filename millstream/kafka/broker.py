"""The Kafka broker and its router."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, Unpack, overload

from ..broker import Broker, BrokerOptions, split_options
from ..driver import PublicationSpec, SubscriptionSpec
from ..endpoints import (
    Endpoints,
    Method,
    P,
    Route,
    RoutePublisher,
    Router,
    asks,
    make,
    sends,
)
from ..errors import CapabilityError, MissingExtra, SetupError, StateError
from ..publisher import Publisher
from ..security import BaseSecurity
from ..subscriber import Subscriber
from .client import Broken, Client
from .driver import KafkaDriver
from .flow import Flow
from .letters import check_letters
from .offsets import Place
from .options import (
    KafkaPublication,
    KafkaPublish,
    KafkaRequest,
    KafkaSubscription,
    Topic,
    TopicPartition,
)
from .settings import addresses, aiokafka, aiokafka_producing, confluent, further, producing
from .transactions import Transactional, check
from .units import opened

if TYPE_CHECKING:
    from .aio import AioClient


class KafkaConnect(BrokerOptions, total=False):
    """Options of a Kafka broker: those of every broker, and Kafka's own.

    Keys:
        client: the library: ``confluent`` (confluent-kafka, the default), or ``aiokafka``, with
            which there are neither cooperative rebalancing nor groups of KIP-848 nor transactions.
        security: how the cluster is reached, and who we are.
        sasl_oauth_token_provider: for SASLOAuthBearer: a function that returns a token, or a
            token and its expiry in seconds since the epoch.
        sasl_kerberos_service_name, sasl_kerberos_domain_name: for SASLGSSAPI; the second one
            only with aiokafka.
        ssl_cafile, ssl_certfile, ssl_keyfile, ssl_key_password: certificates in files; the
            second and third are who we are.
        client_id: our name in the brokers' logs and quotas.
        reply_topic: where answers to requests come; ``millstream.replies``.
        allow_auto_create_topics: make topics that are missing; True.
        transactional_id: makes each subscription with a group exactly-once; see
            :class:`KafkaBroker`. The same after a restart, and of this process alone.
        transaction_timeout_ms: how long a transaction may be open before the cluster aborts it
            (10,000): so long others wait for what a process left open that died within one and
            does not come back.
        enable_idempotence: a message that the library sends again is stored once; True.
        acks: ``all``, or 1 or 0, with which there is no idempotence.
        compression_type: ``gzip``, ``snappy``, ``lz4``, ``zstd`` or ``none``.
        max_batch_size, linger_ms, partitioner, max_request_size: of the producer, as Kafka's
            clients take them.
        request_timeout_ms, retry_backoff_ms, connections_max_idle_ms: the same, of everything.
        metadata_max_age_ms: between two looks for new topics and partitions.
        reconnect_backoff_max_ms: the longest wait between two attempts to connect; 2000.
        client_rack: reads from replicas in this rack, where a subscriber does not say otherwise.
        config: further settings of the client library, by its own names.
        consumer_only, loop: accepted for callers of other frameworks.
    """

    client: Literal["confluent", "aiokafka"]
    security: BaseSecurity | None
    sasl_oauth_token_provider: Any
    sasl_kerberos_service_name: str | None
    sasl_kerberos_domain_name: str | None
    ssl_cafile: str | None
    ssl_certfile: str | None
    ssl_keyfile: str | None
    ssl_key_password: str | None
    client_id: str | None
    reply_topic: str
    allow_auto_create_topics: bool
    transactional_id: str | None
    transaction_timeout_ms: int
    enable_idempotence: bool
    acks: Any
    compression_type: str | None
    max_batch_size: int
    linger_ms: int
    partitioner: Any
    max_request_size: int
    request_timeout_ms: int
    retry_backoff_ms: int
    connections_max_idle_ms: int
    metadata_max_age_ms: int
    reconnect_backoff_max_ms: int
    client_rack: str | None
    config: Mapping[str, Any] | None
    consumer_only: bool
    loop: Any


class KafkaSubscriber(Subscriber):
    """A declared subscription on Kafka."""

    async def seek(
        self, where: int | datetime | Literal["beginning", "end"], *partitions: TopicPartition
    ) -> None:
        """Read from another place on, and have the group know it.

        Messages that run or wait for a handler at the moment are handled, but are settled no
        more. Other members of the group are not moved: each has partitions of its own.

        Args:
            where: an offset, the time of the first message, or an end of the log.
            partitions: these only; otherwise all that this process has at the moment.

        Raises:
            StateError: it is not started, or has none of these partitions.
            CapabilityError: it runs in memory.
        """
        if not isinstance(where, int | datetime) and where not in ("beginning", "end"):
            raise SetupError(f"seek({where!r})", fix="an offset, a datetime, 'beginning' or 'end'")
        if isinstance(where, int) and where < 0:
            raise SetupError(f"seek({where})", fix="an offset is 0 or more")
        reader = self._reader
        running = [reader] if reader is not None and reader.open else self._started()
        only = [Place(p.topic, p.partition) for p in partitions]
        for subscription in running:
            flow = subscription.link.intake
            if not isinstance(flow, Flow):
                raise CapabilityError("nothing is sought in memory", fix="use a server")
            if not all(place in flow.parts for place in only):
                raise StateError(f"these are not all ours: {', '.join(map(str, partitions))}")
            try:
                await flow.seek(where, only)
            except Broken as error:
                raise StateError(f"{self.spec.destination}: not sought: {error}") from error


class TopicPublisher(Publisher):
    """A declared publication on Kafka."""

    async def flush(self) -> None:
        """Wait until what was published with ``no_confirm=True`` is confirmed, or has failed."""
        driver: Any = self.publication().broker.driver
        if isinstance(driver, KafkaDriver):  # in memory all is stored at once
            await driver.flush()


def _to_topic(options: Callable[P, KafkaPublication]) -> Method[P, TopicPublisher]:
    return Method(options, functools.partial(make, options), "_produce")


class _OfTopics(Protocol[P]):
    """``subscriber(topic, ...)``, or with several topics first."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> KafkaSubscriber: ...
    @overload
    def __call__(
        self, first: str | Topic, second: str | Topic, /, *more: str | Topic, **options: Any
    ) -> KafkaSubscriber: ...


def _of_topics(*topics: str | Topic, **options: Any) -> Any:
    given: tuple[Any, ...] = (topics,) if len(topics) > 1 else topics
    return make(KafkaSubscription, *given, **options)


class _DeclaresTopics(Method[P, KafkaSubscriber]):
    """The same as ``declares``, where each positional argument is a topic."""

    def __init__(self, options: Callable[P, KafkaSubscription]) -> None:
        super().__init__(options, _of_topics, "_subscribe")

    if TYPE_CHECKING:

        @overload
        def __get__(self, obj: None, owner: type) -> Self: ...
        @overload
        def __get__(self, obj: Any, owner: type) -> _OfTopics[P]: ...
        def __get__(self, obj: Any, owner: type) -> Any: ...


class KafkaEndpoints(Endpoints):
    """What a Kafka broker and its routers can declare."""

    subscriber = _DeclaresTopics(KafkaSubscription)
    publisher = _to_topic(KafkaPublication)

    def _produce(self, spec: PublicationSpec, /) -> TopicPublisher:
        publisher = TopicPublisher(spec, self)
        self.publishers.append(publisher)
        return publisher

    def _subscribe(self, spec: SubscriptionSpec, /) -> KafkaSubscriber:
        subscriber = KafkaSubscriber(spec, self)
        self.subscribers.append(subscriber)
        return subscriber


class KafkaRouter(KafkaEndpoints, Router):
    """Declarations to be included in a :class:`KafkaBroker` or another router."""


class KafkaRoute(Route):
    """A subscription with its handler, for ``KafkaRouter(handlers=[...])``."""


class KafkaPublisher(RoutePublisher):
    """The arguments of ``router.publisher``, to be declared with a :class:`KafkaRoute`."""


class KafkaBroker(KafkaEndpoints, Broker):
    """A connection to Kafka, with subscribers and publishers.

    With ``transactional_id`` every subscription with a group is exactly-once: what its handlers
    publish through this broker, their dead letters and copies for retries included, becomes
    visible together with the offsets of the messages they handled, or not at all. It goes out
    when the handler has ended, many messages in one transaction (``transaction_size``,
    ``transaction_interval_ms``), so a handler's ``publish`` returns no offset; what a failed
    attempt published is dropped. Side effects outside of Kafka are at-least-once as ever, and a
    request is sent at once. Outside of a handler ``publish`` sends at once as well; see
    :meth:`transaction`. Who reads the results reads with ``isolation_level="read_committed"``,
    the default here.

    Args:
        bootstrap_servers: some of its nodes, each ``host:port``.
        options: see :class:`KafkaConnect` and :class:`millstream.broker.BrokerOptions`.
    """

    publish = sends(KafkaPublish)
    request = asks(KafkaRequest)

    if TYPE_CHECKING:
        driver: KafkaDriver

    def __init__(
        self,
        bootstrap_servers: str | Sequence[str] = "localhost:9092",
        **options: Unpack[KafkaConnect],
    ) -> None:
        given, common = split_options(options, KafkaConnect, type(self).__name__)
        given["servers"] = addresses(bootstrap_servers)
        self._client = given.pop("client", "confluent")
        if self._client not in ("confluent", "aiokafka"):
            raise SetupError(f"client={self._client!r}", fix="'confluent' or 'aiokafka'")
        timeout = given.pop("publish_timeout")
        age = given.get("metadata_max_age_ms")
        name, limit = given.get("transactional_id"), given.get("transaction_timeout_ms", 10_000)
        if name is not None and (not name or limit < 1000):
            raise SetupError(
                f"transactional_id={name!r}, transaction_timeout_ms={limit}",
                fix="a name that no other process has, and 1000 or more",
            )
        if name is not None and not given.get("enable_idempotence", True):
            raise SetupError("transactional_id with enable_idempotence=False", fix="leave out one")
        if name is not None and self._client == "aiokafka":
            raise SetupError(
                "transactional_id with client='aiokafka', which cannot fence a member whose "
                "partitions moved",
                fix="take client='confluent'",
            )
        driver = KafkaDriver(
            _aiokafka(given, timeout) if self._client == "aiokafka" else _confluent(given, timeout),
            ", ".join(given["servers"]),
            publish_timeout=timeout,
            refresh=age / 1000 if age else None,
            create=given.get("allow_auto_create_topics", True),
            reply_topic=given.get("reply_topic", "millstream.replies"),
            transactional=Transactional(name, limit) if name is not None else None,
            largest=given.get("max_request_size") or 1_048_576,
            patience=(given.get("request_timeout_ms") or 10_000) / 1000,
        )
        super().__init__(driver, **common)
        self._transactional = name is not None

    def compile(self) -> None:
        super().compile()
        for subscription in self.subscriptions:
            check_letters(subscription)
            if self._transactional:
                check(subscription)
        if self._client == "aiokafka":
            from .aio_reader import check as check_aio

            for subscription in self.subscriptions:
                check_aio(subscription.spec)

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """``async with broker.transaction():`` what the block publishes becomes visible at its
        end, all at once; or never, where the block ends with an error.

        For code outside of handlers, which are in a transaction anyway. Nothing is sent before
        the end, so ``publish`` returns no offset.

        Raises:
            SetupError: the broker has no ``transactional_id``.
            StateError: within a handler, or within another transaction.
            Fenced: at the end: another process has the same ``transactional_id``.
            MessageTooLarge: at the end: the cluster does not take one of the messages.
            PublishError: at the end: nothing was stored.
        """
        if not self._transactional:
            raise SetupError(
                "a transaction without a name",
                fix="KafkaBroker(transactional_id=...), a name that no other process has",
            )
        return opened(self.driver)


def _confluent(options: Mapping[str, Any], timeout: float) -> Callable[[Any], Client]:
    settings, sending = confluent(options), producing(options, timeout)
    limit, config = options.get("transaction_timeout_ms", 10_000), further(options.get("config"))
    return lambda down: Client(settings, sending, down, limit, config)


def _aiokafka(options: Mapping[str, Any], timeout: float) -> Callable[[Any], AioClient]:
    try:
        from .aio import AioClient
    except ImportError as error:
        raise MissingExtra("aiokafka", "aiokafka", purpose="client='aiokafka'") from error
    settings, sending = aiokafka(options), aiokafka_producing(options)
    return lambda down: AioClient(settings, sending, timeout)


__all__ = [
    "KafkaBroker",
    "KafkaConnect",
    "KafkaEndpoints",
    "KafkaPublisher",
    "KafkaRoute",
    "KafkaRouter",
    "KafkaSubscriber",
    "TopicPublisher",
]
