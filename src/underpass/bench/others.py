"""How busy others keep the cores that are measured on: looked at while nothing of ours runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from underpass.errors import UnderpassError

#: Nothing is said before so many looks; above this share of the cores figures are worth nothing.
_ENOUGH, _MUCH = 12, 0.5
#: Of a line of /proc/stat: idle and iowait; guests' times are in user's, too.
_IDLE, _ALL = slice(3, 5), slice(0, 8)


class Others:
    """Looks in the pauses between runs."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def pause(self, cpus: Iterable[int], seconds: float) -> None:
        """Pause, and see what is done on these cores meanwhile.

        Raises:
            UnderpassError: others have had most of them so far.
        """
        wanted, stat = set(cpus), Path("/proc/stat")
        before = stat.read_text()
        time.sleep(seconds)
        self._shares.append(share(before, stat.read_text(), wanted))
        usual = statistics.median(self._shares)
        if len(self._shares) >= _ENOUGH and usual > _MUCH:
            cause = f"other work has {usual:.0%} of the cores"
            raise UnderpassError("measure", "on this node", cause, "try when it is quieter")


def share(before: str, after: str, cpus: set[int]) -> float:
    """The share (0..1) of these cores that was busy between two readings of ``/proc/stat``."""
    idle, everything = (
        _ticks(after, cpus, part) - _ticks(before, cpus, part) for part in (_IDLE, _ALL)
    )
    return 1 - idle / everything if everything > 0 else 0.0


def _ticks(stat: str, cpus: set[int], part: slice) -> int:
    lines = (line.split() for line in stat.splitlines())
    return sum(sum(map(int, t[part])) for name, *t in lines if name[3:].isdecimal()
               and name.startswith("cpu") and int(name[3:]) in cpus)  # fmt: skip
