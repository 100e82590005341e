"""Bodies to values and back.

A decoder is made once for a handler's annotation and is the cheapest callable that does
the work: the identity for ``bytes``, a C decoder of msgspec for Structs, dataclasses,
TypedDicts and builtins, pydantic's validator on the bytes where a pydantic type occurs.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
from msgspec.inspect import CustomType, type_info

from .errors import DecodeError, EncodeError, SetupError

Decode = Callable[[Any], Any]


class Codec(Protocol):
    """How bodies are written.

    ``content_type`` is sent as a header with every body that is not plain JSON, text or
    bytes, and tells the codec's own bodies apart where an annotation leaves the choice.
    """

    content_type: str

    def decoder(self, type_: Any, /) -> Decode:
        """A function from bytes to a value of ``type_``; any exception of it is a decode error."""
        ...

    def encode(self, value: Any, /) -> tuple[bytes, str | None]:
        """The bytes of a value and the content type to announce, if any.

        Raises:
            EncodeError: there is no such representation.
        """
        ...


def _plain(value: Any) -> tuple[bytes, str | None] | None:
    """The encoding of values that look the same in every codec."""
    kind = type(value)
    if kind is bytes:
        return value, None
    if kind is str:
        return value.encode(), "text/plain"
    if value is None:
        return b"", None
    if kind is bytearray or kind is memoryview:
        return bytes(value), None
    return None


def _text(data: bytes) -> str:
    return data.decode()


def _identity(data: Any) -> Any:
    return data


def uses_pydantic(type_: Any) -> bool:
    """Whether a type has to be validated by pydantic: a model, or metadata of its ``Field``."""
    if "pydantic" not in sys.modules:
        return False
    if isinstance(type_, type) and hasattr(type_, "__pydantic_core_schema__"):
        return True
    if typing.get_origin(type_) is typing.Annotated:
        base, *extras = typing.get_args(type_)
        return uses_pydantic(base) or any(
            type(extra).__module__.partition(".")[0] in ("pydantic", "annotated_types")
            for extra in extras
        )
    return any(uses_pydantic(arg) for arg in typing.get_args(type_))


_adapters: dict[Any, Any] = {}


def _adapter(type_: Any) -> Any:
    """pydantic's validator of a type; classes keep theirs."""
    from pydantic import TypeAdapter

    if not isinstance(type_, type):
        return TypeAdapter(type_)
    if type_ not in _adapters:
        _adapters[type_] = TypeAdapter(type_)
    return _adapters[type_]


def _custom(type_: Any, value: Any) -> Any:
    """msgspec's hook for types it does not know inside types it does."""
    if uses_pydantic(type_):
        return _adapter(type_).validate_python(value)
    if isinstance(type_, type) and isinstance(value, type_):
        return value
    raise TypeError(f"cannot make {type_!r} from {type(value).__name__}")


def converter(type_: Any) -> Decode:
    """A function that turns builtins (or a string) into ``type_``; the identity for Any."""
    if type_ is Any or type_ is object:
        return _identity
    if uses_pydantic(type_):
        return cast("Decode", _adapter(type_).validate_python)
    _supported(type_)

    def convert(value: Any) -> Any:
        if type(value) is type_:
            return value
        return msgspec.convert(value, type_, strict=False, dec_hook=_custom)

    return convert


def _supported(type_: Any) -> None:
    """Raise a SetupError for a type that no decoder can be made for."""
    try:
        msgspec.json.Decoder(type_)
    except (TypeError, RecursionError) as error:
        raise SetupError(f"no decoder can be made for {show_type(type_)}: {error}") from error


class _Format:
    """A format of msgspec's, with pydantic's models by pydantic; ``bytes`` and ``str`` as they are.

    A subclass says what the format is called (by people, by media types, and in the header that
    announces it), and how it writes and reads what is pydantic's.
    """

    name: str
    content_type: str
    announced: str | None
    module: Any

    def __init__(self) -> None:
        self._encode = self.module.Encoder(enc_hook=self._reduce).encode

    def decoder(self, type_: Any, /) -> Decode:
        if type_ is bytes:
            return _identity
        if type_ is str:
            return _text
        if uses_pydantic(type_):
            return self._validator(_adapter(type_))
        _supported(type_)
        if type(type_) is type and isinstance(type_info(type_), CustomType):
            raise SetupError(
                f"no body can be read as {show_type(type_)}",
                fix="a Struct, dataclass, TypedDict, pydantic model or builtin is; for others, "
                "give codec= or decoder=",
            )
        return cast("Decode", self.module.Decoder(type_, dec_hook=_custom).decode)

    def encode(self, value: Any, /) -> tuple[bytes, str | None]:
        plain = _plain(value)
        if plain is not None:
            return plain
        try:
            return self._encode(value), self.announced
        except (TypeError, ValueError) as error:
            raise EncodeError(
                f"{type(value).__name__} cannot be written as {self.name}: {error}"
            ) from error

    def _reduce(self, value: Any) -> Any:
        """msgspec's hook to encode types it does not know."""
        if hasattr(type(value), "__pydantic_serializer__"):
            return self._dumped(_adapter(type(value)), value)
        raise TypeError(f"{type(value).__name__} has no {self.name} representation")

    def _dumped(self, adapter: Any, value: Any) -> Any:
        raise NotImplementedError

    def _validator(self, adapter: Any) -> Decode:
        raise NotImplementedError


class JSON(_Format):
    """JSON by msgspec, pydantic's models by pydantic; ``bytes`` and ``str`` as they are."""

    name, content_type, announced, module = "JSON", "application/json", None, msgspec.json

    def _dumped(self, adapter: Any, value: Any) -> Any:
        return msgspec.Raw(adapter.dump_json(value, by_alias=True))

    def _validator(self, adapter: Any) -> Decode:
        return cast("Decode", adapter.validator.validate_json)


class MsgPack(_Format):
    """MessagePack by msgspec; ``bytes`` and ``str`` as they are."""

    name, module = "MessagePack", msgspec.msgpack
    content_type = announced = "application/msgpack"

    def _dumped(self, adapter: Any, value: Any) -> Any:
        return adapter.dump_python(value, mode="json", by_alias=True)

    def _validator(self, adapter: Any) -> Decode:
        unpack, validate = msgspec.msgpack.Decoder().decode, adapter.validate_python
        return lambda data: validate(unpack(data))


class Raw:
    """No codec: bodies are bytes (or text) on both sides."""

    content_type = "application/octet-stream"

    def decoder(self, type_: Any, /) -> Decode:
        if type_ is str:
            return _text
        if type_ in (bytes, Any, object):
            return _identity
        raise SetupError(
            f"the Raw codec cannot make {show_type(type_)}", fix="annotate the body as bytes or str"
        )

    def encode(self, value: Any, /) -> tuple[bytes, str | None]:
        plain = _plain(value)
        if plain is None:
            raise EncodeError(f"the Raw codec takes bytes, str or None, not {type(value).__name__}")
        return plain


def any_decoder(codec: Codec) -> Callable[[bytes, str | None], Any]:
    """Decodes where the type is left open: by content type, else by trying.

    Without a content type, what is not the codec's format is text, and what is not text is
    bytes.
    """
    own = functools.cache(lambda: codec.decoder(Any))

    def decode(data: bytes, content_type: str | None) -> Any:
        if content_type is not None:
            if content_type.startswith("text/"):
                return data.decode()
            if content_type.startswith("application/octet-stream"):
                return data
            if content_type.startswith(codec.content_type):
                return own()(data)
            if content_type.startswith("application/json"):
                return msgspec.json.decode(data)
            return data
        if not data:
            return None
        try:
            return own()(data)
        except Exception:  # any failure means "not this format"
            try:
                return data.decode()
            except UnicodeDecodeError:
                return data

    return decode


def as_decode_error(error: Exception, what: str) -> DecodeError:
    """A decoder's exception with its path, expected and got; ``what`` names the value."""
    if isinstance(error, DecodeError):
        return error
    errors: Any = getattr(error, "errors", None)
    if callable(errors):  # pydantic's ValidationError
        found: Any = errors(include_url=False, include_context=False)
        first = found[0]
        path = "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        text = f"{what}: {first['msg']} at {path}"
        if len(found) > 1:
            text += f" (and {len(found) - 1} more)"
        return DecodeError(
            text, path=path, expected=str(first["type"]), got=repr(first["input"])[:200]
        )
    text = str(error)
    head, _, tail = text.partition(" - at ")
    path = tail.strip("`") if tail else "$"
    expected, got = "", ""
    if head.startswith("Expected "):
        expected, _, got = head.removeprefix("Expected ").partition(", got ")
    return DecodeError(
        f"{what}: {text}", path=path, expected=expected.strip("`"), got=got.strip("`")
    )


def show_type(type_: Any) -> str:
    """A type as people write it."""
    plain = isinstance(type_, type) and not typing.get_args(type_)
    return str(type_.__qualname__) if plain else str(type_).replace("typing.", "")
