"""`down` loses nothing, whatever goes on, and leaves nothing."""

from __future__ import annotations

import pytest

from tests.kernel.bed import ADMITTING, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.kernel_objects import sock_ops_on, wait_gone
from tests.kernel.remote import connect, couple, exchange, listen
from tests.kernel.traffic import Load
from tests.kernel.waiting import wait_until
from underpass import dataplane
from underpass.dataplane import Dataplane
from underpass.model import Fault
from underpass.torture.content import WrongBytesError
from underpass.torture.kernel_objects import pinned
from underpass.torture.patience import fewer
from underpass.torture.plans import KIB, MIB

ROUNDS = fewer(8)


def _check_gone(bed: Bed) -> None:
    assert not bed.pins.exists()
    assert sock_ops_on(bed.cgroup) == []


@pytest.mark.timeout(3600)
def test_down_under_load(bed: Bed, *, long_run: bool) -> None:
    """Claim: 8 times (200 in a long run), 50 busy connections lose no byte; nothing is left."""
    load = Load(bed)
    for _ in range(200 if long_run else ROUNDS):
        dataplane.up(bed.pins, bed.cgroup, ADMITTING)
        objects = pinned(bed.pins)
        load.start(50, deadline=600)
        with Dataplane.open(bed.pins) as underpass:
            _wait_carried(underpass)
        assert dataplane.down(bed.pins) == []
        _check_gone(bed)
        wait_gone(objects)
        load.wait_moves(20 * MIB)
        load.stop_and_check()


def _renew(load: Load, underpass: Dataplane) -> None:
    """Begin new pairs if a starved machine has lost all: they leave for good when readers stall."""
    if not underpass.endpoints():
        load.stop_and_check()
        load.start(20)
        wait_until(underpass.endpoints, "new pairs are made")


def _wait_carried(underpass: Dataplane) -> None:
    def carried() -> bool:
        return underpass.counters().shortcut_bytes_total > 20 * MIB

    wait_until(carried, "the shortcut carries")


def test_unread_bytes_outlive_down(bed: Bed) -> None:
    """Claim: `down` leaves an endpoint with unread bytes working and names it; later it ends."""
    dataplane.up(bed.pins, bed.cgroup, ADMITTING)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    other = couple(near.worker, far.worker, (SERVER4, 8081))
    exchange(*other, 5)
    exchange(near, far, 1)
    near.send(1, 100 * KIB)
    left = dataplane.down(bed.pins, timeout=3)
    assert len(left) == 1
    assert f"{SERVER4}:8080" in left[0]
    with Dataplane.open(bed.pins) as underpass:
        assert underpass.state == "draining"
        before = underpass.counters().pairs_total
        exchange(*couple(near.worker, far.worker, (SERVER4, 8082)), 9)
        assert underpass.counters().pairs_total == before
    near.send(1, 50 * KIB)
    exchange(*other, 5)
    far.receive(1, 150 * KIB)
    assert dataplane.down(bed.pins) == []
    _check_gone(bed)
    exchange(near, far, 1)


@pytest.mark.parametrize("spoken", [0, KIB])
def test_nobody_has_accepted(bed: Bed, spoken: int) -> None:
    """Claim: `down` does not wait for a server to accept, unless its client has spoken to it."""
    dataplane.up(bed.pins, bed.cgroup, ADMITTING)
    listener = listen(bed.worker("server"), (SERVER4, 8080))
    near = connect(bed.worker("client"), (SERVER4, 8080))
    with Dataplane.open(bed.pins) as underpass:
        assert underpass.counters().pairs_total == 1
    if spoken:
        near.send(1, spoken)
    left = dataplane.down(bed.pins, timeout=1 if spoken else 30)
    assert len(left) == (1 if spoken else 0)
    assert not spoken or "bytes unread" in left[0]
    far = listener.accept()
    far.receive(1, spoken)
    assert dataplane.down(bed.pins) == []
    _check_gone(bed)
    exchange(near, far, 1)


def test_the_check_catches_a_drain_that_deletes(bed: Bed) -> None:
    """Claim: a `down` that takes endpoints out with unread bytes loses them, and it is seen."""
    dataplane.up(bed.pins, bed.cgroup, ADMITTING, faults=Fault.DRAIN_UNREAD)
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    near.send(1, 100 * KIB)
    assert dataplane.down(bed.pins, timeout=3) == []
    near.send(1, 50 * KIB)
    with pytest.raises((WrongBytesError, BlockingIOError)):
        far.receive(1, 150 * KIB, deadline=3)


def test_up_again_while_it_drains(bed: Bed, plane: MakePlane) -> None:
    """Claim: `up` after a `down` that could not finish makes the same generation live again."""
    plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    couple(near.worker, far.worker, (SERVER4, 8082))  # says nothing before it is taken out
    near.send(1, 100 * KIB)
    assert len(dataplane.down(bed.pins, timeout=0.2)) == 1
    exchange(*couple(near.worker, far.worker, (SERVER4, 8083)), 1)
    underpass = plane()
    assert underpass.state == "active"
    assert not any(underpass.leftovers().values())
    far.receive(1, 100 * KIB)
    exchange(near, far, 1)
    before = underpass.counters()
    exchange(*couple(near.worker, far.worker, (SERVER4, 8081)), 1)
    after = underpass.counters()
    assert after.pairs_total == before.pairs_total + 1
    assert after.shortcut_messages_total > before.shortcut_messages_total


def test_pause_and_resume_under_load(bed: Bed, plane: MakePlane) -> None:
    """Claim: pausing sends all by TCP, resuming goes back, and no stream is wrong."""
    underpass = plane()
    load = Load(bed)
    load.start(20)
    _wait_carried(underpass)
    for _ in range(10):
        _renew(load, underpass)
        underpass.set_paused(True)
        paused = underpass.counters()

        def by_tcp(since: int = paused.tcp_messages_total["paused"]) -> bool:
            return underpass.counters().tcp_messages_total["paused"] > since + 100

        wait_until(by_tcp, "messages go by TCP")
        before = underpass.counters().shortcut_messages_total
        load.wait_moves(10 * MIB)
        assert underpass.counters().shortcut_messages_total == before
        underpass.set_paused(False)

        def carried(since: int = before) -> bool:
            _renew(load, underpass)
            return underpass.counters().shortcut_messages_total > since + 100

        wait_until(carried, "the shortcut carries again")
    load.stop_and_check()
