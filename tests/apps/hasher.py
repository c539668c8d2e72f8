"""An HTTP server in Python that hashes what it gets and sends what it is asked for."""

from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import threading
from collections.abc import Iterator

from underpass.torture.content import content
from underpass.torture.plans import MIB

SIZES = (0, 1, 700, 20_000, 300_000, 10_000_000)
"""Bodies that `exchange` sends and gets, in bytes."""
_DEADLINE = 30.0


def parts(stream: int, size: int) -> Iterator[memoryview]:
    """`size` bytes of a stream, a MiB at a time."""
    for offset in range(0, size, MIB):
        yield content(stream, offset, min(MIB, size - offset))


@functools.cache
def sha256(stream: int, size: int) -> str:
    """The sha256 of the first `size` bytes of a stream."""
    whole = hashlib.sha256()
    for part in parts(stream, size):
        whole.update(part)
    return whole.hexdigest()


class _Hasher(http.server.BaseHTTPRequestHandler):
    """Answers a PUT with the sha256 of its body, a GET of /STREAM/SIZE with that content."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        whole, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left and (part := self.rfile.read(min(left, MIB))):
            whole.update(part)
            left -= len(part)
        answer = whole.hexdigest().encode()
        self._answer(len(answer))
        self.wfile.write(answer)

    def do_GET(self) -> None:
        _, stream, size = self.path.split("/")
        self._answer(int(size))
        for part in parts(int(stream), int(size)):
            self.wfile.write(part)

    def _answer(self, size: int) -> None:
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


def serve_hashes(host: str, port: int) -> None:
    """In a worker: serve until it ends."""
    server = _Server((host, port), _Hasher)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Client:
    """One HTTP connection."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_DEADLINE)

    def upload(self, stream: int, size: int) -> str:
        """Upload the beginning of a stream; the sha256 that the far end found."""
        headers = {"Content-Length": str(size)}
        self._connection.request("PUT", f"/{stream}", map(bytes, parts(stream, size)), headers)
        return self._read().decode()

    def download(self, stream: int, size: int) -> None:
        """Download the beginning of a stream; AssertionError when it is not right."""
        self._connection.request("GET", f"/{stream}/{size}")
        body = self._read()
        assert hashlib.sha256(body).hexdigest() == sha256(stream, size), f"{len(body)} of {size}"

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _read(self) -> bytes:
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == http.HTTPStatus.OK, body
        return body


def exchange(host: str, port: int, first: int = 0, sizes: tuple[int, ...] = SIZES) -> int:
    """In a worker: on one connection upload and download each size once, beginning with `first`.

    Returns the number of bytes that were right; raises AssertionError when one is not.
    """
    client = Client(host, port)
    for turn in range(len(sizes)):
        size, stream = sizes[(first + turn) % len(sizes)], turn % 2
        assert client.upload(stream, size) == sha256(stream, size)
        client.download(stream, size)
    client.close()
    return 2 * sum(sizes)
