"""The generation under torture: taken down and brought up again, its figures added up."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

from underpass import dataplane, pinning, records
from underpass.bench.processes import wait_for
from underpass.dataplane import Dataplane
from underpass.model import Fault, Reason, Settings
from underpass.torture.kernel_objects import pinned

_GONE_WITHIN = 20.0
#: Each such message was turned off the shortcut by a rule or by the torture; those that follow it
#: until all is consumed are counted as tcp-unread.
_TURNED = (
    Reason.FORCED,
    Reason.BUDGET_BYTES,
    Reason.BUDGET_MESSAGES,
    Reason.NODE_BUDGET,
    Reason.NODE_MEMORY,
    Reason.READER_WAITS,
)


class Generation:
    """A data plane on the bed's cgroup, one after the other; for several threads."""

    def __init__(self, pins: Path, cgroup: Path, fault: Fault) -> None:
        self.pins = pins
        self._cgroup = cgroup
        self._fault = fault
        self._plane: Dataplane | None = None
        self._lock = threading.RLock()
        self._messages: Counter[str] = Counter()
        """By path or reason, of the generations that have gone."""

    def up(self, settings: Settings) -> None:
        """Bring one up, or revive the one that drains."""
        dataplane.up(self.pins, self._cgroup, settings, self._fault)
        with self._lock:
            if self._plane is None:
                self._plane = Dataplane.open(self.pins)
            self._plane.counters()  # opened now, it can be read when the pins have gone

    def down(self, timeout: float) -> list[str]:
        """Take it down; a line for everything that it left behind though it said all is gone.

        What does not drain in time is no error: the generation then still is there, draining.
        """
        objects = pinned(self.pins)
        if dataplane.down(self.pins, timeout):
            return []
        self.close()
        places = (self.pins, pinning.scratch(self.pins), pinning.lock(self.pins))
        left = [f"{path} is there after down" for path in places if path.exists()]
        if not wait_for(lambda: not any(one.exists() for one in objects), _GONE_WITHIN):
            left += [f"{o.kind} {o.number} is there after down" for o in objects if o.exists()]
        return left

    @property
    def live(self) -> bool:
        """Whether one is there, drained or not."""
        return self.pins.exists()

    def set_forced(self, share: float) -> None:
        """Force about this share of all messages onto TCP."""
        with self._lock:
            if self._plane is not None:
                self._plane.set_forced(share)

    def set_paused(self, paused: bool) -> None:
        """Everything by TCP, or the shortcut again."""
        with self._lock:
            if self._plane is not None:
                self._plane.set_paused(paused)

    def leaks(self) -> list[str]:
        """What is in the maps although every connection is closed; waits for late ends."""
        plane = self._plane
        if plane is None:
            return []
        wait_for(lambda: not plane.endpoints() and not any(plane.leftovers().values()), 15.0)
        found = [
            f"{records.endpoint(e, {})} is in the map of sockets, in TCP state {e.state}"
            for e in plane.endpoints()[:20]
        ]
        if pairs := plane.open_pairs():
            found.append(f"{pairs} pairs are open")
        left = plane.leftovers()
        return found + [f"{n} entries in the map {name}" for name, n in left.items() if n]

    def messages(self) -> dict[str, int]:
        """Messages so far: "shortcut", or the word of the reason for which they went by TCP."""
        with self._lock:
            total = Counter(self._messages)
            if self._plane is not None:
                total.update(_messages(self._plane))
        return {word: n for word, n in sorted(total.items()) if n}

    def close(self) -> None:
        """Let go of descriptors; the figures are kept."""
        with self._lock:
            if self._plane is not None:
                self._messages.update(_messages(self._plane))
                self._plane.close()
                self._plane = None


def _messages(plane: Dataplane) -> dict[str, int]:
    counters = plane.counters()
    return {
        Reason.SHORTCUT.word: counters.shortcut_messages_total,
        **counters.tcp_messages_total,
    }


def path_switches(messages: dict[str, int]) -> int:
    """Times that a direction was turned from the shortcut to TCP and back, as far as counted."""
    turned = sum(messages.get(reason.word, 0) for reason in _TURNED)
    return 2 * min(turned, messages.get(Reason.SHORTCUT.word, 0))
