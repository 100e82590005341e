"""The peer's public names stand at the same places, so that moving is a change of imports."""

from __future__ import annotations

import importlib

import pytest

PLACES = {
    "": "AckPolicy BaseMiddleware Context ContextRepo Depends ExceptionMiddleware FastStream "
    "Header Logger Path Response StreamMessage TestApp apply_types",
    "annotations": "ContextRepo FastStream Logger",
    "context": "ContextRepo",
    "exceptions": "AckMessage FeatureNotSupportedException NackMessage RejectMessage SetupError "
    "SkipMessage SubscriberNotFound",
    "middlewares": "BaseMiddleware ExceptionMiddleware",
    "response": "Response ensure_response",
    "types": "AsyncFuncAny",
    "nats": "ConsumerConfig JStream KvWatch NatsBroker NatsMessage NatsPublisher NatsResponse "
    "NatsRoute NatsRouter ObjWatch PubAck PullSub Schedule TestApp TestNatsBroker",
    "nats.annotations": "ContextRepo Logger NatsBroker NatsMessage ObjectStorage",
    "nats.fastapi": "Context Logger NatsRouter",
    "nats.message": "NatsMessage",
    "nats.response": "NatsPublishCommand NatsResponse",
    "nats.testing": "TestNatsBroker",
}


@pytest.mark.parametrize("place", PLACES)
def test_names(place: str) -> None:
    module = importlib.import_module(f"millstream.{place}".rstrip("."))
    assert [name for name in PLACES[place].split() if not hasattr(module, name)] == []


def test_a_name_is_one_object_wherever_it_is_imported_from() -> None:
    def at(place: str, name: str) -> object:
        return getattr(importlib.import_module(f"millstream{place}"), name)

    for name, places in {
        "Logger": [".annotations", ".nats.annotations", ".nats.fastapi"],
        "Context": [".nats.fastapi"],
        "ContextRepo": [".annotations", ".context"],
        "NackMessage": [".exceptions"],
        "BaseMiddleware": [".middlewares"],
        "Response": [".response"],
    }.items():
        assert all(at(place, name) is at("", name) for place in places), name
    assert at("", "FastStream") is at("", "Millstream")
