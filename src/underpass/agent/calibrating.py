"""Which small streams go by TCP: measured once on a node, in a child, beside everything else."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from pathlib import Path

from underpass import calibration, namespaces
from underpass.agent import children
from underpass.agent.children import Child
from underpass.agent.events import Journal
from underpass.agent.node import stamp
from underpass.bench import bed, probe
from underpass.calibration import Calibration
from underpass.errors import UnderpassError

_SYS_ADMIN = 21
#: Seconds until it is tried again if it failed, as on a node that is too busy.
_AGAIN = 3600.0


class Calibrator:
    """Measures if nothing is kept for this kernel; finds what was kept, by whomever.

    Attributes:
        child: at work, if one is.
    """

    def __init__(self, pins: Path, journal: Journal) -> None:
        self.child: Child | None = None
        self._pins, self._journal = pins, journal
        self._stamp: tuple[int, int] | None = None
        self._at = 0.0

    def look(self, *, wanted: bool) -> Calibration | None:
        """What has been kept since the last look; begins to measure if there never was anything.

        Args:
            wanted: it may measure.
        """
        found = None
        before, self._stamp = self._stamp, stamp(calibration.PLACE)
        if self._stamp != before and (found := calibration.read()):
            self._at = math.inf
        if wanted and not self.child and time.monotonic() >= self._at:
            self._begin()
        return found

    def _begin(self) -> None:
        self._at = math.inf
        if why := why_not():
            self._journal.say("calibration-skipped", reason=why)
            return
        self._journal.say("calibration-begins")
        self.child = children.calibrate(self._pins)

    def reap(self) -> str:
        """Take the result of the child, which has ended: the line of its error, if it failed."""
        assert self.child
        code, _, line = self.child.result()
        self.child = None
        if code:
            self._at = time.monotonic() + _AGAIN
        return (line or f"it ended with {code}") if code else ""

    def end(self) -> None:
        """End the child, if it is at work, and clear what it left."""
        if self.child:
            self.child.end(signal.SIGTERM, 0.5)
            self.child = None
            sweep()


def sweep() -> None:
    """Clear what measuring left that was killed, here or before."""
    with contextlib.suppress(UnderpassError, OSError):
        bed.sweep(namespaces.find_cgroup2())


def why_not() -> str:
    """Why nothing can be measured here; empty if it can be."""
    if not probe.available():
        return "this build lacks the probe"
    if os.geteuid() != 0 or not _may_administrate():
        return "namespaces cannot be made here (CAP_SYS_ADMIN)"
    for path in (namespaces.find_cgroup2(), calibration.PLACE.parent):
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not os.access(existing, os.W_OK):
            return f"{path} cannot be written"
    return ""


def _may_administrate() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _SYS_ADMIN & 1)
    return False
