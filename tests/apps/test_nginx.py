"""nginx through the shortcut gives right answers, with sendfile, keepalive and as a proxy."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.apps.nginx import start
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from underpass.torture.content import content

PORT, PROXY_PORT = 8080, 8081
SIZES = (10, 3000, 64 * 1024, 1_500_000)
_CLIENTS = 8
_REQUESTS = 60

FILES = f"server {{ listen {PORT}; location / {{ root files; }} }}"
PROXY = f"""
upstream files {{ server {SERVER4}:{PORT}; keepalive 16; }}
server {{
  listen {PROXY_PORT};
  location / {{
    proxy_pass http://files;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
  }}
}}
"""


def _write_files(directory: Path) -> None:
    (directory / "files").mkdir()
    for size in SIZES:
        (directory / "files" / str(size)).write_bytes(bytes(content(size, 0, size)))


@pytest.mark.parametrize("sendfile", ["on", "off"])
@pytest.mark.parametrize("keepalive", [True, False], ids=["keepalive", "a connection each"])
def test_nginx_bodies_are_right(
    bed: Bed, plane: MakePlane, tmp_path: Path, sendfile: str, *, keepalive: bool
) -> None:
    """Claim: files of every size arrive whole and right, by the shortcut."""
    underpass = plane()
    _write_files(tmp_path)
    start(bed, "server", tmp_path, FILES, PORT, sendfile)
    before = underpass.counters().shortcut_bytes_total
    checked = bed.worker("client").call(_fetch_all, SERVER4, PORT, keepalive=keepalive)
    assert underpass.counters().shortcut_bytes_total - before > checked // 2


def test_nginx_to_nginx_is_right(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: through a proxying nginx in another namespace all bodies are right; both legs pair."""
    underpass = plane()
    _write_files(tmp_path)
    start(bed, "server", tmp_path, FILES, PORT)
    start(bed, "client", tmp_path, PROXY, PROXY_PORT)
    before = underpass.counters().shortcut_bytes_total
    checked = bed.worker("server").call(_fetch_all, CLIENT4, PROXY_PORT, keepalive=True)
    assert underpass.counters().shortcut_bytes_total - before > checked


def _fetch_all(host: str, port: int, *, keepalive: bool) -> int:
    """In a worker: fetch every file over and over on several connections; bytes checked."""

    def fetch_some(client: int) -> int:
        checked = 0
        connection = http.client.HTTPConnection(host, port, timeout=20)
        for number in range(_REQUESTS):
            size = SIZES[(client + number) % len(SIZES)]
            headers = {} if keepalive else {"Connection": "close"}
            connection.request("GET", f"/{size}", headers=headers)
            response = connection.getresponse()
            body = response.read()
            assert response.status == http.HTTPStatus.OK
            assert body == content(size, 0, size), f"{len(body)} bytes, not the {size} right ones"
            checked += size
        connection.close()
        return checked

    with ThreadPoolExecutor(_CLIENTS) as clients:
        return sum(clients.map(fetch_some, range(_CLIENTS)))
