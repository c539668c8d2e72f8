"""nginx through the shortcut gives right answers, with sendfile, keepalive and as a proxy."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.apps.nginx import start
from tests.apps.programs import Checked, Compare
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from underpass.torture.content import content

PORT, PROXY_PORT, TCP_PROXY = 8080, 8081, 8082
SIZES = (10, 3000, 64 * 1024, 1_500_000)
_CLIENTS = 8
_REQUESTS = 60

FILES = f"server {{ listen {PORT}; location / {{ root files; }} }}"
PROXY = f"""
upstream files {{{{ server {SERVER4}:{PORT}; keepalive 16; }}}}
server {{{{
  listen {{port}};
  location / {{{{
    proxy_pass http://files;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
  }}}}
}}}}
"""


def _write_files(directory: Path) -> None:
    (directory / "files").mkdir()
    for size in SIZES:
        (directory / "files" / str(size)).write_bytes(bytes(content(size, 0, size)))


@pytest.mark.parametrize("sendfile", ["on", "off"])
@pytest.mark.parametrize("keepalive", [True, False], ids=["keepalive", "a connection each"])
def test_nginx_bodies_are_right(
    bed: Bed, compare: Compare, tmp_path: Path, sendfile: str, *, keepalive: bool
) -> None:
    """Claim: files of every size arrive whole and right, by the shortcut."""
    _write_files(tmp_path)
    start(bed, "server", tmp_path, FILES, PORT, sendfile)
    what = f"nginx, sendfile {sendfile}, {'keepalive' if keepalive else 'a connection each'}"
    compare(what, _fetch_all, SERVER4, PORT, keepalive)


def test_nginx_to_nginx_is_right(bed: Bed, compare: Compare, tmp_path: Path) -> None:
    """Claim: through a proxying nginx in another namespace all bodies are right; both legs pair."""
    _write_files(tmp_path)
    start(bed, "server", tmp_path, FILES, PORT)
    start(bed, "client", tmp_path, PROXY.format(port=PROXY_PORT), PROXY_PORT)
    start(bed, "client", tmp_path, PROXY.format(port=TCP_PROXY), TCP_PROXY, outside=True)
    compare(
        "nginx as a proxy, both legs",
        _fetch_all,
        *(CLIENT4, PROXY_PORT, True, 2),
        default=(CLIENT4, TCP_PROXY, True, 2),
        where="server",
    )


def _fetch_all(host: str, port: int, keepalive: bool, legs: int = 1) -> Checked:
    """In a worker: fetch every file over and over on several connections."""

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

    checked = Checked()
    with ThreadPoolExecutor(_CLIENTS) as clients, checked.timed():
        checked.size = legs * sum(clients.map(fetch_some, range(_CLIENTS)))
    return checked
