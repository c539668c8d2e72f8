"""HAProxy tells nginx behind a service who its client is, ahead of the client's own bytes."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.apps import haproxy, nginx
from tests.apps.programs import STREAMS, Checked, Compare
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.kube_proxy import SERVICE4, TARGET, make_node
from underpass.torture.content import content

PORT, TCP_PORT = 8081, 8082
SIZES = (1, 3000, 64 * 1024, 1_500_000)
_SITE = f"""server {{
  listen {TARGET} proxy_protocol;
  location = /who {{ return 200 "$proxy_protocol_addr:$proxy_protocol_port"; }}
  location /put/ {{ root .; dav_methods PUT; create_full_put_path on; }}
}}"""
_CLIENTS = 6
_LEGS = 2


@pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2"])
def test_who_it_is_and_what_it_says_is_right(
    bed: Bed, compare: Compare, tmp_path: Path, header: str
) -> None:
    """Claim: each client is told by its own name, and its bodies are right, on both legs.

    A pod asks HAProxy in another, which asks nginx in a third by a service's address.
    """
    service = replace(SERVICE4, endpoints=(SERVER4,))
    make_node(bed).serve(service)
    nginx.start(bed, "server", tmp_path, _SITE, TARGET)
    to = f"{service.address}:{service.port} {header}"
    haproxy.start(bed, "client", tmp_path, PORT, to, mode="tcp")
    haproxy.start(bed, "client", tmp_path, TCP_PORT, to, mode="tcp", outside=True)
    compare(
        f"HAProxy with {header}, both legs",
        _talk,
        *(CLIENT4, PORT),
        default=(CLIENT4, TCP_PORT),
        where="other",
        floor=STREAMS,
    )


def _talk(host: str, port: int) -> Checked:
    """In a worker: on several connections, its name as the server heard it, bodies both ways."""
    checked = Checked()
    with ThreadPoolExecutor(_CLIENTS) as clients, checked.timed():
        used = clients.map(lambda number: _one(host, port, number), range(2 * _CLIENTS))
        checked.size = _LEGS * sum(used)
    return checked


def _one(host: str, port: int, number: int) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.connect()
    own = "{}:{}".format(*connection.sock.getsockname())
    where = f"/put/{port}-{number}"
    for turn in range(len(SIZES)):
        size = SIZES[(number + turn) % len(SIZES)]
        assert _ask(connection, "GET", "/who").decode() == own
        body = bytes(content(100 * number + turn, 0, size))
        _ask(connection, "PUT", where, body)
        assert _ask(connection, "GET", where) == body
    connection.close()
    return 2 * sum(SIZES)


def _ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> bytes:
    connection.request(method, path, body)
    response = connection.getresponse()
    answer = response.read()
    assert response.status < http.HTTPStatus.MULTIPLE_CHOICES, (response.status, answer)
    return answer
