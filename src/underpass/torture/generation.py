"""The generation under torture: taken down and brought up again, its figures added up."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

from underpass import adoption, dataplane, records
from underpass.bench.processes import wait_for
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.model import Fault, Reason, Settings, many
from underpass.policy import Compiled
from underpass.torture.kernel_objects import pinned
from underpass.torture.patience import patient

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
    Reason.REPROOF,
    Reason.READER_BUSY,
    Reason.CGROUP_MEMORY,
)


class Generation:
    """Data planes on the bed's cgroup, one after the other; for several threads."""

    def __init__(self, pins: Path, cgroup: Path, fault: Fault) -> None:
        self.pins = pins
        self._cgroup = cgroup
        self._fault = fault
        self._planes: list[Dataplane] = []
        """The one in charge last; those before it were upgraded."""
        self._lock = threading.RLock()
        self._messages: Counter[str] = Counter()
        """By path or reason, of those that have gone."""

    def up(self, settings: Settings) -> None:
        """Bring one up, or revive the one that drains."""
        dataplane.up(self.pins, self._cgroup, settings, self._fault)
        with self._lock:
            if not self._planes:
                self._open()

    def upgrade(self, settings: Settings) -> bool:
        """Put another in charge; False if readers that do not read stand in the way."""
        try:
            dataplane.upgrade(self.pins, settings, self._fault)
        except UnderpassError:
            if len(dataplane.retired(self.pins)) < dataplane.MOST_RETIRED:
                raise
            return False
        with self._lock:
            self._open()
        return True

    def adopt(self) -> int:
        """Take in what is on TCP, also what has just left; how many connections that were."""
        taken, _ = adoption.summary(adoption.adopt(self.pins, first_wait=0))
        return taken

    def _open(self) -> None:
        plane = Dataplane.open(self.pins)
        plane.own()  # opened now, it can be read when the pins have gone
        self._planes.append(plane)

    def down(self, timeout: float) -> list[str]:
        """Take it down; a line for everything that it left behind though it said all is gone.

        What does not drain in time is no error: the generation then still is there, draining.
        """
        objects = {one for path in dataplane.generations(self.pins) for one in pinned(path)}
        if dataplane.down(self.pins, timeout):
            return []
        self.close()
        left = [f"{path} is there after down" for path in dataplane.places(self.pins)]
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
            for plane in self._planes:
                plane.set_forced(share)

    def set_paused(self, paused: bool) -> None:
        """Everything by TCP, or the shortcut again."""
        with self._lock:
            for plane in self._planes:
                plane.set_paused(paused)

    def deny_port(self, port: int | None) -> None:
        """Let a policy keep this port of servers on TCP; None = let there be none."""
        dataplane.set_policy(self.pins, None if port is None else _denying(port))

    def leaks(self) -> list[str]:
        """What is in the maps although every connection is closed; waits for late ends."""
        planes = list(self._planes)
        wait_for(
            lambda: not any(p.endpoints() or any(p.leftovers().values()) for p in planes),
            patient(15),
        )
        found = []
        for plane in planes:
            found += [
                f"{records.endpoint(e, {})} is in the map of sockets, in TCP state {e.state}"
                for e in plane.endpoints()[:20]
            ]
            if pairs := plane.open_pairs():
                found.append(many(pairs, "open pair"))
            left = plane.leftovers()
            found += [f"{n} entries in the map {name}" for name, n in left.items() if n]
        return found

    def messages(self) -> dict[str, int]:
        """Messages so far: "shortcut", or the word of the reason for which they went by TCP."""
        with self._lock:
            total = Counter(self._messages)
            for plane in self._planes:
                total.update(_messages(plane))
        return {word: n for word, n in sorted(total.items()) if n}

    def close(self) -> None:
        """Let go of descriptors; the figures are kept."""
        with self._lock:
            for plane in self._planes:
                self._messages.update(_messages(plane))
                plane.close()
            self._planes.clear()


def _denying(port: int) -> Compiled:
    return Compiled(
        allow=0,
        default_allow=True,
        any_port=0,
        any_cidr=1,
        unknown_group=1,
        groups={},
        ports={port: 1},
        cidrs={},
    )


def _messages(plane: Dataplane) -> dict[str, int]:
    counters = records.counters(plane.own())
    return {
        Reason.SHORTCUT.word: counters.shortcut_messages_total,
        **counters.tcp_messages_total,
    }


def path_switches(messages: dict[str, int]) -> int:
    """Times that a direction was turned from the shortcut to TCP and back, as far as counted."""
    turned = sum(messages.get(reason.word, 0) for reason in _TURNED)
    return 2 * min(turned, messages.get(Reason.SHORTCUT.word, 0))
