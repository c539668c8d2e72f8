"""Large uploads through two nginx, which read as FIONREAD and edge-triggered epoll tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apps.hasher import Client, serve_hashes, sha256
from tests.apps.nginx import start
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from underpass.model import Settings
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
    bed.worker("server").call(serve_hashes, SERVER4, HASHER_PORT)
    uploader = bed.worker("server")
    before = underpass.counters().shortcut_bytes_total
    for stream in range(_UPLOADS):
        hashed = uploader.submit(_upload, stream).result(_DEADLINE)
        assert hashed == sha256(stream, SIZE)
    counters = underpass.counters()
    assert counters.tcp_messages_total["budget-bytes"] > 0
    assert counters.shortcut_bytes_total > before


def _upload(stream: int) -> str:
    """In a worker: upload a stream; the sha256 that the far end found."""
    client = Client(CLIENT4, NEAR_PORT)
    hashed = client.upload(stream, SIZE)
    client.close()
    return hashed
