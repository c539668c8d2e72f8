"""Readers that ask FIONREAD, where that does not count what is redirected (before 929e30f93125)."""

from __future__ import annotations

import fcntl
import select
import struct
import termios

import pytest

from tests.kernel import remote
from tests.kernel import test_guard as guard
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import COUNTS, MakePlane
from tests.kernel.remote import Remote, couple
from tests.kernel.waiting import wait_until
from underpass.dataplane import Dataplane
from underpass.model import Fault, Sign
from underpass.torture.patience import patient

KIB = 1024
BUFFER = KIB
MESSAGE = 100 * KIB
_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


def _read_as_nginx_does(number: int, size: int, patience: float) -> int:
    """In a worker: read on while reads fill the buffer and FIONREAD tells of more; else wait."""
    sock, taken = remote._SOCKETS[number], 0
    with select.epoll() as events:
        events.register(sock, _READ)
        while taken < size and events.poll(patience):
            more = True
            while more:
                taken += (got := len(sock.recv(BUFFER)))
                asked = fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4) if got == BUFFER else b""
                more = got == BUFFER and struct.unpack("i", asked)[0] > 0
    return taken


def _write(number: int, size: int) -> None:
    remote._SOCKETS[number].sendall(bytes(size))


def _waits_in_vain(near: Remote, far: Remote) -> bool:
    """Whether the reader goes without bytes of a message that is there."""
    near.worker.call(_write, near.number, MESSAGE)
    taken = far.worker.call(_read_as_nginx_does, far.number, MESSAGE, patient(2))
    return int(taken) < MESSAGE


@pytest.mark.usefixtures("miscounting")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(0),
        pytest.param(
            Fault.MISCOUNTED,
            marks=pytest.mark.skipif(COUNTS, reason="this kernel counts what is redirected"),
        ),
    ],
    ids=["guarded", "twin"],
)
def test_a_reader_that_asks_is_kept_out(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: who was seen to ask while it was watched never waits for what is there. Twin: does."""
    underpass = plane(guard.SOON, fault, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, guard.TO)
    assert not _waits_in_vain(near, far)  # it is watched, on TCP
    wait_until(lambda: _decided(underpass, near, far), "it was watched for long enough")
    near, far = couple(client, server, (SERVER4, 8081))
    assert _waits_in_vain(near, far) == bool(fault)
    assert guard._of(underpass, server).signs == ([] if fault else Sign.FIONREAD.words)


def _decided(plane: Dataplane, near: Remote, far: Remote) -> bool:
    near.worker.call(_write, near.number, 1)
    far.worker.call(_read_as_nginx_does, far.number, 1, patient(2))
    return all(guard._of(plane, end.worker).verdict != "watched" for end in (near, far))


def test_where_it_counts_asking_is_no_sign(bed: Bed, plane: MakePlane) -> None:
    """Claim: on kernels that count, who asks has the shortcut, and never waits in vain."""
    if not COUNTS:
        pytest.skip("this kernel does not count what is redirected")
    underpass = plane(guard.SOON, watch=True)
    client, server = guard._admit(underpass, bed)
    near, far = couple(client, server, (SERVER4, 8081))
    assert not _waits_in_vain(near, far)
    assert underpass.counters().shortcut_bytes_total >= MESSAGE
    assert guard._of(underpass, server).signs == []
