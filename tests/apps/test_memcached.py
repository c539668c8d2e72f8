"""memcached through the shortcut gives right answers."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.apps.programs import Checked, Compare, find, serve
from tests.kernel.bed import SERVER4, Bed
from underpass.torture.content import content
from underpass.torture.plans import MIB

PORT = 11211
_SIZES = (1, 10, 100, 1000, 4096, 16_000, 100_000, MIB)
_CLIENTS = 6
_TURNS = 8


def test_memcached_values_are_right(bed: Bed, compare: Compare, tmp_path: Path) -> None:
    """Claim: values of 1 B to 1 MiB come back from several clients' sets and gets as they were."""
    options = f"-u root -p {PORT} -U 0 -m 128 -I 2m"
    words = [find("memcached", "memcached"), *options.split(" ")]
    serve(bed, "server", PORT, words, tmp_path / "memcached.log")
    compare("memcached", _set_and_get)


def _set_and_get() -> Checked:
    """In a worker: set, get and get many at once, on several connections."""

    def use(client: int) -> int:
        values = {
            f"{client}-{size}".encode(): bytes(content(client, size, size)) for size in _SIZES
        }
        with (
            socket.create_connection((SERVER4, PORT), timeout=20) as sock,
            sock.makefile("rb") as answers,
        ):
            for _ in range(_TURNS):
                for key, value in values.items():
                    sock.sendall(b"set %b 7 0 %d\r\n%b\r\n" % (key, len(value), value))
                    assert answers.readline() == b"STORED\r\n"
                for asked in ([key] for key in values), [list(values)]:
                    for keys in asked:
                        sock.sendall(b"get %b\r\n" % b" ".join(keys))
                        for key in keys:
                            size = len(values[key])
                            assert answers.readline() == b"VALUE %b 7 %d\r\n" % (key, size)
                            assert answers.read(size + 2) == values[key] + b"\r\n"
                        assert answers.readline() == b"END\r\n"
        return 3 * _TURNS * sum(_SIZES)

    checked = Checked()
    with ThreadPoolExecutor(_CLIENTS) as clients, checked.timed():
        checked.size = sum(clients.map(use, range(_CLIENTS)))
    return checked
