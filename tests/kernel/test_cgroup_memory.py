"""Bytes that wait are charged to the reader's memory cgroup: near its limit they go by TCP."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed, cgroup2
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from underpass.dataplane import Dataplane
from underpass.model import Fault
from underpass.torture.plans import MIB
from underpass.torture.worker import Place, Worker, WorkerGoneError

LIMIT = 32 * MIB
CONNECTIONS = 6
EACH = 10 * MIB
WRITE = 65536


def _why_not() -> str | None:
    """Why no cgroup of a test can have a limit here, or None."""
    try:
        controllers = (cgroup2() / "cgroup.subtree_control").read_text().split()
    except AssertionError as error:
        return str(error)
    return None if "memory" in controllers else "cgroup v2 has no memory controller below its root"


needs_limit = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


def _kills(cgroup: Path) -> int:
    """How many processes of the cgroup the kernel has killed for want of memory."""
    lines = (cgroup / "memory.events").read_text().splitlines()
    return int(dict(line.split() for line in lines)["oom_kill"])


def _late_reader(bed: Bed) -> tuple[Worker, Worker]:
    """A sender and a reader, each in a cgroup below the bed's, the reader's with a limit."""
    workers = []
    for where in ("client", "server"):
        cgroup = bed.cgroup / where
        cgroup.mkdir()
        workers.append(Worker(Place(bed.netns[where], cgroup), where))
        bed.undo.callback(workers[-1].kill)
    (bed.cgroup / "cgroup.subtree_control").write_text("+memory")
    (bed.cgroup / "server" / "memory.max").write_text(str(LIMIT))
    bed.workers.extend(workers)
    return workers[0], workers[1]


def _fill(bed: Bed, underpass: Dataplane) -> list[tuple[Remote, Remote, int]]:
    """Send more than the reader's cgroup may hold: both ends of each connection and its bytes."""
    client, server = _late_reader(bed)
    ends = [couple(client, server, (SERVER4, 8000 + i)) for i in range(CONNECTIONS)]
    for near, far in ends:
        exchange(near, far, 1)
    assert len(underpass.pairs()) == CONNECTIONS
    before = near.fill(1, WRITE, 0)
    return [(near, far, near.fill(1, WRITE, EACH) - before) for near, far in ends]


@needs_limit
def test_a_reader_near_its_limit_is_left_to_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: more than the reader's cgroup may hold kills nobody, and every byte comes."""
    underpass = plane(UNGUARDED)
    filled = _fill(bed, underpass)
    assert underpass.counters().tcp_messages_total["cgroup-memory"]
    for near, far, size in filled:
        far.receive(1, size)
        exchange(near, far, 1)
    assert _kills(bed.cgroup / "server") == 0


@needs_limit
def test_without_a_look_the_reader_is_killed(bed: Bed, plane: MakePlane) -> None:
    """Claim: where nobody looks at the limit, the kernel kills the reader for what it is sent."""
    underpass = plane(UNGUARDED, Fault.NO_CGROUP)
    with contextlib.suppress(OSError, WorkerGoneError):  # to a reader that is gone
        _fill(bed, underpass)
    assert underpass.counters().tcp_messages_total["cgroup-memory"] == 0
    assert _kills(bed.cgroup / "server") > 0
