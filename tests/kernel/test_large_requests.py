"""Requests that outgrow the budget, from clients that block: the answer is waited for as by TCP."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _SOCKETS, Remote, couple
from underpass.model import Fault
from underpass.torture.patience import fewer, patient
from underpass.torture.plans import MIB

PORT = 8080
LOOPBACK = "127.0.0.1"
REQUEST = 3_000_000
SETTINGS = replace(UNGUARDED, budget_bytes=MIB)
ANSWER = b"a" * 100
SHORT = 1000
SO_SNDBUFFORCE = 32


def _ask(number: int, rounds: int, size: int, *, watched: bool = False) -> int:
    """Send a request and wait for its answer, time and again; in which round recv said EAGAIN.

    `watched`: the socket also stands in an epoll set, as of a program that waits for others there.
    """
    client, watching = _SOCKETS[number], select.epoll()
    if watched:
        watching.register(client, select.EPOLLIN)
    client.setblocking(True)
    request = bytes(size)
    unsent = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    for done in range(rounds):
        client.sendall(request)
        left = len(ANSWER)
        while left:
            try:
                left -= len(client.recv(left))
            except BlockingIOError:
                return done
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == unsent
    return rounds


def _answer(number: int, rounds: int, size: int) -> None:
    """Read requests with pauses, so that they come to wait, and answer each."""
    server, choose = _SOCKETS[number], random.Random(1)
    server.settimeout(patient(30))
    for _ in range(rounds):
        time.sleep(choose.random() * 0.02)
        left = size
        while left:
            taken = len(server.recv(min(left, choose.randint(1, MIB // 4))))
            if not taken:
                return
            left -= taken
            if choose.randrange(8) == 0:
                time.sleep(choose.random() * 0.002)
        time.sleep(choose.random() * 0.003)
        server.sendall(ANSWER)


def _rounds_without(
    near: Remote, far: Remote, rounds: int, request: int = REQUEST, *, watched: bool = False
) -> int:
    answering = far.worker.submit(_answer, far.number, rounds, request)
    asking = near.worker.submit(_ask, near.number, rounds, request, watched=watched)
    asked = asking.result(patient(100))
    near.close()
    with contextlib.suppress(OSError):
        answering.result(patient(40))
    return asked


def _coupled(bed: Bed, address: str) -> tuple[Remote, Remote]:
    """A client and a server: in two pods, or both in one."""
    client = bed.worker("server" if address == LOOPBACK else "client")
    return couple(client, bed.worker("server"), (address, PORT))


@pytest.mark.parametrize("address", [SERVER4, LOOPBACK], ids=["veth", "loopback"])
@pytest.mark.parametrize("paused", [False, True], ids=["over budget", "paused"])
@pytest.mark.parametrize("size", [0, 60_000, 200_000])
def test_a_blocking_client_waits_for_its_answer(
    bed: Bed, plane: MakePlane, size: int, address: str, *, paused: bool
) -> None:
    """Claim: what TCP says of room to write wakes no reader that would take it for a timeout.

    Nor where the program has chosen the size of its send buffer itself; that stays what it was.
    """
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, address)
    if size:
        near.set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    near.send(1, SHORT)
    far.receive(1, SHORT)
    underpass.set_paused(paused)
    assert _rounds_without(near, far, 100) == 100
    counters = underpass.counters()
    reason = "paused" if paused else "budget-bytes"
    left = counters.refused_total["send-room"]  # where net.core.wmem_max is as small as that
    assert counters.tcp_messages_total[reason] > 20 or (left and size > _most_set() / 3)


@pytest.mark.parametrize("address", [SERVER4, LOOPBACK], ids=["veth", "loopback"])
@pytest.mark.parametrize("paused", [False, True], ids=["over budget", "paused"])
def test_a_client_with_the_largest_buffer_leaves(
    bed: Bed, plane: MakePlane, address: str, *, paused: bool
) -> None:
    """Claim: where more waits in a buffer than can be outgrown, the client is not woken either."""
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, address)
    near.set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, _most_set())
    near.send(1, SHORT)
    far.receive(1, SHORT)
    underpass.set_paused(paused)
    assert _rounds_without(near, far, fewer(60), 16_000_000) == fewer(60)
    assert underpass.counters().refused_total["send-room"] == 1


def test_a_client_in_an_epoll_set_waits(bed: Bed, plane: MakePlane) -> None:
    """Claim: nor where a poll waits beside it, which alone is no reason to leave the mark."""
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, LOOPBACK)
    near.send(1, SHORT)
    far.receive(1, SHORT)
    assert _rounds_without(near, far, fewer(400), watched=True) == fewer(400)
    assert underpass.counters().tcp_messages_total["budget-bytes"] > 20


@pytest.mark.parametrize("address", [SERVER4, LOOPBACK], ids=["veth", "loopback"])
def test_a_client_with_little_unsent_waits(bed: Bed, plane: MakePlane, address: str) -> None:
    """Claim: nor where room depends on what is unsent, too (TCP_NOTSENT_LOWAT), which stays."""
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, address)
    near.set_option(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MIB)
    near.send(1, SHORT)
    far.receive(1, SHORT)
    underpass.set_paused(True)
    assert _rounds_without(near, far, 100) == 100
    assert underpass.counters().refused_total["send-room"] == 0


def test_a_forced_size_stays(bed: Bed, plane: MakePlane) -> None:
    """Claim: a buffer larger than anybody may ask for is not made smaller (SO_SNDBUFFORCE)."""
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, SERVER4)
    near.set_option(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * _most_set())
    near.send(1, SHORT)
    far.receive(1, SHORT)
    underpass.set_paused(True)
    answering = far.worker.submit(_answer, far.number, 5, 32_000_000)
    asked = near.worker.submit(_ask, near.number, 5, 32_000_000)
    assert asked.result(patient(60)) == 5
    answering.result(patient(40))
    assert near.option(socket.SOL_SOCKET, socket.SO_SNDBUF) == 4 * _most_set()


def _size_while_narrow(near: Remote, far: Remote, message: int = 65536) -> int:
    """Fill what may wait and more, so that TCP holds the sender; the size of its send buffer."""
    for _ in range(fewer(20)):  # within a spell
        near.fill(1, message, 64 * MIB, 0.1)
        far.receive(1, message)
    return near.option(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize(
    ("address", "message", "narrow"),
    [(SERVER4, 4096, 2 * 8190), (SERVER4, 65536, 65538), (LOOPBACK, 65536, 4 * 65483)],
    ids=["four segments", "a message", "four segments of loopback"],
)
def test_a_size_that_the_program_sets_stays(
    bed: Bed, plane: MakePlane, address: str, message: int, narrow: int
) -> None:
    """Claim: also one that it sets while we hold its send buffer narrow, but a whole message."""
    plane(SETTINGS)
    near, far = _coupled(bed, address)
    near.send(1, SHORT)
    far.receive(1, SHORT)
    assert _size_while_narrow(near, far, message) == min(narrow, _most_narrow())
    near.set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000)
    assert _size_while_narrow(near, far, message) == 120_000


def test_a_buffer_is_no_wider_than_tcp_would_make_it(bed: Bed, plane: MakePlane) -> None:
    """Claim: one that was narrow is widened as far as TCP goes by itself."""
    underpass = plane(SETTINGS)
    near, far = _coupled(bed, SERVER4)
    near.send(1, SHORT)
    far.receive(1, SHORT)
    narrow = _size_while_narrow(near, far)
    underpass.set_paused(True)
    sent = near.fill(1, SHORT, 0)
    far.receive(1, sent - SHORT - fewer(20) * 65536)
    for _ in range(20):
        sent += SHORT
        assert near.fill(1, SHORT, sent) == sent
        far.receive(1, SHORT)
    most = int(near.worker.call(_most_buffer))
    assert narrow < near.option(socket.SOL_SOCKET, socket.SO_SNDBUF) <= most


def _most_buffer() -> str:
    return Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2]


def _most_set() -> int:
    """The largest size of a send buffer that a program can ask for."""
    return int(Path("/proc/sys/net/core/wmem_max").read_text())


def _most_narrow() -> int:
    """The largest that it has in the map: a third less, and less by a segment (`resize`)."""
    return 2 * (min(_most_set(), 4 * MIB) // 3 * 2 - 40960 | 1)


def test_twin_that_rouses_readers(bed: Bed, plane: MakePlane) -> None:
    """Claim: woken for room, such a client's recv says EAGAIN; the test above would notice.

    Over veth so little is on its way that hardly any client sleeps before all has arrived.
    """
    underpass = plane(SETTINGS, Fault.ROUSING)
    near, far = _coupled(bed, LOOPBACK)
    assert _rounds_without(near, far, 3000) < 3000
    assert underpass.counters().tcp_messages_total["budget-bytes"] > 0
