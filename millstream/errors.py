"""Every error of Millstream, in one tree.

    MillstreamError
    ├─ SetupError (ValueError)            a wrong declaration, found at start
    │  ├─ SetupErrors                     several of them
    │  ├─ SignatureError                  a handler's parameters
    │  ├─ AddressError                    a subject, topic, queue or channel
    │  ├─ CapabilityError                 the source cannot do what is asked
    │  └─ MissingExtra (ImportError)      a package that has to be installed
    ├─ StateError (RuntimeError)          used in the wrong state of its life
    │  └─ NotConnected (ConnectionError)
    ├─ ConnectError (ConnectionError)
    ├─ PublishError
    │  ├─ PublishTimeout (TimeoutError)
    │  └─ MessageTooLarge (ValueError)
    ├─ Fenced                             another process took this one's place
    ├─ RequestTimeout (TimeoutError)
    ├─ NoResponders
    ├─ NoLetters (LookupError)            nothing keeps an address's dead letters
    ├─ RemoteError                        the other side of a request failed
    ├─ DecodeError (ValueError)           a body that cannot become the declared type
    ├─ EncodeError (ValueError)
    ├─ ContextError (KeyError)
    ├─ HandlerNotFound                    no filter of a subscription accepts the message
    ├─ CrashedWorker                      a message that takes its process down
    ├─ BatchFailed                        raised by batch handlers: which messages failed
    └─ Control flow, raised by handlers
       ├─ HandlerException: AckMessage, NackMessage, RejectMessage, SkipMessage
       ├─ StopConsume
       └─ StopApplication (SystemExit)

Each message says what is wrong, where, and how to fix it; ``code`` is stable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MillstreamError(Exception):
    """The root of all errors of the package."""

    code = "MS000"


class SetupError(MillstreamError, ValueError):
    """A declaration is wrong.

    ``where`` names the handler, its parameter and the place of the decorator; ``fix``
    is a sentence that tells what to write instead.
    """

    code = "MS100"

    def __init__(self, what: str, *, code: str = "", where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.code = code or self.code
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.code} {self.what}"
        if self.where:
            text += f"\n  at {self.where}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        return text


class SetupErrors(SetupError):
    """Several wrong declarations, reported in one go; ``errors`` holds each."""

    def __init__(self, errors: list[SetupError]) -> None:
        self.errors = errors
        super().__init__(f"{len(errors)} declarations are wrong")

    def __str__(self) -> str:
        return "\n".join([f"{self.code} {self.what}", *map(str, self.errors)])


def raise_all(errors: list[SetupError]) -> None:
    """Raise what was found wrong, as one error; nothing if nothing was."""
    flat: list[SetupError] = []
    for error in errors:
        flat.extend(error.errors if isinstance(error, SetupErrors) else [error])
    if len(flat) == 1:
        raise flat[0]
    if flat:
        raise SetupErrors(flat)


class SignatureError(SetupError):
    """A handler's parameter cannot be filled."""

    code = "MS101"


class AddressError(SetupError):
    """A subject, topic, queue or channel is not well formed."""

    code = "MS102"


class CapabilityError(SetupError):
    """The source cannot do what the declaration asks for."""

    code = "MS103"


class MissingExtra(SetupError, ImportError):
    """A package is needed that is not installed."""

    code = "MS104"

    def __init__(self, package: str, extra: str, *, purpose: str = "") -> None:
        what = f"{purpose} needs {package}" if purpose else f"{package} is not installed"
        super().__init__(what, fix=f'pip install "millstream[{extra}]"')


class StateError(MillstreamError, RuntimeError):
    """The object is in the wrong ``state``; ``wanted`` is the one it should be in."""

    code = "MS200"

    def __init__(self, what: str, *, state: str = "", wanted: str = "") -> None:
        self.state, self.wanted = state, wanted
        super().__init__(what)


class NotConnected(StateError, ConnectionError):
    """The broker is not connected, or lost its connection for longer than the time allowed."""

    code = "MS201"


class ConnectError(MillstreamError, ConnectionError):
    """The broker could not be reached, or refused the credentials."""

    code = "MS202"

    def __init__(self, what: str, *, permanent: bool = False) -> None:
        #: True where trying again cannot help (bad credentials, bad address).
        self.permanent = permanent
        super().__init__(what)


class PublishError(MillstreamError):
    """The broker did not take a message."""

    code = "MS300"


class PublishTimeout(PublishError, TimeoutError):
    """No confirmation came in time: the message may or may not have been stored."""

    code = "MS301"


class MessageTooLarge(PublishError, ValueError):
    """The encoded message is larger than the broker accepts."""

    code = "MS302"


class Fenced(MillstreamError):
    """Another process took the place of this one, which must not go on."""

    code = "MS307"


class RequestTimeout(MillstreamError, TimeoutError):
    """No reply came in time."""

    code = "MS303"


class NoResponders(MillstreamError):
    """Nobody listens at the address of the request."""

    code = "MS304"


class NoLetters(MillstreamError, LookupError):
    """Nothing keeps what is sent to an address, so there are no dead letters."""

    code = "MS306"


class RemoteError(MillstreamError):
    """The handler that served a request failed; ``type`` and ``text`` are its exception's."""

    code = "MS305"

    def __init__(self, type: str, text: str) -> None:
        self.type, self.text = type, text
        super().__init__(f"{type}: {text}")


class DecodeError(MillstreamError, ValueError):
    """A message's body, header or path value is not of the declared type.

    ``path`` is the place inside the body (``$.items[2].price``), ``expected`` the type
    asked for and ``got`` what stood there, each empty where it is not known.
    """

    code = "MS400"

    def __init__(self, what: str, *, path: str = "", expected: str = "", got: str = "") -> None:
        self.path, self.expected, self.got = path, expected, got
        super().__init__(what)


class EncodeError(MillstreamError, ValueError):
    """A value cannot be encoded by the codec."""

    code = "MS401"


class ContextError(MillstreamError, KeyError):
    """A name is not in the context."""

    code = "MS402"

    def __str__(self) -> str:
        return str(self.args[0])


class HandlerNotFound(MillstreamError):
    """No filter of a subscription accepted the message."""

    code = "MS403"


class CrashedWorker(MillstreamError):
    """A message was begun as often as allowed, and each time the process died."""

    code = "MS404"


class BatchFailed(MillstreamError):
    """Raised by a batch handler: some of the messages failed, the others are done.

    ``errors`` maps the index of each failed message to its exception; each is then retried or
    dead-lettered by itself.
    """

    code = "MS405"

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        self.errors = dict(errors)
        super().__init__(f"{len(self.errors)} messages of the batch failed")


class IgnoredException(MillstreamError):
    """No failure: what a handler raises to say what becomes of its message or subscription."""


class HandlerException(IgnoredException):
    """Raised by a handler to settle its message; keyword arguments go to the broker's call."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        super().__init__(*options.items())


class AckMessage(HandlerException):
    """Acknowledge the message and stop handling it."""


class NackMessage(HandlerException):
    """Ask for a redelivery; ``delay`` in seconds, the retry's backoff where none is given."""


class RejectMessage(HandlerException):
    """Discard the message for good."""


class SkipMessage(HandlerException):
    """Stop handling the message and leave it unsettled."""


class StopConsume(IgnoredException):
    """Stop the subscription that this handler belongs to; its message is handed back."""


class StopApplication(SystemExit):
    """Stop the whole application; the message is handed back."""


# The names under which users of the closest peer know these.
FastStreamException = MillstreamError
IncorrectState = StateError
FeatureNotSupportedException = CapabilityError
SubscriberNotFound = HandlerNotFound
