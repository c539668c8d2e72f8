"""What the agent does next. Pure: no I/O, no clock of its own."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from underpass.policy import Compiled

#: Seconds at most between two tries of something that fails.
LONGEST = 300.0
#: Seconds from the news that more connections may take the shortcut to the pass of adoption that
#: takes them in (more news may follow), and seconds from one such pass to the next.
GATHER, APART = 2.0, 5.0


class Job(enum.StrEnum):
    """What the agent does again and again. The words are labels of metrics."""

    CHECK = "check"
    ARM = "arm"
    ADOPT = "adopt"
    SWEEP = "sweep"
    NAME = "name"


class Timetable:
    """When each job is due. A job that fails is tried again later and later.

    Args:
        every: seconds between two runs, by job; 0 or absent = never.
        now: seconds, of any clock that goes on.
    """

    def __init__(self, every: Mapping[Job, float], now: float) -> None:
        self._every = {job: seconds for job, seconds in every.items() if seconds > 0}
        self._at = dict.fromkeys(self._every, now)
        self._failures = dict.fromkeys(self._every, 0)
        self._ran: dict[Job, float] = {}

    def change(self, every: Mapping[Job, float], now: float) -> None:
        """Other intervals from now on; what was due stays due."""
        fresh = Timetable(every, now)
        for job in fresh._at.keys() & self._at.keys():
            fresh._at[job] = min(self._at[job], now + fresh._every[job])
        self._every, self._at, self._failures = fresh._every, fresh._at, fresh._failures

    def due(self, now: float) -> list[Job]:
        """The jobs whose time has come, in the order of :class:`Job`."""
        return [job for job in Job if job in self._at and self._at[job] <= now]

    def sleep(self, now: float, most: float) -> float:
        """Seconds until the next job is due, ``most`` at most."""
        return max(0.0, min([most, *(at - now for at in self._at.values())]))

    def begin(self, job: Job) -> None:
        """It runs: what hurries it from now on is about its next run."""
        self._at[job] = math.inf

    def done(self, job: Job, now: float) -> None:
        """It went well."""
        self._failures[job] = 0
        self._ran[job] = now
        self._at[job] = min(self._at[job], now + self._every[job])

    def failed(self, job: Job, now: float) -> None:
        """It did not."""
        self._failures[job] += 1
        self._ran[job] = now
        self._at[job] = now + later(self._every[job], self._failures[job])

    def hurry(self, job: Job, at: float, apart: float = 0.0) -> None:
        """Let it be due at ``at``, if it is not before, and if it is ever.

        Args:
            job: which.
            at: when.
            apart: seconds that its last run must have ended before.
        """
        if job in self._at:
            at = max(at, self._ran.get(job, at) + apart) if apart else at
            self._at[job] = min(self._at[job], at)


def later(seconds: float, failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return max(seconds, min(seconds * 2.0 ** min(failures - 1, 20), LONGEST))


@dataclass(frozen=True)
class Seen:
    """What is pinned.

    Attributes:
        state: ``absent``, ``active``, ``paused`` or ``draining``.
        number: of the generation.
        attached: the cgroup is still the one that it was attached to.
    """

    state: str
    number: int = 0
    attached: bool = True

    @property
    def serves(self) -> bool:
        """Is it as it should be? A pause is an administrator's word, and stays."""
        return self.state in {"active", "paused"} and self.attached


class Step(enum.Enum):
    """What a look at the generation asks for."""

    NOTHING = enum.auto()
    REACH = enum.auto()
    """Bring what is wanted into force: at the start, after a reload."""
    RESTORE = enum.auto()
    """Bring back what somebody took down."""


def step(seen: Seen, *, wanted: bool) -> Step:
    """What is to be done.

    Args:
        seen: what is there.
        wanted: the configuration has not been brought into force yet.
    """
    if wanted:
        return Step.REACH
    return Step.NOTHING if seen.serves else Step.RESTORE


def newcomers(known: Iterable[int], found: Iterable[int]) -> set[int]:
    """Namespaces (inodes) that have not been seen before."""
    return set(found) - set(known)


def gains(before: Compiled | None, after: Compiled | None) -> bool:
    """May connections take the shortcut that might not before? In doubt they may.

    What was refused as it was opened comes back by adoption alone, so this is what hurries it.

    Args:
        before: the policy that was in force; None: all might.
        after: the one that is.
    """
    if before is None or after is None:
        return before is not None
    masks = [mask for group, mask in after.groups.items() if before.groups.get(group) != mask]
    if replace(before, groups=after.groups) != after:
        masks = [*after.groups.values()]
        if after.unknown_group is not None:
            masks.append(after.unknown_group)
    return any(_admits(after, mask) for mask in masks)


def _admits(policy: Compiled, mask: int) -> bool:
    """May some connection of a group take the shortcut, if its rules are these?"""
    of_all = policy.any_port & policy.any_cidr
    for bit in range(mask.bit_length()):
        if mask >> bit & 1:
            if policy.allow >> bit & 1:
                return True
            if of_all >> bit & 1:
                return False
    return policy.default_allow
