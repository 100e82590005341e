"""The body: which parameters share it, and the function that decodes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from .codec import Codec, any_decoder, as_decode_error, converter, show_type, uses_pydantic
from .errors import SetupError, SignatureError
from .params import MISSING, Param
from .signature import read_params

if TYPE_CHECKING:
    from .plan import Site


def element(annotation: Any) -> Any:
    """The type of one item of a batch."""
    args = getattr(annotation, "__args__", None)
    return args[0] if args else Any


def fields_type(body: Mapping[str, Param]) -> Any:
    """One object type whose fields are the parameters that share a body."""
    if any(uses_pydantic(p.declared) for p in body.values()):
        from pydantic import create_model

        fields: dict[str, Any] = {
            p.name: (p.declared, ... if p.default is MISSING else p.default) for p in body.values()
        }
        return create_model("Body", **fields)
    return msgspec.defstruct(
        "Body",
        [
            (p.name, p.declared)
            if p.default is MISSING
            else (p.name, p.declared, _field_default(p.default))
            for p in sorted(body.values(), key=lambda p: p.default is not MISSING)
        ],
    )


def _field_default(value: Any) -> Any:
    return msgspec.field(default_factory=lambda: value)


def reader(site: Site, type_: Any, default: Any) -> Callable[[Any], Any]:
    """The function from a message to the decoded body, or from a batch to a list of them."""
    if site.spec is None or site.spec.batch is None:
        return single_reader(site, type_, default)
    kind = type_ if isinstance(type_, type) and type_ is not Any else object
    if kind is not object and not issubclass(kind, Sequence):
        raise SignatureError(
            f"the body of a batch is a list, not {show_type(type_)}",
            where=f"{site.name} ({site.where})",
            fix=f"annotate it with list[{show_type(type_)}]",
        )
    read_one = single_reader(site, element(type_), MISSING)
    parts = reading_parts(site, element(type_), MISSING)
    if parts is None:
        return lambda message: [read_one(m) for m in message.messages]
    decode = parts[0]

    def read(message: Any) -> Any:
        try:
            return [decode(body) for body in message.bodies()]
        except Exception:  # which of them it is, and whether it may be empty
            return [read_one(m) for m in message.messages]

    return read


def any_reader(codec: Codec, what: str = "the body") -> Callable[[Any], Any]:
    """The function from one message to its body, by its content type; ``what`` names it."""
    decode = any_decoder(codec)

    def read(message: Any) -> Any:
        try:
            return decode(message.body, message.content_type)
        except Exception as error:
            raise as_decode_error(error, what) from error

    return read


def single_reader(site: Site, type_: Any, default: Any) -> Callable[[Any], Any]:
    """The function from one message to its decoded body."""
    parts = reading_parts(site, type_, default)
    if parts is None:
        return any_reader(site.codec, _what(site))
    decode, recover = parts

    def read(message: Any) -> Any:
        try:
            return decode(message.body)
        except Exception as error:
            return recover(message, error)

    return read


def reading_parts(
    site: Site, type_: Any, default: Any
) -> tuple[Callable[[bytes], Any], Callable[[Any, Exception], Any]] | None:
    """The decoder of a type, and what gives a value (or raises) where it fails.

    None where the content type has a say.

    Raises:
        SignatureError: no decoder can be made for the type.
    """
    if type_ is Any or type_ is object:
        return None
    try:
        decode = site.codec.decoder(type_)
    except SetupError as error:
        raise SignatureError(
            error.what,
            where=f"{site.name} ({site.where})",
            fix=error.fix or "annotate the body with a type that can be decoded",
        ) from error
    optional = default is not MISSING or _allows_none(type_)
    fallback = None if default is MISSING else default
    what = _what(site)

    def recover(message: Any, error: Exception) -> Any:
        if not message.body and optional:
            return fallback
        raise as_decode_error(error, what) from error

    return decode, recover


def _what(site: Site) -> str:
    return f"the body of a message for {site.name}"


def _allows_none(type_: Any) -> bool:
    return type_ is None or type(None) in getattr(type_, "__args__", ())


def empty_default(body: Mapping[str, Param]) -> Any:
    """What stands for an empty body where every field has a default."""
    if any(p.default is MISSING for p in body.values()):
        return MISSING
    return fields_type(body)()


def custom_reader(site: Site, type_: Any) -> Callable[[Any], Any]:
    """The user's own decoder, then a conversion to the annotation."""
    decoder = site.decoder
    assert decoder is not None
    two = len([p for p in read_params(decoder)[0] if p.default is MISSING]) >= 2
    convert = converter(type_)
    plain = reader(site, Any, MISSING)
    what = _what(site)

    async def original(message: Any) -> Any:
        return plain(message)

    async def read(message: Any) -> Any:
        try:
            value = decoder(message, original) if two else decoder(message)
            if hasattr(value, "__await__"):
                value = await value
            return convert(value)
        except Exception as error:
            raise as_decode_error(error, what) from error

    return read
