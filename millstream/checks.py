"""What users said that cannot be: told with what to write instead, and where it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import SetupError
from .retry import Retry
from .signature import user_frame

_RESPONSE = (
    *("include", "exclude", "by_alias"),
    *("exclude_unset", "exclude_defaults", "exclude_none"),
)
#: Options of other frameworks that are none here, and what does their work.
INSTEAD = {
    **dict.fromkeys(
        ("key_serializer", "value_serializer", "serializer"),
        "codec= writes bodies; a key is text or bytes",
    ),
    **dict.fromkeys(
        ("key_deserializer", "value_deserializer"),
        "codec= or decoder= reads bodies; message.key is the key's bytes",
    ),
    **dict.fromkeys(
        ("auto_commit", "enable_auto_commit"),
        "leave it out; ack_policy=AckPolicy.ACK_FIRST settles before the handler",
    ),
    "ack_first": "ack_policy=AckPolicy.ACK_FIRST",
    "no_ack": "leave it out; ack_policy=AckPolicy.MANUAL has a handler settle by itself, and "
    "message.ack() settles what get_one gave",
    **dict.fromkeys(
        ("rpc", "rpc_timeout", "raise_timeout"),
        "request(..., timeout=...) waits for the answer",
    ),
    **dict.fromkeys(("payload", "value"), "the message is the first argument"),
    **dict.fromkeys(
        ("callback", "on_delivery"), "leave it out; await publish(...) ends when it is confirmed"
    ),
    **dict.fromkeys(
        ("schema_url", "specification", "specification_tags"),
        "leave it out; there are no AsyncAPI documents in this version",
    ),
    **dict.fromkeys(
        ("response_model", *(f"response_model_{part}" for part in _RESPONSE)),
        "leave it out; the handler returns what is to be sent",
    ),
    "persistent": "leave it out",
    "apply_types": "leave it out; what is not annotated is not converted",
    "id_generator": "leave it out; publish(correlation_id=...) sets one",
    "log_level": "leave it out; set the level of the logger 'millstream'",
    "provider": "broker.dependency_overrides",
    **dict.fromkeys(
        ("protocol", "protocol_version", "specification_url", "underlying_driver_annotations"),
        "leave it out",
    ),
}


def check_types(spec: Any, name: str) -> None:
    """Raise a :class:`SetupError` for a field that is not of its plain type."""
    for field, wanted in _plain_fields(type(spec)):
        check_type(name, field, getattr(spec, field), wanted)


def check_type(owner: str, name: str, value: Any, wanted: tuple[type, ...]) -> None:
    """Raise a :class:`SetupError` for a value that is of none of some plain types."""
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        expected = " or ".join("None" if k is type(None) else k.__name__ for k in wanted)
        raise SetupError(
            f"{owner}: {name}={value!r} is {type(value).__name__}, not {expected}",
            code="MS121",
            where=caller(),
        )


_checked: dict[type, list[tuple[str, tuple[type, ...]]]] = {}
_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "bytes": (bytes,),
    "None": (type(None),),
    "Retry": (Retry,),
}


def plain(annotation: Any) -> tuple[type, ...]:
    """The types that an annotation allows, if its text says it all; none otherwise."""
    names = str(getattr(annotation, "__forward_arg__", annotation)).split(" | ")
    if not all(name in _PLAIN for name in names):
        return ()
    return tuple(dict.fromkeys(kind for name in names for kind in _PLAIN[name]))


def _plain_fields(spec: type) -> list[tuple[str, tuple[type, ...]]]:
    """The fields whose annotations are plain enough for ``isinstance``."""
    if spec not in _checked:
        annotations: dict[str, Any] = {}
        for kind in reversed(spec.__mro__):
            annotations.update(vars(kind).get("__annotations__", {}))
        fields = (
            (f, plain(annotations.get(f, ""))) for f in getattr(spec, "__struct_fields__", ())
        )
        _checked[spec] = [(field, wanted) for field, wanted in fields if wanted]
    return _checked[spec]


def caller() -> str:
    """The user's line that is being run, as ``file:line``."""
    frame = user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def known_options(options: Mapping[str, Any], kind: type, owner: str) -> None:
    """Raise a SetupError for an option that the TypedDict ``kind`` does not have."""
    names = kind.__annotations__
    for name in options:
        if name not in names:
            raise unknown_option(name, names, owner)


def not_taken(options: Mapping[str, Any], kind: Any, owner: str, error: TypeError) -> SetupError:
    """Why the options class ``kind`` did not take its arguments.

    Args:
        options: those that were given by name.
        kind: the class.
        owner: whose options they are, for people.
        error: what it raised.
    """
    names = kind.__struct_fields__
    for name in options:
        if name not in names:
            return unknown_option(name, names, owner)
    return SetupError(f"{owner}: {error}", code="MS120", where=caller())


def unknown_option(name: str, names: Iterable[str], owner: str) -> SetupError:
    """That ``owner`` has no option of this name, but those in ``names``."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, 1)
    fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}"
    return SetupError(
        f"{owner} has no option {name!r}",
        code="MS120",
        where=caller(),
        fix=INSTEAD.get(name, fix),
    )
