"""Mosquitto, a server of MQTT."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.servers.base import Server, missing


def mosquitto_binary() -> str | None:
    """The mosquitto on PATH, or where Debian puts it."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


class MosquittoServer(Server):
    """A mosquitto that keeps nothing on disk, unless it is asked to.

    Args:
        settings: further lines of its configuration, such as ``["max_keepalive 5"]``.
        durable: keep sessions and retained messages over a restart, and over a kill too.
        listener: further lines that belong to the listener, such as those of TLS.
        anonymous: whether a client needs no user.
        tls: whether the listener speaks TLS, by lines that ``listener`` gives.
        folder: where it stores things; a new temporary folder by default.
        port: a fixed port; a free one by default.
    """

    name = "mosquitto"

    def __init__(
        self,
        *,
        settings: Sequence[str] = (),
        durable: bool = False,
        listener: Sequence[str] = (),
        anonymous: bool = True,
        tls: bool = False,
        folder: Path | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(folder=folder, port=port)
        self.settings, self.durable, self.listener = list(settings), durable, list(listener)
        self.anonymous, self.tls = anonymous, tls

    def command(self, port: int) -> list[str]:
        binary = mosquitto_binary()
        if binary is None:
            missing("no mosquitto: Debian's package of that name brings one")
        # A small limit, so that a test can go over it.
        lines = ["user root", "max_packet_size 1000000", "max_queued_messages 100000"]
        lines += ["max_inflight_messages 1000", "sys_interval 0", "log_type all"]
        if self.durable:
            # Written after every change: a kill must not lose what was confirmed.
            lines += ["persistence true", f"persistence_location {self.folder}/"]
            lines += ["autosave_on_changes true", "autosave_interval 1"]
        lines += self.settings
        lines += [f"listener {port} 127.0.0.1", f"allow_anonymous {str(self.anonymous).lower()}"]
        # No batching of small packets: latency counts here.
        lines += ["set_tcp_nodelay true", *self.listener]
        (self.folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        return [str(binary), "-c", str(self.folder / "mosquitto.conf")]

    def answers(self, port: int) -> bool:
        # Whoever else held the port would have kept ours from opening it: it would have ended.
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return f"on port {port}." in self.log and "Error" not in self.log.splitlines()[-1]

    @property
    def url(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://127.0.0.1:{self.port}"
