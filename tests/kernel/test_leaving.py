"""An endpoint leaves the map only when nothing redirected waits or is under way."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.kernel.absent import absent_page, why_not
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import wait_until
from underpass.generation import Dataplane
from underpass.model import Fault, Rule
from underpass.torture.content import WrongBytesError
from underpass.torture.patience import patient

SIZE = 100
_TCP_INFO_PROBES = 3


def _probes(end: Remote) -> int:
    """Keepalive probes that it has sent without an answer."""
    return end.option(socket.IPPROTO_TCP, socket.TCP_INFO) >> 8 * _TCP_INFO_PROBES


def _send_probes(end: Remote, count: int) -> None:
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
        end.set_option(socket.IPPROTO_TCP, option, value)
    end.set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wait_until(lambda: _probes(end) >= count, f"{count} probes are sent")


def _leave_under_a_redirect(bed: Bed, underpass: Dataplane) -> None:
    """A message sleeps on its way while first its sender, then its receiver could leave."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    page = absent_page(far.worker)
    before = underpass.counters().shortcut_messages_total
    near.send(1, SIZE)
    reading = page.submit_read(far, 1, SIZE)
    try:
        page.wait_touched()  # from now on the reader owns its socket
        shutting = far.submit_shut()
        wait_until(far.sleeps_in_shutdown, "a thread waits for the socket to shut it down")
        sending = near.submit_send(1, SIZE)
        wait_until(near.sleeps_in_send, "and behind it another to bring a message")
        assert underpass.counters().shortcut_messages_total == before + 2
        underpass.set_rule(Path("/proc/self/exe").readlink().name, Rule.DENY)
        _send_probes(near, 2)  # with the first it learns of the rule, with the second it may leave
        assert not sending.done()
    finally:
        page.provide()
    for step in (reading, shutting, sending):
        step.result(patient(20))
    near.send(1, SIZE)
    far.receive(1, 2 * SIZE, deadline=patient(3))
    near.expect_eof()


needs_absent_pages = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@needs_absent_pages
def test_nobody_leaves_while_a_redirect_is_under_way(bed: Bed, plane: MakePlane) -> None:
    """Claim: a message whose program is denied while it sleeps on its way arrives, in order."""
    underpass = plane()
    _leave_under_a_redirect(bed, underpass)
    wait_until(lambda: underpass.endpoints() == [], "both leave once it has arrived")


@needs_absent_pages
def test_the_check_catches_one_that_leaves_too_soon(bed: Bed, plane: MakePlane) -> None:
    """Claim: when nobody asks whether a redirect is under way, the check above fails."""
    underpass = plane(faults=Fault.UNSETTLED)
    with pytest.raises(WrongBytesError):
        _leave_under_a_redirect(bed, underpass)
    left = underpass.counters().refused_total
    assert (left["guarded"], left["half-closed"]) == (1, 1)
