"""Connections that are busy both ways until stopped."""

from __future__ import annotations

import os
from dataclasses import replace

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.waiting import wait_until
from underpass.torture.plans import BUSY, Batch, Mode
from underpass.torture.traffic import Running

NICE = 5
"""The load's: who loads programs beside it gets the processor that the verifier wants."""


class Load:
    """Connections that are busy both ways until stopped: a batch and two workers for each mode.

    Processes of their own, or Python's lock would starve readers that poll beside ones that block.
    """

    def __init__(self, bed: Bed) -> None:
        self._workers = [(bed.worker("client"), bed.worker("server"), mode) for mode in Mode]
        for client, server, _ in self._workers:
            for worker in (client, server):
                os.setpriority(os.PRIO_PROCESS, worker.pid, NICE)  # its threads inherit it
        self._batches = 0
        self._running: list[Running] = []

    def start(self, connections: int, deadline: float = 60) -> None:
        """Make the connections, the modes in turn."""
        self._running = []
        for number, (client, server, mode) in enumerate(self._workers):
            share = connections // len(Mode) + (number < connections % len(Mode))
            batch = Batch(
                self._batches,
                (replace(BUSY, mode=mode),) * share,
                SERVER4,
                port=7000 + number,
                first_port=20000 + 100 * (self._batches % 400),
                deadline=deadline,
            )
            self._batches += 1
            self._running.append(Running(client, server, batch))

    def moved(self) -> int:
        """Bytes that all ends have sent so far."""
        return sum(running.moved() for running in self._running)

    def wait_moves(self, size: int) -> None:
        """Wait until `size` more bytes are sent."""
        goal = self.moved() + size
        wait_until(lambda: self.moved() >= goal, "traffic goes on", 60)

    def stop_and_check(self) -> None:
        """End all connections; AssertionError unless every stream is whole and right."""
        for running in self._running:
            running.stop()
        for running in self._running:
            running.report().check()
