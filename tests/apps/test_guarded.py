"""Programs that use what the shortcut cannot serve work as if it were not there, and are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apps import nginx
from tests.apps.haproxy import SPLICE, spliced, start
from tests.apps.hasher import exchange, serve_hashes, sha256
from tests.apps.programs import ask, find
from tests.kernel.bed import CLIENT4, SERVER4, UNGUARDED, Bed
from tests.kernel.commands import underpass
from tests.kernel.fixtures import COUNTS, MakePlane
from tests.kernel.waiting import holds_for, wait_until
from underpass.model import Fault
from underpass.torture.content import content

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


def test_an_nginx_that_asks_how_much_waits_works(bed: Bed, tmp_path: Path) -> None:
    """Claim: its first large uploads are whole and answered, after only small requests before.

    It asks FIONREAD once a read has filled its buffer, which on many kernels does not count what
    was redirected: told of nothing, it would wait until the client gives up.
    """
    underpass(bed.pins, "up", "--cgroup", bed.cgroup).ok()
    (tmp_path / "files").mkdir()
    (tmp_path / "small").write_bytes(b"x" * 300)
    large = bytes(content(1, 0, 300_000))
    (tmp_path / "large").write_bytes(large)
    nginx.start(bed, "server", tmp_path, nginx.DAV, HTTP_PORT)
    client, site = bed.worker("client"), f"http://{SERVER4}:{HTTP_PORT}"
    curl = [find("curl", "curl"), "--no-progress-meter", "--fail", "--max-time", "15"]
    curl += ["--noproxy", "*"]

    def answered() -> bool:
        words = [word for n in range(5) for word in ("-T", str(tmp_path / "small"), f"{site}/{n}")]
        client.call(ask, [*curl, *words])
        return True

    wanted = {"curl": "admitted", "nginx": "admitted" if COUNTS else "kept-out"}

    def watched() -> bool:
        listed = underpass(bed.pins, "guard", "list", "--json").document()
        verdicts = {line["name"]: line["verdict"] for line in listed}
        return answered() and wanted.items() <= verdicts.items()

    wait_until(watched, "the programs were watched")
    for name in ("first", "second", "third"):
        client.call(ask, [*curl, "-T", str(tmp_path / "large"), f"{site}/{name}"])
        assert (tmp_path / "files" / name).read_bytes() == large
    status = underpass(bed.pins, "status", "--json").document()
    assert (status["counters"]["pairs_total"] > 0) == COUNTS


@pytest.mark.usefixtures("miscounting")
@pytest.mark.parametrize("fault", [Fault(0), Fault.MISCOUNTED], ids=["guarded", "twin"])
def test_nginx_is_kept_out_by_its_name(
    bed: Bed, plane: MakePlane, tmp_path: Path, fault: Fault
) -> None:
    """Claim: where FIONREAD does not count, it is on TCP before it has asked. Twin: it pairs."""
    dataplane = plane(UNGUARDED, fault)
    (tmp_path / "files").mkdir()
    nginx.start(bed, "server", tmp_path, nginx.DAV, HTTP_PORT)
    curl = [find("curl", "curl"), "--no-progress-meter", "--noproxy", "*"]
    bed.worker("client").call(ask, [*curl, f"http://{SERVER4}:{HTTP_PORT}/"])
    assert (dataplane.counters().pairs_total > 0) == bool(fault)
    if not fault:
        assert _reason(bed, "nginx") == "fionread"


def _reason(bed: Bed, name: str) -> str:
    """Why the guard keeps the program on TCP whose line in the list has `name`."""
    listed: list[dict[str, Any]] = underpass(bed.pins, "guard", "list", "--json").document()
    named = [line for line in listed if name in json.dumps(line)]
    assert len(named) == 1, listed
    return str(named[0]["reason"])
