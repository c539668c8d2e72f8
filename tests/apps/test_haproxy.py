"""HAProxy between programs gives right answers, in HTTP and in TCP mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.apps.haproxy import start
from tests.apps.hasher import exchange, serve_hashes
from tests.apps.programs import STREAMS, Checked, Compare
from tests.kernel.bed import CLIENT4, SERVER4, Bed

PORT, TCP_PORT, HASHER_PORT = 8080, 8081, 8082
_CLIENTS = 6
_LEGS = 2


@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_bodies_through_haproxy_are_right(
    bed: Bed, compare: Compare, tmp_path: Path, mode: str
) -> None:
    """Claim: uploads and downloads of every size pass HAProxy whole and right on both legs."""
    bed.worker("server").call(serve_hashes, SERVER4, HASHER_PORT)
    to = f"{SERVER4}:{HASHER_PORT}"
    start(bed, "client", tmp_path, PORT, to, mode=mode)
    start(bed, "client", tmp_path, TCP_PORT, to, mode=mode, outside=True)
    compare(
        f"HAProxy, mode {mode}, both legs",
        _exchange,
        *(CLIENT4, PORT),
        default=(CLIENT4, TCP_PORT),
        where="server",
        floor=STREAMS,
    )


def _exchange(host: str, port: int) -> Checked:
    """In a worker: uploads and downloads of every size through a proxy, on several connections."""
    checked = Checked()
    with ThreadPoolExecutor(_CLIENTS) as clients, checked.timed():
        used = clients.map(lambda first: exchange(host, port, first), range(_CLIENTS))
        checked.size = _LEGS * sum(used)
    return checked
