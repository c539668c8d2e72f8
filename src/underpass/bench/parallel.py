"""Many connections at once: requests a second, and what the slowest of them wait. nginx and wrk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from underpass.bench.compare import Mode, Reading, Volume
from underpass.bench.programs import (
    REQUESTS_FLOOR,
    STREAM_FLOOR,
    WRK,
    Measure,
    Place,
    Site,
    Workload,
    nginx_start,
    number,
    port_of,
)
from underpass.bench.way import Reach
from underpass.errors import UnderpassError

CONNECTIONS = (1, 4, 16, 64, 256)
#: Bytes of a response, if nothing else is asked for; the largest that nginx sends in one call here.
SIZE, MOST = 1024, 64 << 10

#: Up to here a response waits nowhere near the budget, so nearly every message must be carried.
_REQUESTS = 4 << 10
_PORT = 18110
# Header and body in one call, so that a request is two messages: sendfile would make it three.
SITE = """server {{ listen {at} backlog=1024; root HOME; sendfile off;
    output_buffers 1 128k; }}"""
#: Makes wrk tell the latency's percentiles.
SCRIPT = """done = function(summary, latency, requests)
  for _, p in ipairs({ 50, 99, 99.9 }) do
    io.write(string.format("p%g_us %d\\n", p, latency:percentile(p)))
  end
end
"""
_PERCENTILES = ("p50_us", "p99_us", "p99.9_us")
_ERRORS = re.compile(r"Socket errors: connect (\d+), read (\d+), write (\d+)|Non-2xx .*: (\d+)")


def workload(size: int) -> Workload:
    """Requests for ``size`` bytes over 1 to 256 connections that stay open."""

    def serve(place: Place, mode: Mode) -> None:
        port = port_of(_PORT, mode)
        nginx_start(
            place, mode, Site("parallel", SITE.format(at=place.reach.listen(port)), port, size=size)
        )

    def measures(reach: Reach, seconds: int) -> list[Measure]:
        script = reach.home / "percentiles.lua"
        script.write_text(SCRIPT)
        return [_measure(reach, (count, size), seconds, script) for count in CONNECTIONS]

    return Workload("parallel", WRK, serve, measures, settings={"size": size})


def _measure(reach: Reach, asked: tuple[int, int], seconds: int, script: Path) -> Measure:
    count, size = asked

    def ask(mode: Mode) -> list[str]:
        head = ["wrk", "-t", "1", "-c", str(count), "-d", f"{seconds}s", "-s", str(script)]
        return [*head, f"http://{reach.at(port_of(_PORT, mode))}/file"]

    label = f"{count} connection{'s' if count > 1 else ''}"
    floor = REQUESTS_FLOOR if size <= _REQUESTS else STREAM_FLOOR
    return Measure("parallel", label, "requests/s", False, floor, ask, parser(size))


def parser(size: int) -> Callable[[str], Reading]:
    """Reads what wrk says of responses of ``size`` bytes, with ``SCRIPT``."""

    def parse(text: str) -> Reading:
        for found in _ERRORS.finditer(text):
            if any(int(word) for word in found.groups(default="0")):
                raise UnderpassError("believe", "the run of wrk", found[0], "run bench again")
        rate = number(r"^Requests/sec:\s+([\d.]+)", text, "wrk")
        count = number(r"^\s+(\d+) requests in", text, "wrk")
        waits = {p: number(rf"^{re.escape(p)} (\d+)", text, "wrk") for p in _PERCENTILES}
        moved = count * size
        small = size <= _REQUESTS
        volume = Volume("messages", 2 * count) if small else Volume("bytes", moved)
        return Reading(rate, volume, also=waits, payload=moved)

    return parse
