"""What the agent says of itself over HTTP, and where."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from underpass import metrics
from underpass.agent.node import look
from underpass.agent.server import Answer, Pages, Server
from underpass.errors import UnderpassError
from underpass.metrics import Tally

#: Seconds without a turn of the loop after which the agent counts as hung.
_HUNG = 90.0


class Serving:
    """The pages, at one address at a time.

    Args:
        pins: the generation that they tell of.
        tally: what the loop counts.
        known: tells of pods; asked by any thread.
    """

    def __init__(self, pins: Path, tally: Tally, known: Callable[[], metrics.Known | None]) -> None:
        self._pins, self._tally = pins, tally
        told = metrics.Metrics(pins, tally, known)
        self._pages = Pages(told.text, self._healthy, self._ready)
        self._server: Server | None = None
        self._listens = ""

    @property
    def where(self) -> str:
        """Where it listens; empty: nowhere."""
        return self._server.where if self._server else ""

    def listen(self, where: str) -> None:
        """Serve there, and nowhere else; empty: nowhere.

        Raises:
            UnderpassError: it cannot listen there; it goes on where it was.
        """
        if self._server and where == self._listens:
            return
        fresh = Server(where, self._pages) if where else None
        if self._server:
            self._server.close()
        self._server, self._listens = fresh, where

    def _healthy(self) -> Answer:
        still = time.monotonic() - self._tally.turned_at
        return still < _HUNG, f"the loop went round {still:.0f} s ago"

    def _ready(self) -> Answer:
        if not self._tally.ready:
            return False, self._tally.why_not
        try:
            seen = look(self._pins)
        except UnderpassError as error:
            return False, str(error)
        return seen.serves, f"{seen.state}, generation {seen.number}"
