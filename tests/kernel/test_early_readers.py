"""Readers that sleep in recv since before their connection was there."""

from __future__ import annotations

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import ROUND, begin_connect, connect, exchange, listen
from tests.kernel.waiting import wait_until
from underpass.model import Fault
from underpass.torture.patience import patient

ADDRESS = (SERVER4, 8080)


def _read_before_the_handshake(bed: Bed, deadline: float) -> None:
    """A recv begins while the SYN is unanswered: the accept queue is full, so the first is lost."""
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, ADDRESS, backlog=0)
    connect(client, ADDRESS)  # fills the queue
    near = begin_connect(client, ADDRESS)
    reading = near.submit_read(2, ROUND, deadline)
    wait_until(near.sleeps_in_recv, "the reader sleeps")
    assert not reading.done()
    listener.accept()
    far = listener.accept()
    far.send(2, ROUND)
    reading.result(deadline + patient(1))
    exchange(near, far, 1)


def test_an_early_reader_gets_the_first_message(bed: Bed, plane: MakePlane) -> None:
    """Claim: a reader asleep in recv since before the handshake gets the server's first message."""
    underpass = plane()
    _read_before_the_handshake(bed, patient(20))
    counters = underpass.counters()
    assert counters.pairs_total == 2
    assert counters.tcp_messages_total["reader-waits-for-tcp"] > 0
    assert counters.shortcut_bytes_total > ROUND


def test_the_check_catches_an_unseen_early_reader(bed: Bed, plane: MakePlane) -> None:
    """Claim: when nobody looks for sleeping readers, this one sleeps until its deadline."""
    plane(faults=Fault.BLIND_READER)
    with pytest.raises(BlockingIOError):
        _read_before_the_handshake(bed, 4)
