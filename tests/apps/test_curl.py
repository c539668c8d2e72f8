"""curl's uploads to nginx and downloads from it are right."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from tests.apps import nginx
from tests.apps.hasher import parts
from tests.apps.programs import STREAMS, Checked, Compare, ask, find
from tests.kernel.bed import SERVER4, Bed
from underpass.torture.plans import MIB

PORT = 8080
SIZE = 100 * MIB
_SMALL = 3000
_MANY = 100
_NAMES = [f"small-{number}" for number in range(_MANY)]


@pytest.mark.parametrize("keepalive", [True, False], ids=["keepalive", "a connection each"])
@pytest.mark.parametrize(
    ("most", "floor"), [(32 * MIB, STREAMS), (6 * MIB, 0.01)], ids=["32 MiB", "6 MiB"]
)
def test_curl_uploads_and_downloads_are_right(
    bed: Bed, compare: Compare, tmp_path: Path, most: int, floor: float, *, keepalive: bool
) -> None:
    """Claim: 100 MiB that curl uploads and downloads, and 100 small files, are the same files.

    With a receive buffer of 6 MiB, as by default, the sender is soon ahead by more than that, and
    most goes by TCP.
    """
    for where in ("client", "server"):
        bed.within(where, "sysctl", "-qw", f"net.ipv4.tcp_rmem=4096 131072 {most}")
    curl = find("curl", "curl")
    files = tmp_path / "files"
    files.mkdir()
    for name, stream, size in (("large", 1, SIZE), ("small", 2, _SMALL)):
        with (tmp_path / name).open("wb") as file:
            file.writelines(parts(stream, size))
    nginx.start(bed, "server", tmp_path, nginx.DAV, PORT)
    words = [curl, "--no-progress-meter", "--fail", "--max-time", "40", "--noproxy", "*"]
    if not keepalive:
        words += ["--header", "Connection: close"]
    what = f"curl, {'keepalive' if keepalive else 'a connection each'}, buffer {most // MIB} MiB"
    compare(what, _transfer, words, tmp_path, floor=floor)


def _transfer(words: list[str], directory: Path) -> Checked:
    """In a worker: upload both files, download them; compare what arrived with what was sent."""
    checked = Checked(2 * SIZE + 2 * _MANY * _SMALL)
    site = f"http://{SERVER4}:{PORT}"
    stored, back = directory / "files", directory / "back"
    small = [word for name in _NAMES for word in ("-T", str(directory / "small"), f"{site}/{name}")]
    save = ["--create-dirs", "--output-dir", str(back), "--remote-name-all"]
    with checked.timed():
        ask([*words, "--upload-file", str(directory / "large"), f"{site}/large"])
        ask([*words, *small])
        ask([*words, *save, *(f"{site}/{name}" for name in ("large", *_NAMES))])
    for place in stored, back:
        for name in ("large", *_NAMES):
            source = directory / name.partition("-")[0]
            assert filecmp.cmp(place / name, source, shallow=False), place / name
            (place / name).unlink()
    return checked
