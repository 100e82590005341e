"""What a body looks like on the wire where there is no place for headers.

Channels and lists carry bytes and nothing else. A message without metadata travels as it is;
one with headers travels in an envelope, which is FastStream's (version 1), so that both sides
understand each other. In a stream each header is a field of the entry.
"""

from __future__ import annotations

import functools
import inspect
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ..errors import EncodeError, MessageTooLarge, SetupError

#: How an envelope begins; no text and no JSON does.
MAGIC = b"\x89BIN\x0d\x0a\x1a\x0a"
#: Its first byte, where a look has to be cheap.
MARK = MAGIC[:1]
_VERSION = 1
_HEAD = struct.Struct(">HII")
_SHORT = struct.Struct(">H")


class MessageFormat:
    """How a body and its headers become one value, and back; a subclass is passed as a class."""

    @classmethod
    def encode(cls, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The value to send."""
        raise NotImplementedError

    @classmethod
    def parse(cls, data: bytes) -> tuple[bytes, dict[str, str]]:
        """The body and the headers of a value that was received."""
        raise NotImplementedError


def _check_format(format: Any) -> None:
    if not (isinstance(format, type) and issubclass(format, MessageFormat)):
        raise SetupError(
            f"message_format={format!r}", fix="give a class that derives from MessageFormat"
        )
    try:
        inspect.signature(format.encode).bind(b"", {})
    except TypeError as error:
        raise SetupError(
            f"{format.__name__}.encode: {error}",
            fix="write def encode(cls, body, headers) -> bytes",
        ) from error


#: Raises a :class:`SetupError` for what is no message format; looks at each class once.
check_format: Callable[[Any], None] = functools.cache(_check_format)


class BinaryMessageFormatV1(MessageFormat):
    """Every message travels in an envelope, also one without headers."""

    @classmethod
    def encode(cls, body: bytes, headers: Mapping[str, str]) -> bytes:
        texts = [_text(part) for item in headers.items() for part in item]
        start = len(MAGIC) + _HEAD.size
        data = start + _SHORT.size + sum(map(len, texts))
        head = _HEAD.pack(_VERSION, start, data)
        return b"".join((MAGIC, head, _SHORT.pack(len(headers)), *texts, body))

    @classmethod
    def parse(cls, data: bytes) -> tuple[bytes, dict[str, str]]:
        if data.startswith(MAGIC):
            try:
                return _open(data)
            except (struct.error, UnicodeDecodeError, ValueError):
                return data, {}
        return data, {}


class PlainMessageFormat(BinaryMessageFormatV1):
    """A body travels as it is, and in an envelope only if there are headers to go with it."""

    @classmethod
    def encode(cls, body: bytes, headers: Mapping[str, str]) -> bytes:
        # The content type alone is worth no envelope: a reader finds out by looking.
        if not headers or headers.keys() == {"content-type"}:
            return body
        return super().encode(body, headers)


class JSONMessageFormat(MessageFormat):
    """``{"data": ..., "headers": {...}}``: for text only, as older versions of FastStream."""

    @classmethod
    def encode(cls, body: bytes, headers: Mapping[str, str]) -> bytes:
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise EncodeError(
                f"the body is no text ({error}): JSONMessageFormat carries nothing else"
            ) from error
        return msgspec.json.encode({"data": text, "headers": dict(headers)})

    @classmethod
    def parse(cls, data: bytes) -> tuple[bytes, dict[str, str]]:
        try:
            found = msgspec.json.decode(data)
            headers = found.get("headers") or {}
            return found["data"].encode(), {str(k): str(v) for k, v in headers.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
            return BinaryMessageFormatV1.parse(data)


def _text(text: str) -> bytes:
    try:
        data = text.encode()
    except AttributeError:
        raise EncodeError(f"a header of {text!r}, which is no text") from None
    if len(data) > 0xFFFF:
        raise MessageTooLarge(
            f"a header of {len(data):,} bytes, {text[:40]!r} …: an envelope takes 65,535 at most",
        )
    return _SHORT.pack(len(data)) + data


def _open(data: bytes) -> tuple[bytes, dict[str, str]]:
    version, at, end = _HEAD.unpack_from(data, len(MAGIC))
    if version != _VERSION or not len(MAGIC) < at <= end <= len(data):
        raise ValueError("another version")
    (count,) = _SHORT.unpack_from(data, at)
    at += _SHORT.size
    texts: list[str] = []
    for _ in range(2 * count):
        (size,) = _SHORT.unpack_from(data, at)
        at += _SHORT.size
        texts.append(data[at : at + size].decode())
        at += size
    return data[end:], dict(zip(texts[::2], texts[1::2], strict=True))
