"""Bytes by TCP behind redirected ones: the receive buffer has room for them."""

from __future__ import annotations

import socket
import time

import pytest

from tests.kernel.bed import ADMITTING, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, connect, listen
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB

STALL = 5.0  # longer than an orphan of three retries lives: 0.2 + 0.4 + 0.8 + 1.6 s
SHORT = 1000
SIZES = pytest.mark.parametrize("size", [0, 4 * KIB, 64 * KIB], ids=["TCP's", "4 KiB", "64 KiB"])


def _stalled(
    bed: Bed, plane: MakePlane, size: int, faults: Fault, write: int
) -> tuple[Remote, int]:
    """A stalled reader, its buffer of ``size``; its writer has sent all it could, and closed."""
    underpass = plane(ADMITTING, faults)
    for where in ("client", "server"):
        bed.within(where, "sysctl", "-qw", "net.ipv4.tcp_orphan_retries=3")
    options = ((socket.SOL_SOCKET, socket.SO_RCVBUF, size),) if size else ()
    listener = listen(bed.worker("server"), (SERVER4, 8080), options=options)
    near, far = connect(bed.worker("client"), (SERVER4, 8080)), listener.accept()
    for _ in range(3):
        near.send(1, SHORT)
        far.receive(1, SHORT)
    sent = near.fill(1, write, 64 * MIB) - 3 * SHORT
    counters = underpass.counters()
    assert counters.tcp_messages_total["budget-bytes"] > 0
    assert counters.shortcut_messages_total > 0
    near.close()
    time.sleep(patient(STALL))
    return far, sent


@SIZES
@pytest.mark.parametrize("write", [1448, 64 * KIB])
def test_a_stalled_reader_gets_all(bed: Bed, plane: MakePlane, size: int, write: int) -> None:
    """Claim: TCP drops nothing for want of room, which a closed writer would give up to repeat."""
    far, sent = _stalled(bed, plane, size, Fault(0), write)
    far.receive(1, sent)


def test_twin_that_leaves_no_room(bed: Bed, plane: MakePlane) -> None:
    """Claim: where redirected bytes fill the buffer, what comes by TCP is lost; that shows."""
    far, sent = _stalled(bed, plane, 0, Fault.NO_ROOM, 64 * KIB)
    with pytest.raises((OSError, EOFError)):
        far.receive(1, sent)
