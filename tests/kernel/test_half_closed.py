"""Blocking readers of sockets that they have shut down for writing: the FIN's ACK is no news."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _SOCKETS, ROUND, Options, Remote, _close, couple, exchange
from tests.kernel.waiting import wait_until
from tests.kernel.wire import Kind, Wire
from underpass.generation import Dataplane
from underpass.model import Fault
from underpass.torture.content import content
from underpass.torture.patience import patient
from underpass.torture.plans import MIB

ADDRESS = (SERVER4, 8080)
PART = 100
ANSWER = b"a" * PART


def _recv(number: int) -> bytes:
    return _SOCKETS[number].recv(2 * PART)


def _recv_again(number: int) -> bytes:
    """Take what waits, and what comes next: with no moment between in which it could leave."""
    _recv(number)
    return _recv(number)


@dataclass(frozen=True)
class _Behind:
    """A recv of `far` that sleeps as its FIN is acknowledged; `near` has sent more by now."""

    near: Remote
    far: Remote
    reading: Future[bytes]

    def taken(self) -> bytes:
        """What the recv returned."""
        return self.reading.result(patient(20))


def _read_behind(
    bed: Bed,
    underpass: Dataplane,
    seconds: float,
    *,
    paused: bool = False,
    of_near: Options = (),
    of_far: Options = (),
) -> _Behind:
    """The FIN of a reader is acknowledged while it sleeps; bytes come `seconds` later."""
    wire = Wire(bed)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1, 1)
    for end, options in ((near, of_near), (far, of_far)):
        for option in options:
            end.set_option(*option)
    near.send(1, PART)  # unread, it keeps `far` in the map as that shuts down
    wire.hold(Kind.ACK)
    far.shut()
    wire.wait_held(Kind.ACK)
    reading = far.worker.submit(_recv_again, far.number)
    wait_until(far.sleeps_in_recv, "the reader sleeps")
    wire.release(Kind.ACK)
    time.sleep(seconds)
    underpass.set_paused(paused)
    near.send(1, PART)
    return _Behind(near, far, reading)


@pytest.mark.parametrize("paused", [False, True], ids=["shortcut", "tcp"])
@pytest.mark.parametrize("seconds", [0, 0.5], ids=["at once", "late"])
def test_a_reader_sleeps_on(bed: Bed, plane: MakePlane, seconds: float, *, paused: bool) -> None:
    """Claim: it reads what comes behind, by either path, and the end, as by TCP."""
    behind = _read_behind(bed, plane(UNGUARDED), seconds, paused=paused)
    assert behind.taken() == content(1, ROUND + PART, PART)
    reading = behind.far.worker.submit(_recv, behind.far.number)
    wait_until(behind.far.sleeps_in_recv, "it waits for the end")
    behind.near.close()
    assert reading.result(patient(20)) == b""


def test_twin_that_rouses_at_the_end(bed: Bed, plane: MakePlane) -> None:
    """Claim: told of its FIN's ACK, the recv says EAGAIN; the test above would notice."""
    with pytest.raises(BlockingIOError):
        _read_behind(bed, plane(UNGUARDED, Fault.EARLY_ACK), 0.5).taken()


def test_the_connection_outlives_it(bed: Bed, plane: MakePlane) -> None:
    """Claim: that ACK does not wait until TCP_USER_TIMEOUT ends the connection."""
    options = ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(patient(2000))),)
    behind = _read_behind(bed, plane(UNGUARDED), patient(4), of_far=options)
    with pytest.raises(BlockingIOError):  # it was let through, for want of a better way
        behind.taken()
    taken = behind.far.worker.call(_recv, behind.far.number)
    assert taken == content(1, ROUND + PART, PART)


def test_keepalive_probes_are_answered(bed: Bed, plane: MakePlane) -> None:
    """Claim: a peer that sends some meanwhile is not left to think that the reader is dead."""
    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1),
    )
    behind = _read_behind(bed, plane(UNGUARDED), 6.5, of_near=options)  # longer than it waits
    try:
        taken = behind.taken()
    except BlockingIOError:
        taken = behind.far.worker.call(_recv, behind.far.number)
    assert taken == content(1, ROUND + PART, PART)


def test_who_lingers_in_close_is_told(bed: Bed, plane: MakePlane) -> None:
    """Claim: a close() that waits for this very ACK (SO_LINGER) ends as it comes."""
    plane(UNGUARDED)
    wire = Wire(bed)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1, 1)
    far.set_option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    wire.hold(Kind.ACK)
    closing = far.worker.submit(_close, far.number, reset=False)
    wire.wait_held(Kind.ACK)
    wire.release(Kind.ACK)
    closing.result(patient(20))


def _ask(number: int, size: int) -> bool:
    """Send a request, half-close, read the answer to its end; false if recv said EAGAIN."""
    client = _SOCKETS[number]
    client.sendall(bytes(size))
    client.shutdown(socket.SHUT_WR)
    taken = 0
    try:
        while data := client.recv(1000):
            taken += len(data)
    except BlockingIOError:
        return False
    return taken == len(ANSWER)


def _answer(number: int) -> None:
    server = _SOCKETS[number]
    while server.recv(MIB):
        pass
    server.sendall(ANSWER)
    server.close()


def test_a_large_request_and_its_end(bed: Bed, plane: MakePlane) -> None:
    """Claim: one thread that sends it, shuts down and reads gets the answer, each time."""
    underpass = plane(UNGUARDED)
    for _ in range(20):
        near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
        answering = far.worker.submit(_answer, far.number)
        assert near.worker.call(_ask, near.number, MIB)
        answering.result(patient(20))
        near.close()
    assert underpass.counters().shortcut_messages_total >= 20
