"""Real programs, started inside a worker's namespace and cgroup, and the same work done twice."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.bed import Bed
from tests.kernel.waiting import wait_until
from underpass.dataplane import Dataplane
from underpass.torture.worker import Worker

STREAMS = 0.1
"""Share of the bytes that the shortcut must carry where a stream can outrun its reader: while it
is ahead by the whole budget TCP holds it."""
RUN_DEADLINE = 50.0
"""Seconds after which a client program counts as hung; less than a worker's call may take."""


@dataclass
class Checked:
    """What a client found to be right."""

    size: int = 0
    """Bytes that travelled and were compared."""
    answer: object = None
    """What must be the same by TCP and by the shortcut."""
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what happens inside to the time that is shown."""
        start = time.monotonic()
        yield
        self.seconds += time.monotonic() - start


class Compare:
    """Has a client outside the cgroup, on plain TCP, and one inside it do the same."""

    def __init__(self, bed: Bed, underpass: Dataplane, measured: Callable[[str], Any]) -> None:
        self.underpass = underpass
        self._bed = bed
        self._measured = measured

    def __call__(
        self,
        what: str,
        load: Callable[..., Checked],
        *args: Any,
        where: str = "client",
        default: tuple[Any, ...] | None = None,
        floor: float = 0.5,
    ) -> None:
        """Run `load` in both, in the namespace `where`; `default`: other arguments outside.

        The answers must be equal and the kernel's counters must say that nothing of the first
        and at least the share `floor` of the second run's bytes took the shortcut.
        """
        before = self.underpass.counters()
        native = self._bed.worker(where, outside=True).call(load, *(default or args))
        between = self.underpass.counters()
        ours = self._bed.worker(where).call(load, *args)
        after = self.underpass.counters()
        assert ours.answer == native.answer
        assert between.shortcut_bytes_total == before.shortcut_bytes_total
        assert between.pairs_total == before.pairs_total
        assert after.pairs_total > between.pairs_total
        carried = after.shortcut_bytes_total - between.shortcut_bytes_total
        by_tcp = {k: n for k, n in after.tcp_messages_total.items() if n}
        assert carried >= floor * ours.size, f"{carried} of {ours.size} bytes; by TCP: {by_tcp}"
        self._measured(
            f"{what}: {native.seconds:.2f} s by TCP, {ours.seconds:.2f} s by the shortcut"
            f" ({native.seconds / ours.seconds:.1f} x; carried {carried / ours.size:.0%} of"
            f" {ours.size / 1e6:.1f} MB)"
        )


def find(program: str, package: str) -> str:
    """Path of an installed program; skips the test when it is not installed."""
    path = shutil.which(
        program, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
    if path is None:
        pytest.skip(f"{program} is not installed (package {package})")
    return path


def serve(
    bed: Bed, where: str, port: int, words: list[str], log: Path, *, outside: bool = False
) -> Worker:
    """Start a server that stays in the foreground; returns when its port answers.

    The bed ends it with all else in its cgroup.
    """
    worker = bed.worker(where, outside=outside)
    worker.call(_launch, words, log)
    wait_until(lambda: worker.call(_answers, port), f"{words[0]} answers, see {log}")
    return worker


def ask(words: list[str], given: bytes = b"") -> bytes:
    """In a worker: run a client program with `given` on its stdin; what it printed."""
    done = subprocess.run(
        words, input=given, check=False, capture_output=True, timeout=RUN_DEADLINE
    )
    assert done.returncode == 0, f"{words}: {done.returncode} {done.stderr.decode()[-2000:]}"
    return done.stdout


def _launch(words: list[str], log: Path) -> None:
    with log.open("wb") as out:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
