"""Readers that sleep while the path changes under them, and what they can notice of it."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import ROUND, Remote, couple, exchange
from tests.kernel.waiting import holds_for, wait_until
from underpass.dataplane import Dataplane
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB


def _coupled(bed: Bed, *, outside: bool = False) -> tuple[Remote, Remote]:
    ends = bed.worker("client", outside=outside), bed.worker("server", outside=outside)
    near, far = couple(*ends, (SERVER4, 8080))
    exchange(near, far, 1)
    return near, far


def _wait_all_across(bed: Bed, underpass: Dataplane) -> None:
    """A recv(MSG_WAITALL) sleeps with TCP bytes in its hand as the path could change."""
    near, far = _coupled(bed)
    reading = far.submit_read(1, 100, 5, socket.MSG_WAITALL)
    wait_until(far.sleeps_in_recv, "the reader sleeps")
    underpass.set_forced(1)
    near.send(1, 10)
    wait_until(lambda: near.queues()[0] == far.queues()[1] == 0, "the reader has 10 bytes")
    underpass.set_forced(0)
    near.send(1, 90)
    reading.result(patient(30))
    exchange(near, far, 1)


def test_a_reader_that_waits_for_all_is_not_left_asleep(bed: Bed, plane: MakePlane) -> None:
    """Claim: recv(MSG_WAITALL) that began on TCP bytes gets the rest of them, over TCP."""
    underpass = plane(UNGUARDED)
    _wait_all_across(bed, underpass)
    assert underpass.counters().tcp_messages_total["reader-waits-for-tcp"] > 0


def test_the_check_catches_a_blind_switch(bed: Bed, plane: MakePlane) -> None:
    """Claim: when nobody looks for sleeping readers, the check above fails."""
    underpass = plane(UNGUARDED, Fault.BLIND_READER)
    with pytest.raises(EOFError, match="10 bytes of 100"):
        _wait_all_across(bed, underpass)


def _shut_under_a_reader(near: Remote, far: Remote) -> None:
    """One thread reads while another half-closes the same socket."""
    reading = near.submit_read(2, 1000, 10)
    wait_until(near.sleeps_in_recv, "the reader sleeps")
    near.shut()
    far.expect_eof()
    holds_for(lambda: not reading.done(), 0.5)
    far.send(2, 1000)
    reading.result(patient(30))


def _unblock_under_a_reader(near: Remote, far: Remote) -> None:
    """One thread reads while another of the same socket is held in send by a slow peer."""
    sent = near.fill(1, 64 * KIB, 64 * MIB)
    reading = near.submit_read(2, 1000, 10)
    wait_until(near.sleeps_in_recv, "the reader sleeps")
    # what `exchange` sent in four rounds is read already
    far.receive(1, sent - 4 * ROUND)
    holds_for(lambda: not reading.done(), 0.5)
    far.send(2, 1000)
    reading.result(patient(30))


WAKERS = pytest.mark.parametrize("disturb", [_shut_under_a_reader, _unblock_under_a_reader])


@WAKERS
def test_plain_tcp_readers_sleep_through(bed: Bed, disturb: Callable[..., None]) -> None:
    """Claim: over plain TCP a blocking recv is not disturbed by its own socket's other side."""
    disturb(*_coupled(bed))


@WAKERS
@pytest.mark.xfail(
    raises=BlockingIOError,
    reason="tcp_bpf_recvmsg waits once: a reader woken for nothing returns EAGAIN (kernel)",
)
def test_shortcut_readers_sleep_through(
    bed: Bed, plane: MakePlane, disturb: Callable[..., None]
) -> None:
    """Claim: the same with the shortcut. A known limit: no stream is wrong, but recv fails once."""
    plane()
    disturb(*_coupled(bed))


def test_what_a_server_sent_before_it_left_is_read(bed: Bed, plane: MakePlane) -> None:
    """Claim: a client that has not read nor said anything keeps what a half-closed server sent."""
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    far.send(1, 200 * KIB)
    assert underpass.counters().shortcut_bytes_total >= 200 * KIB
    far.shut()  # the server leaves the map, before its client has met it
    for _ in range(3):
        near.send(2, 10)
        far.receive(2, 10)
    near.receive(1, 200 * KIB)
    near.expect_eof()
