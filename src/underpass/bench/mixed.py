"""Requests and a bulk stream at the same time, each in the other's way. nginx, wrk and iperf3."""

from __future__ import annotations

from dataclasses import replace

from underpass.bench.compare import Mode, Reading
from underpass.bench.parallel import SCRIPT, SITE, SIZE, parser
from underpass.bench.programs import (
    IPERF_PORT,
    STREAM_FLOOR,
    WRK,
    Measure,
    Place,
    Site,
    Workload,
    iperf_parse,
    iperf_serve,
    nginx_start,
    port_of,
)
from underpass.bench.way import Reach

_PORT = 18130
_CONNECTIONS = 8
#: $1: where iperf3 writes; $2: its words; the rest: wrk's.
_BOTH = 'out=$1 stream=$2; shift 2; $stream >"$out" & "$@"; wait; echo ===; cat "$out"'


def _serve(place: Place, mode: Mode) -> None:
    port = port_of(_PORT, mode)
    nginx_start(
        place, mode, Site("mixed", SITE.format(at=place.reach.listen(port)), port, size=SIZE)
    )
    iperf_serve(place, mode)


def _measures(reach: Reach, seconds: int) -> list[Measure]:
    script = reach.home / "percentiles.lua"
    script.write_text(SCRIPT)

    def ask(mode: Mode) -> list[str]:
        stream = f"iperf3 -c {reach.server} -p {port_of(IPERF_PORT, mode)} -t {seconds} -J"
        requests = ["wrk", "-t", "1", "-c", str(_CONNECTIONS), "-d", f"{seconds}s"]
        where = f"http://{reach.at(port_of(_PORT, mode))}/file"
        out = str(reach.home / f"stream-{mode.value}")
        return ["sh", "-c", _BOTH, "both", out, stream, *requests, "-s", str(script), where]

    rows = (("requests beside a stream", "requests/s"), ("stream beside requests", "Mb/s"))
    reads = (requests_of, stream_of)
    return [
        Measure("mixed", label, unit, False, STREAM_FLOOR, ask, read)
        for (label, unit), read in zip(rows, reads, strict=True)
    ]


def requests_of(text: str) -> Reading:
    """The requests' rate and percentiles; what has to be carried is the stream.

    Raises:
        UnderpassError: one of the two programs printed something else.
    """
    requests, _, stream = text.partition("===")
    return replace(parser(SIZE)(requests), volume=iperf_parse(stream).volume, payload=0.0)


def stream_of(text: str) -> Reading:
    """The stream's throughput; raises as :func:`requests_of`."""
    return iperf_parse(text.partition("===")[2])


WORKLOAD = Workload("mixed", {**WRK, "iperf3": "iperf3"}, _serve, _measures)
