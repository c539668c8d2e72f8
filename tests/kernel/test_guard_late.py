"""An admitted program that begins to splice: late, but in order, within the budget, no error."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from tests.kernel import test_guard as guard
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple
from underpass.generation import Dataplane
from underpass.model import Fault, Settings
from underpass.torture.plans import KIB, MIB

STREAM = 1
SHORT = 100


def _pair(plane: Dataplane, bed: Bed) -> tuple[Remote, Remote]:
    """The ends of a pair of two admitted programs that the shortcut carries."""
    ends = couple(*guard._admit(plane, bed), (SERVER4, 8081))
    assert guard._carried(plane, *ends)
    return ends


def _splices_nothing(far: Remote) -> None:
    with pytest.raises(BlockingIOError):
        far.worker.call(guard._splice_now, far.number, SHORT)


def _splice_into_a_full_pipe(number: int) -> None:
    into, out = os.pipe()
    os.set_blocking(out, False)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(out, bytes(4096))
        os.set_blocking(number, False)
        os.splice(number, out, SHORT, flags=guard._SPLICE_F_NONBLOCK)
    finally:
        os.set_blocking(number, True)
        os.close(into)
        os.close(out)


@pytest.mark.parametrize("fault", [Fault(0), Fault.LATE_SPLICE], ids=["rule", "twin"])
def test_a_late_splice_does_not_swap(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: what an admitted program splices too late comes late, but not out of order."""
    underpass = plane(guard.SOON, fault, watch=True)
    near, far = _pair(underpass, bed)
    near.send(STREAM, SHORT)
    _splices_nothing(far)
    for _ in range(3):
        near.send(STREAM, SHORT)
    if fault:
        assert far.worker.call(guard._splice_now, far.number, SHORT) > 0
        return
    _splices_nothing(far)
    far.receive(STREAM, 4 * SHORT)
    assert not guard._carried(underpass, near, far)
    near.send(STREAM, SHORT)
    assert far.worker.submit(guard._splice, far.number, SHORT).result(20) == SHORT


@pytest.mark.parametrize("fault", [Fault(0), Fault.LATE_SPLICE], ids=["rule", "twin"])
def test_nor_do_its_other_connections(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: what waits in another socket of the program is not overtaken either."""
    underpass = plane(guard.SOON, fault, watch=True)
    near, far = _pair(underpass, bed)
    other = couple(near.worker, far.worker, (SERVER4, 8082))
    assert guard._carried(underpass, *other)
    near.send(STREAM, SHORT)
    _splices_nothing(other[1])  # gives the program away
    near.send(STREAM, SHORT)
    if fault:
        assert far.worker.call(guard._splice_now, far.number, SHORT) > 0
        return
    _splices_nothing(far)
    far.receive(STREAM, 2 * SHORT)


def test_the_gate_holds_for_what_must_not_be_overtaken(bed: Bed, plane: MakePlane) -> None:
    """Claim: with TCP bytes unread behind redirected ones, recv gets all in order."""
    underpass = plane(guard.SOON, watch=True)
    near, far = _pair(underpass, bed)
    near.send(STREAM, SHORT)
    underpass.set_paused(True)
    near.send(STREAM, SHORT)
    underpass.set_paused(False)
    with pytest.raises(BlockingIOError):
        far.worker.call(_splice_into_a_full_pipe, far.number)
    near.send(STREAM, SHORT)
    far.receive(STREAM, 3 * SHORT)


def test_the_budget_holds_for_a_reader_that_only_splices(bed: Bed, plane: MakePlane) -> None:
    """Claim: the sender is stopped as by any reader that does not read."""
    underpass = plane(guard.SOON, watch=True)
    near, far = _pair(underpass, bed)
    near.send(STREAM, SHORT)
    _splices_nothing(far)
    taken = near.fill(STREAM, 64 * KIB, 64 * MIB)
    assert taken <= Settings.budget_bytes * 3 // 2


def test_a_sender_that_has_shut_down_gets_its_error(bed: Bed, plane: MakePlane) -> None:
    """Claim: nothing is sent past the end of a stream for the sake of order."""
    underpass = plane(guard.SOON, watch=True)
    near, far = _pair(underpass, bed)
    far.send(2, SHORT)  # unread, it keeps the other end in the map
    near.send(STREAM, SHORT)
    _splices_nothing(far)
    near.shut()
    with pytest.raises(BrokenPipeError):
        near.send(STREAM, SHORT)


def test_a_record_that_is_waited_for(bed: Bed, plane: MakePlane) -> None:
    """Claim: from the sign on, MSG_WAITALL returns whole records."""
    underpass = plane(guard.SOON, watch=True)
    near, far = _pair(underpass, bed)
    near.send(STREAM, SHORT)
    far.worker.call(guard._read_all, far.number, SHORT, socket.MSG_WAITALL)
    reading = far.worker.submit(guard._read_all, far.number, 2 * SHORT, socket.MSG_WAITALL)
    near.send(STREAM, SHORT)
    near.send(STREAM, SHORT)
    assert reading.result(20) == 2 * SHORT
