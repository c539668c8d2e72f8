"""What `underpass calibrate` found on this node, and where it is kept."""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec

from underpass.model import Small

#: Where the result is kept; nothing there: the built-in bounds.
PLACE = Path("/var/lib/underpass/calibration.json")
#: 2: TCP is measured at its full speed, and has a margin.
METHOD = 2


class Point(msgspec.Struct, frozen=True):
    """One message size on one road: Mb/s of a stream by TCP and by the shortcut."""

    road: str
    placement: str
    size: int
    tcp: float
    shortcut: float

    @property
    def ratio(self) -> float:
        """Shortcut to TCP."""
        return self.shortcut / self.tcp


class Calibration(msgspec.Struct, frozen=True):
    """One result.

    Attributes:
        measured_at: seconds since 1970.
        kernel: release of the kernel that it was measured on.
        small: bytes below which a stream is faster by TCP, by road.
        points: what was measured.
        method: how; what another has found does not count.
    """

    measured_at: float
    kernel: str
    small: dict[str, int]
    points: tuple[Point, ...] = ()
    method: int = 1

    @property
    def bounds(self) -> Small:
        """The bounds as settings; the built-in one for a road that was not measured."""
        return Small()._replace(**{r: s for r, s in self.small.items() if r in Small._fields})


def bound(ratios: dict[int, float]) -> int:
    """The size below which TCP is to be used: of all bounds the one that gives away least.

    A single figure that is wrong by chance moves it little. Between two sizes that were measured it
    is where a straight line through their ratios (both axes logarithmic) crosses 1.

    Args:
        ratios: shortcut to TCP by message size.

    Returns:
        Bytes; 0 if the shortcut is never slower, above the largest size if it always is.
    """
    sizes = sorted(ratios)
    gains = [math.log(ratios[size]) for size in sizes]

    def given_away(count: int) -> float:
        """By TCP for the ``count`` smallest sizes and the shortcut for the others."""
        return sum(max(0.0, g) for g in gains[:count]) - sum(min(0.0, g) for g in gains[count:])

    best = min(range(len(sizes) + 1), key=lambda count: (round(given_away(count), 3), count))
    if best == 0:
        return 0
    if best == len(sizes):
        return sizes[-1] + 1
    below, above = gains[best - 1], gains[best]
    if not below < 0 <= above:
        return sizes[best]
    step: float = (sizes[best] / sizes[best - 1]) ** (below / (below - above))
    return round(sizes[best - 1] * step)


def read(place: Path = PLACE) -> Calibration | None:
    """What is kept at ``place``; None if there is nothing that this kernel can use."""
    try:
        if not place.is_file():  # a FIFO would have us wait
            return None
        found = msgspec.json.decode(place.read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None
    usable = all(0 <= size <= 1 << 20 for size in found.small.values())
    current = found.kernel == os.uname().release and found.method == METHOD
    return found if usable and current else None


def write(found: Calibration, place: Path = PLACE) -> None:
    """Keep ``found`` at ``place``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
        fresh.replace(place)
    finally:
        fresh.unlink(missing_ok=True)


def bounds(place: Path = PLACE) -> Small:
    """The bounds to begin with: the measured ones, else the built-in ones."""
    found = read(place)
    return found.bounds if found else Small()
