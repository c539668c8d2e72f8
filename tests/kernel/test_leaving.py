"""An endpoint leaves the map only when nothing redirected waits or is under way."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.absent import absent_page, why_not
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, begin_connect, connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass.generation import Dataplane
from underpass.model import Fault, Rule
from underpass.torture.content import WrongBytesError
from underpass.torture.patience import patient

ADDRESS = (SERVER4, 8080)
SIZE = 100
_TCP_INFO_PROBES = 3

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def _probes(end: Remote) -> int:
    """Keepalive probes that it has sent without an answer."""
    return end.option(socket.IPPROTO_TCP, socket.TCP_INFO) >> 8 * _TCP_INFO_PROBES


def _send_probes(end: Remote, count: int) -> None:
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        end.set_option(socket.IPPROTO_TCP, option, 1)
    end.set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wait_until(lambda: _probes(end) >= count, f"{count} probes are sent")


@contextlib.contextmanager
def _redirect_under_way(underpass: Dataplane, near: Remote, far: Remote) -> Iterator[None]:
    """Meanwhile a message sleeps between the sockets, behind a shutdown of the one it goes to.

    In life a moment, since a socket that is held is looked at first: the plane is SLEEPY.
    Both wait for the lock of `far`, whose reader holds it and sleeps for a page of its memory. They
    get it in this order, and before anything is read again. At the end all has to have arrived.
    """
    before = underpass.counters().shortcut_messages_total
    page = absent_page(far.worker)
    near.send(1, SIZE)
    reading = page.submit_read(far, 1, SIZE)
    try:
        page.wait_touched()
        shutting = far.submit_shut()
        wait_until(far.sleeps_in_shutdown, "a thread waits to shut the socket down")
        sending = near.submit_send(1, SIZE)
        wait_until(near.sleeps_in_send, "behind it, another waits to bring a message")
        assert underpass.counters().shortcut_messages_total == before + 2
        yield
        assert not sending.done()
    finally:
        page.provide()
    for step in (reading, shutting, sending):
        step.result(patient(20))
    near.send(1, SIZE)
    far.receive(1, 2 * SIZE, deadline=patient(3))


def _denied(bed: Bed, underpass: Dataplane) -> None:
    """The sender's program is denied: first the sender could leave, then the receiver."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    with _redirect_under_way(underpass, near, far):
        underpass.set_rule(Path("/proc/self/exe").readlink().name, Rule.DENY)
        # with the first it learns of the rule, with the second it has been patient enough
        _send_probes(near, 2)
    near.expect_eof()
    wait_until(lambda: underpass.endpoints() == [], "both leave, now that it has arrived")


def _beside_an_early_reader(bed: Bed, underpass: Dataplane) -> None:
    """A reader that sleeps in native recv seems to be the sender's thread: the receiver leaves."""
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, ADDRESS, backlog=0)
    connect(client, ADDRESS)  # fills the queue
    near = begin_connect(client, ADDRESS)
    reading = near.submit_read(2, SIZE, patient(20))
    wait_until(near.sleeps_in_recv, "the reader sleeps")
    listener.accept()
    far = listener.accept()
    for _ in range(3):
        near.send(1, SIZE)
        far.receive(1, SIZE)
    with _redirect_under_way(underpass, near, far):
        pass
    with pytest.raises(EOFError):
        reading.result(patient(20))


SEQUENCES = pytest.mark.parametrize("sequence", [_denied, _beside_an_early_reader])


@SEQUENCES
def test_nobody_leaves_while_a_redirect_is_under_way(
    bed: Bed, plane: MakePlane, sequence: Callable[[Bed, Dataplane], None]
) -> None:
    """Claim: a message that sleeps on its way as its ends could leave arrives, in order."""
    sequence(bed, plane(faults=Fault.SLEEPY))


@SEQUENCES
def test_the_check_catches_one_that_leaves_too_soon(
    bed: Bed, plane: MakePlane, sequence: Callable[[Bed, Dataplane], None]
) -> None:
    """Claim: when nobody asks whether a redirect is under way, the check above fails."""
    underpass = plane(faults=Fault.UNSETTLED | Fault.SLEEPY)
    with pytest.raises(WrongBytesError):
        sequence(bed, underpass)
    left = underpass.counters().refused_total
    assert (left["guarded"], left["half-closed"]) == (sequence is _denied, 1)
