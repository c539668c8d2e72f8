"""The small program that wheel builds compile from ``probe.c``.

Over AF_UNIX it measures the practical limit; over TCP, one stream at a time, for ``calibrate``.
"""

from __future__ import annotations

import os
from pathlib import Path

from underpass.bench.compare import Placement, Reading, Volume
from underpass.errors import UnderpassError

#: Of no other program of the node.
NAME = "underpass-probe"
PROGRAM = Path(__file__).with_name(NAME)


def available() -> bool:
    """Whether this build has the program."""
    return os.access(PROGRAM, os.X_OK)


def command(test: str, size: int, milliseconds: int, placement: Placement) -> list[str]:
    """One test at one size; with several cores to an end, the outermost of each."""
    cpus = [str(placement.client_cpus[0]), str(placement.server_cpus[-1])]
    return [str(PROGRAM), test, str(size), str(milliseconds), *cpus]


def parse(text: str, test: str, milliseconds: int) -> Reading:
    """Its one number: microseconds one way, or Mb/s, and how many bytes that were.

    Raises:
        UnderpassError: it printed something else.
    """
    try:
        figure = float(text)
    except ValueError:
        raise UnderpassError(
            "read", PROGRAM, f"it printed: {text[:80]!r}", "build underpass again"
        ) from None
    moved = figure * 1e6 / 8 * milliseconds / 1000 if test == "tcp_bw" else 0.0
    return Reading(figure, Volume("bytes", moved))
