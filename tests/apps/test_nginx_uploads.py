"""Large uploads through two nginx, which read as FIONREAD and edge-triggered epoll tell them."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import threading
from pathlib import Path

import pytest

from tests.apps.nginx import start
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from underpass.model import Settings
from underpass.torture.content import content
from underpass.torture.plans import MIB

NEAR_PORT, FAR_PORT, HASHER_PORT = 8080, 8081, 8082
SIZE = 100 * MIB
BUDGET = 2 * MIB
"""Less than the client is ahead of nginx at some moment of every upload."""
_UPLOADS = 3
_DEADLINE = 30.0

PROXY = """
server {{
  listen {port};
  location / {{
    proxy_pass http://{to};
    proxy_http_version 1.1;
    proxy_request_buffering {buffering};
    client_body_in_file_only clean;
  }}
}}
"""


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_uploads_arrive_whole(
    bed: Bed, plane: MakePlane, tmp_path: Path, *, buffering: str
) -> None:
    """Claim: uploads over budget pass through two nginx, whole and right, and none hangs."""
    underpass = plane(Settings(budget_bytes=BUDGET))
    legs = (
        ("server", FAR_PORT, f"{SERVER4}:{HASHER_PORT}"),
        ("client", NEAR_PORT, f"{SERVER4}:{FAR_PORT}"),
    )
    for where, port, to in legs:
        proxy = PROXY.format(port=port, to=to, buffering=buffering)
        start(bed, where, tmp_path, proxy, port)
    bed.worker("server").call(_serve_hashes)
    uploader = bed.worker("server")
    before = underpass.counters().shortcut_bytes_total
    for stream in range(_UPLOADS):
        hashed = uploader.submit(_upload, stream).result(_DEADLINE)
        assert hashed == _hash(stream)
    counters = underpass.counters()
    assert counters.tcp_messages_total["budget-bytes"] > 0
    assert counters.shortcut_bytes_total > before


def _parts(stream: int) -> list[memoryview]:
    return [content(stream, offset, MIB) for offset in range(0, SIZE, MIB)]


def _hash(stream: int) -> str:
    whole = hashlib.sha256()
    for part in _parts(stream):
        whole.update(part)
    return whole.hexdigest()


def _upload(stream: int) -> str:
    """In a worker: upload a stream; the sha256 that the far end found."""
    connection = http.client.HTTPConnection(CLIENT4, NEAR_PORT, timeout=_DEADLINE)
    headers = {"Content-Length": str(SIZE)}
    connection.request("PUT", f"/{stream}", iter(map(bytes, _parts(stream))), headers)
    response = connection.getresponse()
    answer = response.read().decode()
    connection.close()
    assert response.status == http.HTTPStatus.OK, answer
    return answer


class _Hasher(http.server.BaseHTTPRequestHandler):
    """Answers a PUT with the sha256 of its body."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        whole, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left and (part := self.rfile.read(min(left, MIB))):
            whole.update(part)
            left -= len(part)
        answer = whole.hexdigest().encode()
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _serve_hashes() -> None:
    """In a worker: serve until it ends."""
    server = http.server.ThreadingHTTPServer((SERVER4, HASHER_PORT), _Hasher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
