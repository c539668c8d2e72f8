"""The second party: pauses, resumes, forces paths, downs and ups, kills."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from underpass.errors import UnderpassError
from underpass.torture.generation import Generation
from underpass.torture.schedule import LANES, TORTURED, Act, Disturbance, disturbances

_DRAIN_SECONDS = 6.0


class Books(Protocol):
    """Where the disturber writes down what it did."""

    disturbances: Counter[str]
    killed: int
    adopted: int
    leaks: list[str]

    def fail(self, lines: list[str]) -> None:
        """Take errors."""


class Disturber(threading.Thread):
    """Does to the running traffic what the plan says, until told to stop.

    Args:
        kills: for each lane, ends the process of a side; False if there was none to end.
    """

    def __init__(
        self,
        generation: Generation,
        seed: int,
        stop: threading.Event,
        books: Books,
        kills: Sequence[Callable[[int], bool]],
    ) -> None:
        super().__init__(name="disturber", daemon=True)
        self._generation = generation
        self._seed = seed
        self._stopping = stop
        self._books = books
        self._kills = kills
        self._share = 0.0
        self._acts: dict[Act, Callable[[Disturbance], None]] = {
            Act.FORCE: self._force,
            Act.PAUSE: self._pause,
            Act.CYCLE: self._cycle,
            Act.UPGRADE: self._upgrade,
            Act.KILL: self._kill,
            Act.ADOPT: self._adopt,
            Act.POLICY: self._policy,
        }

    def run(self) -> None:
        """Body of the thread."""
        for disturbance in disturbances(self._seed):
            if self._stopping.wait(disturbance.after):
                return
            try:
                self._acts[disturbance.act](disturbance)
            except UnderpassError as error:
                self._books.fail([f"{disturbance}: {error}"])
                self._stopping.set()
                return
            self._books.disturbances[disturbance.act.value] += 1

    def _force(self, disturbance: Disturbance) -> None:
        self._share = disturbance.share
        self._generation.set_forced(self._share)

    def _pause(self, disturbance: Disturbance) -> None:
        self._generation.set_paused(True)
        self._stopping.wait(disturbance.seconds)
        self._generation.set_paused(False)

    def _cycle(self, disturbance: Disturbance) -> None:
        if left := self._generation.down(_DRAIN_SECONDS):
            self._books.leaks += left
            self._stopping.set()
            return
        self._generation.up(TORTURED[disturbance.settings])
        self._generation.set_forced(self._share)

    def _upgrade(self, disturbance: Disturbance) -> None:
        if not self._generation.upgrade(TORTURED[disturbance.settings]):
            self._books.disturbances["upgrade-refused"] += 1
        self._generation.set_forced(self._share)

    def _adopt(self, _: Disturbance) -> None:
        self._books.adopted += self._generation.adopt()

    def _policy(self, disturbance: Disturbance) -> None:
        self._generation.deny_port(LANES[disturbance.lane].port)
        self._stopping.wait(disturbance.seconds)
        self._generation.deny_port(None)

    def _kill(self, disturbance: Disturbance) -> None:
        self._books.killed += self._kills[disturbance.lane](disturbance.side)
