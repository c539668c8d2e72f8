"""The API server by a way that a test can cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.pods.testbed import HOST, Kubernetes


class Relay:
    """Passes connections on to the API server, until it is told that the server is away."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._socket = socket.create_server((HOST, 0))
        self.port = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.away = False
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                with self._lock:
                    if self.away:
                        self.refused += 1
                        near.close()
                        continue
                    far = socket.create_connection(self._to)
                    self._open += [near, far]
                threading.Thread(target=_carry, args=(near, far), daemon=True).start()

    def go_away(self) -> None:
        """Cut what is open, and refuse what comes."""
        with self._lock:
            self.away = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        self.go_away()
        self._socket.close()


def _carry(near: socket.socket, far: socket.socket) -> None:
    with near, far:
        back = threading.Thread(target=_pass, args=(far, near), daemon=True)
        back.start()
        _pass(near, far)
        back.join()


def _pass(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    for each in (one, other):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(kubernetes: Kubernetes) -> Iterator[Relay]:
    """The API server by another port, which can be cut."""
    found = Relay((kubernetes.access.host, kubernetes.access.port))
    kubernetes.access = replace(kubernetes.access, port=found.port)
    yield found
    found.close()
