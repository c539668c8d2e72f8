"""Programs that use what the shortcut cannot serve work as if it were not there, and are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.apps.haproxy import SPLICE, spliced, start
from tests.apps.hasher import exchange, serve_hashes, sha256
from tests.apps.programs import ask
from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.commands import underpass
from tests.kernel.waiting import holds_for

HTTP_PORT, TCP_PORT, HASHER_PORT = 8080, 8081, 8082
OBSERVED = 12.5
"""Seconds of traffic: longer than a program is watched before it may take the shortcut."""
_SIZES = (1, 700, 300_000, 2_000_000)


def test_a_haproxy_that_splices_works(bed: Bed, tmp_path: Path) -> None:
    """Claim: HAProxy that splices passes all bodies right, now and later; the guard names it."""
    underpass(bed.pins, "up", "--cgroup", bed.cgroup).ok()
    bed.worker("server").call(serve_hashes, SERVER4, HASHER_PORT)
    proxies = {}
    for mode, port in (("http", HTTP_PORT), ("tcp", TCP_PORT)):
        proxies[port] = start(
            bed, "client", tmp_path, port, f"{SERVER4}:{HASHER_PORT}", mode=mode, options=SPLICE
        )
    client = bed.worker("server")

    def right(sizes: tuple[int, ...] = _SIZES) -> bool:
        return all(client.call(exchange, CLIENT4, port, 0, sizes) for port in proxies)

    assert right((10_000_000,))
    assert holds_for(right, OBSERVED)
    assert right((10_000_000,))
    for port, statistics in proxies.items():
        assert spliced(statistics) > 10_000_000, f"HAProxy on port {port} does not splice"
    assert "splice" in _reason(bed, "haproxy")


def test_a_program_that_waits_for_all_works(bed: Bed) -> None:
    """Claim: recv with MSG_WAITALL is never short, now and later; the guard names the program."""
    underpass(bed.pins, "up", "--cgroup", bed.cgroup).ok()
    bed.worker("server").call(serve_hashes, SERVER4, HASHER_PORT)
    reader = Path(__file__).with_name("whole_reader.py")
    words = [sys.executable, str(reader), SERVER4, str(HASHER_PORT), str(OBSERVED)]
    bodies = bed.worker("client").call(ask, words).decode().splitlines()
    assert len(bodies) > len(_SIZES)
    for line in bodies:
        stream, size, hashed = line.split()
        assert hashed == sha256(int(stream), int(size)), f"{size} bytes of stream {stream}"
    assert "waitall" in _reason(bed, reader.name)


def _reason(bed: Bed, name: str) -> str:
    """Why the guard keeps the program on TCP whose line in the list has `name`."""
    listed: list[dict[str, Any]] = underpass(bed.pins, "guard", "list", "--json").document()
    named = [line for line in listed if name in json.dumps(line)]
    assert len(named) == 1, listed
    return str(named[0]["reason"])
