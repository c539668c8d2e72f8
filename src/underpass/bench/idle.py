"""What a connection that stands idle costs the kernel's memory, by either way."""

from __future__ import annotations

import json
import sys

from underpass.bench.compare import Mode, Reading, Volume
from underpass.bench.programs import REQUESTS_FLOOR, Measure, Place, Workload, port_of
from underpass.bench.way import Reach
from underpass.errors import UnderpassError

#: Connections held, if nothing else is asked for; the most that one client address has ports for.
PAIRS, MOST = 10_000, 20_000

_PORT = 18120
_HOLDER = [sys.executable, "-P", "-m", "underpass.bench.holder"]


def workload(pairs: int) -> Workload:
    """``pairs`` connections that have said a byte each way and then stand."""

    def serve(place: Place, mode: Mode) -> None:
        port = port_of(_PORT, mode)
        place.serve(mode, [*_HOLDER, "serve", place.reach.any, str(port), str(pairs)], port)

    def measures(reach: Reach, _: int) -> list[Measure]:
        def ask(mode: Mode) -> list[str]:
            return [*_HOLDER, "hold", reach.server, str(port_of(_PORT, mode)), str(pairs)]

        label = f"{pairs:,} idle pair{'s' if pairs > 1 else ''}"
        return [Measure("idle", label, "bytes/pair", True, REQUESTS_FLOOR, ask, _parse, short=True)]

    return Workload("idle", {}, serve, measures, settings={"pairs": pairs})


def _parse(text: str) -> Reading:
    try:
        told = json.loads(text)
        pairs, slab, tcp = (int(told[name]) for name in ("pairs", "slab_bytes", "tcp_bytes"))
    except (ValueError, KeyError, TypeError):
        cause = f"it printed: {' '.join(text.split())[:120]}"
        raise UnderpassError("read", "the output of holder", cause, "see why") from None
    also = {"slab_bytes_per_pair": slab / pairs, "tcp_bytes_per_pair": tcp / pairs}
    return Reading((slab + tcp) / pairs, Volume("messages", 2 * pairs), also=also)
