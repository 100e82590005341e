"""Real broker servers for tests.

``Server`` is what all have in common; a module for each broker adds what it needs on top. A
server is usable as a context manager, or by ``start`` and ``stop``.
"""

from tests.servers.base import Server, ServerFailed, free_port, missing
from tests.servers.nats import NatsServer, nats_binary

__all__ = ["NatsServer", "Server", "ServerFailed", "free_port", "missing", "nats_binary"]
