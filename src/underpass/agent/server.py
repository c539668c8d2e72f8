"""`/metrics`, `/healthz` and `/readyz` over HTTP: for Prometheus and the kubelet. It reads only."""

from __future__ import annotations

import contextlib
import http.server
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from underpass import config
from underpass.errors import UnderpassError, Usage

#: Clients that are served at once; one more, and the oldest of them goes.
_AT_ONCE = 8
#: Seconds that a client may take for its request.
_PATIENCE = 5.0

Answer = tuple[bool, str]
"""Is it well, and a line that says more."""


class Pages:
    """What the server asks.

    Attributes:
        metrics: the text of a scrape and its content type.
        healthy: does the agent's loop go round?
        ready: is the wanted data plane live?
    """

    def __init__(
        self,
        metrics: Callable[[], tuple[bytes, str]],
        healthy: Callable[[], Answer],
        ready: Callable[[], Answer],
    ) -> None:
        self.metrics, self.healthy, self.ready = metrics, healthy, ready


class Server:
    """Serves in threads of its own until it is closed.

    Raises:
        Usage: it is no address.
        UnderpassError: it cannot listen there; perhaps later.
    """

    def __init__(self, listen: str, pages: Pages) -> None:
        address = parse(listen)
        self._host = listen.rpartition(":")[0]
        try:
            self._server = _Server(address, pages)
        except OSError as error:
            step = "name another address in [agent] listen, or end who has it"
            cause = error.strerror or str(error)
            raise UnderpassError("listen on", listen, cause, step) from None
        threading.Thread(target=self._server.serve_forever, args=(0.5,), daemon=True).start()

    @property
    def where(self) -> str:
        """Where it listens, with the port that port 0 has become."""
        return f"{self._host}:{self._server.server_address[1]}"

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


def parse(listen: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:9464``, ``[::1]:9464`` or ``:9464`` (every address). Pure.

    Raises:
        Usage: it is none.
    """
    found = config.parse_listen(listen)
    if not found:
        raise Usage("listen on", listen, "it is no HOST:PORT", "write it as 127.0.0.1:9464")
    return found


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], pages: Pages) -> None:
        self.pages = pages
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        host, port = address
        both = not host and socket.has_dualstack_ipv6()
        self._both = both
        self.address_family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        super().__init__((host or ("::" if both else "0.0.0.0"), port), _Handler)

    def server_bind(self) -> None:
        if self._both:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # http.server's asks DNS for our name
        self.server_name, self.server_port = "underpass", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= _AT_ONCE:  # who is slow makes room for who comes
                with contextlib.suppress(OSError):
                    self._open.pop(0).shutdown(socket.SHUT_RDWR)
            self._open.append(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._open.remove(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no event."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE
    server_version, sys_version = "underpass", ""

    def do_GET(self) -> None:
        path, pages = self.path.partition("?")[0], self.server.pages
        if path == "/metrics":
            self._send(HTTPStatus.OK, *pages.metrics())
        elif path == "/healthz":
            self._tell(pages.healthy())
        elif path == "/readyz":
            self._tell(pages.ready())
        else:
            self._send(HTTPStatus.NOT_FOUND, b"/metrics, /healthz and /readyz are here\n")

    def _tell(self, answer: Answer) -> None:
        well, words = answer
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, f"{words}\n".encode())

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A request is no event."""
