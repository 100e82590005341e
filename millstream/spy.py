"""What handlers and publishers record while a test broker runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .errors import StateError

if TYPE_CHECKING:
    from .codec import Codec
    from .driver import Sink
    from .middleware import Send
    from .publisher import Publisher


class Spy(Protocol):
    """The recorder that a test broker puts on a handler or a publisher."""

    @property
    def mock(self) -> Any: ...

    def assert_called_once_with(self, body: Any, /, **details: Any) -> None: ...
    def assert_called_with(self, body: Any, /, **details: Any) -> None: ...
    def assert_any_call(self, body: Any, /, **details: Any) -> None: ...
    async def wait_call(self, timeout: float = 3.0) -> None: ...


class Probe(Protocol):
    """What a test broker puts around deliveries and publications while it runs."""

    def around(self, deliver: Sink, /) -> Sink:
        """The delivery that replaces ``deliver``."""
        ...

    def failed(self, error: BaseException, /) -> None:
        """The delivery that runs failed with an error that nothing inside handled."""

    def sending(self, publisher: Publisher, codec: Codec, send: Send, /) -> Send:
        """The send that replaces a declared publisher's."""
        ...


class Spied:
    """The test side of a handler or publisher; outside a test broker there is none."""

    spy: Spy | None = None

    def _recorder(self) -> Spy:
        if self.spy is None:
            raise StateError(
                "calls are recorded only while a test broker runs, "
                "such as `async with TestNatsBroker(broker):`",
                wanted="testing",
            )
        return self.spy

    @property
    def mock(self) -> Any:
        """A ``MagicMock`` called with each decoded body. Only under a test broker."""
        return self._recorder().mock

    def assert_called_once_with(self, body: Any, /, **details: Any) -> None:
        """Assert one call, with this body (and ``headers=``, ``path=`` …)."""
        self._recorder().assert_called_once_with(body, **details)

    def assert_called_with(self, body: Any, /, **details: Any) -> None:
        """Assert that the last call had this body."""
        self._recorder().assert_called_with(body, **details)

    def assert_any_call(self, body: Any, /, **details: Any) -> None:
        """Assert that some call had this body."""
        self._recorder().assert_any_call(body, **details)

    async def wait_call(self, timeout: float = 3.0) -> None:
        """Wait until there was a call, at most ``timeout`` seconds.

        Raises:
            TimeoutError: there was none.
        """
        await self._recorder().wait_call(timeout)
