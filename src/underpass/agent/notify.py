"""The protocol of sd_notify(3): datagrams to the socket that systemd names, if it does."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

#: They are systemd's words to this very process, none to its children.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Tells systemd how the service is.

    Attributes:
        watchdog_seconds: within this time systemd wants to hear from us; 0 = it does not ask.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # in the abstract name space
            self._address = "\0" + self._address[1:]
        for_us = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        usec = environment.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(usec) / 1e6 if for_us and usec.isdecimal() else 0.0

    def ready(self, status: str) -> None:
        """The data plane is live."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """The configuration is being read again; :meth:`ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float) -> None:
        """We leave, and need up to so many seconds."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """The loop goes round."""
        if self.watchdog_seconds:
            self._send("WATCHDOG=1")

    def status(self, words: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={words}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError:
            pass  # it has gone or is full: nothing that we could do about
