"""The workload of a service mesh: requests through two real Envoys, and what each leg brings.

A row's shortcut runs have two, or all, of the four programs in the covered cgroup (``mesh.Cover``),
so that one leg, or all three, can pair; its default runs have none. nginx and wrk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from underpass.bench.compare import Mode, Reading
from underpass.bench.envoy import Kind
from underpass.bench.mesh import EVERY, Cover, Leg, Mesh, Part, version
from underpass.bench.parallel import SCRIPT, parser
from underpass.bench.programs import REQUESTS_FLOOR, WRK, Measure, Place, Workload, number
from underpass.bench.way import Reach

_KINDS = {Kind.TCP: "raw TCP proxy", Kind.MTLS: "HTTP filters + mTLS"}
_SMALL, _LARGE = len("under the stack\n"), 64 << 10
#: With one leg of three by TCP less would be carried.
_LARGE_FLOOR = 0.9
_CONNECTIONS = 32
#: Seconds; longer than an Envoy waits for a processor.
_REST = 0.25
_NEEDS = {**WRK, "iptables-restore": "iptables", "openssl": "openssl", "setpriv": "util-linux"}

#: Runs a client ($2 and on) against the mesh at $1, in its pod and its cgroup; then tells the clock
#: ticks that the two Envoys spent in user mode, which is the 14th word of their stat.
_RUN = """#!/bin/sh
ticks() {{ cat {stats} | sed 's/.*) //' | awk '{{ sum += $12 }} END {{ print sum }}'; }}
before=$(ticks)
where=$1
shift
echo $$ >{cgroup}/cgroup.procs || exit
nsenter --net=/run/netns/{netns} "$@" "http://{address}:$where" || exit
echo "sidecar_ticks $(($(ticks) - before))"
"""


@dataclass(frozen=True)
class _Covered:
    """Which legs of a mesh can pair."""

    name: str
    parts: frozenset[Part]
    legs: int


_COVERED = (
    _Covered("all legs", EVERY, len(Leg)),
    *(_Covered(f"only {leg.value}", leg.ends, 1) for leg in Leg),
)


def _name(mode: Mode, number: int) -> str:
    """Of one mesh: default runs need one, the others one for each choice of legs."""
    return f"{mode.value}{0 if mode is Mode.DEFAULT else number}"


def _script(home: Path, name: str) -> Path:
    return home / f"mesh-{name}" / "client.sh"


def _serve(place: Place, mode: Mode) -> None:
    cpus = (place.placement.client_cpus, place.placement.server_cpus)
    for number_, covered in enumerate(_COVERED[: 1 if mode is Mode.DEFAULT else None]):
        cover = Cover(place.group(mode), place.group(Mode.DEFAULT), covered.parts)
        mesh = Mesh(place.bed, _name(mode, number_), cover, cpus)
        mesh.start()
        mesh.serve_site(_LARGE)
        script = _script(place.bed.directory, mesh.name)
        script.write_text(
            _RUN.format(
                stats=" ".join(f"/proc/{pid}/stat" for pid in mesh.envoys),
                cgroup=mesh.group(Part.CLIENT).path,
                netns=mesh.client.netns,
                address=mesh.server.address,
            )
        )
        script.chmod(0o755)


def _measures(reach: Reach, seconds: int) -> list[Measure]:
    percentiles = reach.home / "percentiles.lua"
    percentiles.write_text(SCRIPT)

    def ask(kind: Kind, path: str, number_: int) -> Callable[[Mode], list[str]]:
        wrk = ["wrk", "-t", "1", "-c", str(_CONNECTIONS), "-d", f"{seconds}s"]
        wrk += ["-s", str(percentiles)]
        where = f"{kind.value}/{path}"
        return lambda mode: [str(_script(reach.home, _name(mode, number_))), where, *wrk]

    return [
        Measure(
            test=f"{words}, {label}",
            label=covered.name,
            unit="requests/s",
            less_is_better=False,
            floor=floor,
            argv=ask(kind, path, number_),
            parse=_parser(size, covered.legs),
            crossing=1 / covered.legs,
        )
        for kind, words in _KINDS.items()
        for label, path, size, floor in (
            ("small", "small", _SMALL, REQUESTS_FLOOR),
            ("64 KiB", "file", _LARGE, _LARGE_FLOOR),
        )
        for number_, covered in enumerate(_COVERED)
    ]


def _parser(size: int, legs: int) -> Callable[[str], Reading]:
    """Reads what the client told of responses of ``size`` bytes; ``legs`` legs can pair."""
    read = parser(size)

    def parse(text: str) -> Reading:
        reading = read(text)
        volume = replace(reading.volume, amount=legs * reading.volume.amount)
        ticks = number(r"^sidecar_ticks (\d+)$", text, "the mesh's client")
        payload = reading.payload if size >= _LARGE else 0.0
        seconds = ticks / os.sysconf("SC_CLK_TCK")
        return replace(reading, volume=volume, payload=payload, sidecar_seconds=seconds)

    return parse


WORKLOAD = Workload("mesh", _NEEDS, _serve, _measures, rest=_REST, behind_nat=True, beside=version)
