"""kill -9 of whatever process of ours runs: traffic and acceleration go on."""

from __future__ import annotations

import random
import time

import pytest

from tests.kernel.bed import BPFFS, SERVER4, Bed
from tests.kernel.commands import command, kill_during, underpass
from tests.kernel.kernel_objects import sock_ops_on, wait_gone
from tests.kernel.remote import couple, exchange
from tests.kernel.traffic import Load
from underpass.dataplane import Dataplane
from underpass.torture.kernel_objects import pinned
from underpass.torture.patience import fewer
from underpass.torture.plans import MIB
from underpass.torture.worker import Worker

ROUNDS = max(4, fewer(10))  # one alone could not meet both
LONG_ROUNDS = 25


def _check_live(bed: Bed, port: int) -> None:
    """One generation is attached, and a new connection takes the shortcut."""
    assert len(sock_ops_on(bed.cgroup)) == 1
    assert list(BPFFS.glob(f"{bed.name}*")) == [bed.pins]
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, port))
    exchange(near, far, 1)
    with Dataplane.open(bed.pins) as live:
        assert [pair for pair in live.pairs() if pair.server.port == port]


def _check_carries(bed: Bed, ends: tuple[Worker, Worker], port: int) -> None:
    """A new connection takes the shortcut (busy ones may have left: starved readers look stuck)."""
    with Dataplane.open(bed.pins) as live:
        before = live.counters().shortcut_messages_total
        near, far = couple(*ends, (SERVER4, port))
        exchange(near, far, 1, rounds=1)
        assert live.counters().shortcut_messages_total > before
    for end in (near, far):
        end.close()


def _duration(bed: Bed) -> float:
    """How long an `up` takes here, seconds."""
    begin = time.monotonic()
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    return time.monotonic() - begin


@pytest.mark.timeout(600)
def test_up_killed_half_way(bed: Bed, *, long_run: bool) -> None:
    """Claim: whatever a killed `up` left is replaced or completed by the next one."""
    longest = _duration(bed)
    underpass(bed.pins, "down").ok()
    moments = random.Random(8)
    seen = set()
    for number in range(LONG_ROUNDS if long_run else ROUNDS):
        up = command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)
        kill_during(up, moments.uniform(longest / 4, longest))
        left = tuple(sorted(path.name for path in BPFFS.glob(f"{bed.name}*")))
        seen.add(left)
        longest *= 0.9 if left else 1.25  # the machine may have become busier, or less so
        underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
        if number % 5 == 0:
            _check_live(bed, 8080 + number)
        bed.kill_workers()
        objects = pinned(bed.pins)
        underpass(bed.pins, "down").ok()
        assert list(BPFFS.glob(f"{bed.name}*")) == []
        assert sock_ops_on(bed.cgroup) == []
        wait_gone(objects)
    # some were killed before they pinned anything, some after
    assert len(seen) > 1


@pytest.mark.timeout(600)
def test_any_command_killed_under_load(bed: Bed, *, long_run: bool) -> None:
    """Claim: with 20 busy connections, no kill of ours costs a byte or stops the shortcut."""
    longest = _duration(bed)
    load = Load(bed)
    load.start(20, deadline=200)
    load.wait_moves(MIB)
    moments = random.Random(9)
    words = [
        ("up", "--admit-unknown", "--cgroup", str(bed.cgroup)),
        ("status",),
        ("connections",),
        ("pause",),
    ]
    ends = bed.worker("client"), bed.worker("server")
    for number in range(LONG_ROUNDS if long_run else ROUNDS):
        kill_during(command(bed.pins, *moments.choice(words)), moments.uniform(0, longest))
        underpass(bed.pins, "resume").ok()
        _check_carries(bed, ends, 9000 + number)
    _check_live(bed, 8080)
    load.stop_and_check()


@pytest.mark.timeout(600)
def test_down_killed_under_load(bed: Bed, *, long_run: bool) -> None:
    """Claim: a `down` that is killed loses nothing; `up` goes on from there, or `down` ends it."""
    longest = _duration(bed)
    load = Load(bed)
    moments = random.Random(10)
    for number in range(LONG_ROUNDS if long_run else fewer(3)):
        load.start(20)
        load.wait_moves(10 * MIB)
        kill_during(command(bed.pins, "down"), moments.uniform(longest / 4, 2 + longest))
        load.wait_moves(10 * MIB)
        underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
        _check_live(bed, 8080 + number)
        kill_during(command(bed.pins, "down"), moments.uniform(longest / 4, 2 + longest))
        underpass(bed.pins, "down").ok()
        assert sock_ops_on(bed.cgroup) == []
        load.stop_and_check()
        underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()


def test_pairs_outlive_their_loader(bed: Bed) -> None:
    """Claim: with no process of ours alive, old and new connections take the shortcut."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    for port in (8080, 8081):
        _check_live(bed, port)
