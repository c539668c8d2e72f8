"""iperf3 streams by the shortcut in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.apps.programs import STREAMS, Checked, Compare, ask, find, serve
from tests.kernel.bed import SERVER4, Bed

PORT = 5201
_SIZE = 1_000_000_000


@pytest.mark.parametrize("flags", [[], ["-R"]], ids=["to the server", "to the client"])
def test_iperf3_sees_no_error(bed: Bed, compare: Compare, tmp_path: Path, flags: list[str]) -> None:
    """Claim: iperf3's parallel streams run to their end without an error that it would report."""
    iperf3 = find("iperf3", "iperf3")
    serve(bed, "server", PORT, [iperf3, "-s", "-p", str(PORT)], tmp_path / "iperf3.log")
    words = [iperf3, "-c", SERVER4, "-p", str(PORT), "-n", str(_SIZE), "-P", "2", "-J", *flags]
    way = "to the client" if flags else "to the server"
    compare(f"iperf3, {way}", _stream, words, floor=STREAMS)


def _stream(words: list[str]) -> Checked:
    """In a worker: run iperf3 and check its report."""
    report = json.loads(ask(words))
    assert "error" not in report, report
    sent, received = report["end"]["sum_sent"], report["end"]["sum_received"]
    # its server stops when the client has sent all: on plain TCP, too, the last bytes stay unread
    assert sent["bytes"] >= received["bytes"] > 0.9 * _SIZE
    return Checked(received["bytes"], seconds=received["seconds"])
