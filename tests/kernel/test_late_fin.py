"""Readers that take a short read, or FIONREAD's zero, for the end once they are told of it."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _SOCKETS, Remote, couple, exchange
from tests.kernel.waiting import wait_until
from underpass import namespaces
from underpass.generation import Dataplane
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import KIB

ADDRESS = (SERVER4, 8080)
PART = 10 * KIB
_READ = 64 * KIB
_TCP_RTO_MAX_MS = 44
_WATCHERS: list[select.epoll] = []
_POLLERS: dict[int, select.poll | select.epoll] = {}
OVERTAKE = Path(__file__).with_name("overtake.c")


def _asked(number: int, kind: str) -> None:
    """The reader asks to be told of the end; by epoll once and for all, by poll with every call."""
    events = select.POLLIN | (select.POLLRDHUP if kind != "hang-up" else 0)
    poller = select.epoll() if kind.startswith("epoll") else select.poll()
    poller.register(_SOCKETS[number], events)
    _POLLERS[number] = poller
    poller.poll(0)


def _ask_for(number: int, events: int) -> None:
    _POLLERS[number].modify(_SOCKETS[number], events)


def _events(number: int, deadline: float) -> int:
    poller = _POLLERS[number]
    seconds = isinstance(poller, select.epoll)
    told = poller.poll(deadline if seconds else deadline * 1000)
    return told[0][1] if told else 0


def _read_as_haproxy(number: int, deadline: float) -> int:
    """Bytes until the end: a short read after one was told of is the last (so does libuv)."""
    taken = 0
    while told := _events(number, deadline):
        data = len(_SOCKETS[number].recv(_READ))
        taken += data
        if not data or (data < _READ and told & (select.POLLRDHUP | select.POLLHUP)):
            break
    return taken


def _waiting(number: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(_SOCKETS[number], termios.FIONREAD, b"four"))[0]
    return count


def _read_as_stunnel(number: int, deadline: float) -> int:
    """Bytes until the end: POLLRDHUP with FIONREAD 0 is that."""
    taken = 0
    while told := _events(number, deadline):
        if told & select.POLLRDHUP and not _waiting(number):
            break
        taken += len(_SOCKETS[number].recv(KIB))
    return taken


def _read_all(number: int) -> int:
    taken = 0
    while data := len(_SOCKETS[number].recv(_READ)):
        taken += data
    return taken


def _watch_often(number: int) -> None:
    for _ in range(20):  # of more than 8 it is not known who sleeps
        watcher = select.epoll()
        watcher.register(_SOCKETS[number], select.EPOLLIN)
        _WATCHERS.append(watcher)


def _send_the_last(number: int, size: int) -> None:
    """The bytes and the FIN in one packet."""
    _SOCKETS[number].send(bytes(size), socket.MSG_MORE)
    _SOCKETS[number].shutdown(socket.SHUT_WR)


def _cross_the_border(underpass: Dataplane, near: Remote) -> None:
    """Bytes by the shortcut, bytes by TCP behind them, and the end of file."""
    near.send(1, PART)
    underpass.set_paused(True)
    near.send(1, PART)
    near.shut()
    wait_until(lambda: near.queues()[0] <= 1, "all but the FIN is acknowledged")


def _close_at_the_border(underpass: Dataplane, near: Remote, last: int) -> None:
    """The same, by who is gone then; `last` bytes come with the end."""
    near.send(1, PART)
    underpass.set_paused(True)
    near.send(1, PART)
    if last:
        near.worker.call(_send_the_last, near.number, last)
    near.close()


def _taken_at_the_border(bed: Bed, underpass: Dataplane, kind: str) -> int:
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    far.worker.call(_asked, far.number, kind)
    if kind == "hang-up":  # told to all who have shut down their own side
        near.send(1, PART)
        far.shut()
        underpass.set_paused(True)
        near.send(1, PART)
        near.shut()
    else:
        if kind == "epoll, later":  # as who has no room for more
            far.worker.call(_ask_for, far.number, 0)
        _cross_the_border(underpass, near)
    time.sleep(0.3)  # the FIN comes again meanwhile
    if kind == "epoll, later":
        far.worker.call(_ask_for, far.number, select.EPOLLIN | select.EPOLLRDHUP)
    return far.worker.call(_read_as_haproxy, far.number, patient(30))


KINDS = ("poll", "epoll", "epoll, later", "hang-up")


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_read_at_the_border_is_not_the_last(bed: Bed, plane: MakePlane, kind: str) -> None:
    """Claim: nobody who asks for it is told of the end before having come past the border."""
    assert _taken_at_the_border(bed, plane(UNGUARDED), kind) == 2 * PART


@pytest.mark.parametrize("kind", KINDS)
def test_twin_that_tells_of_it_at_once(bed: Bed, plane: MakePlane, kind: str) -> None:
    """Claim: told at once, such a reader loses what came by TCP; the test above would notice."""
    assert _taken_at_the_border(bed, plane(UNGUARDED, Fault.EARLY_FIN), kind) == PART


def test_who_only_reads_does_not_depend_on_the_sender(bed: Bed, plane: MakePlane) -> None:
    """Claim: without EPOLLRDHUP the end is in at once, also at the border; a sender may go."""
    underpass = plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    _cross_the_border(underpass, near)
    wait_until(lambda: near.queues()[0] == 0, "the FIN is acknowledged though bytes wait")
    bed.within("client", "ip", "link", "del", "eth0")
    far.receive(1, PART)
    far.receive(1, PART)
    far.expect_eof()


def test_a_sender_that_gives_up_soon_is_not_kept_waiting(bed: Bed, plane: MakePlane) -> None:
    """Claim: with TCP_USER_TIMEOUT the end comes in time, and with it what its packet carries."""
    underpass = plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    near.set_option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, struct.pack("i", 2000))
    far.worker.call(_asked, far.number, "poll")
    _close_at_the_border(underpass, near, KIB)
    time.sleep(4)  # its timer has ended what was not acknowledged
    assert far.worker.call(_read_all, far.number) == 2 * PART + KIB


def _answer_and_read(number: int) -> tuple[int, bool]:
    """Write at the first bytes, then read: what was taken, and whether the end of file came."""
    sock = _SOCKETS[number]
    sock.settimeout(patient(15))
    taken = len(sock.recv(KIB))
    sock.send(bytes(100))
    time.sleep(0.5)  # the sender has answered
    try:
        return taken + _read_all(number), True
    except ConnectionError:
        return taken, False


def _taken_by_who_answers(bed: Bed, underpass: Dataplane, last: int) -> tuple[int, bool]:
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    far.worker.call(_asked, far.number, "epoll")
    _close_at_the_border(underpass, near, last)
    return far.worker.call(_answer_and_read, far.number)


@pytest.mark.parametrize("last", [0, KIB])
def test_who_answers_before_the_end_loses_nothing(bed: Bed, plane: MakePlane, last: int) -> None:
    """Claim: what a reader writes while the end waits brings no reset before it, as natively."""
    taken = _taken_by_who_answers(bed, plane(UNGUARDED), last)
    assert taken == (2 * PART + last, True)


def test_twin_that_resets_at_once(bed: Bed, plane: MakePlane) -> None:
    """Claim: answered at once, such a writer has a reset for the end; the test above notices."""
    assert not _taken_by_who_answers(bed, plane(UNGUARDED, Fault.EARLY_RESET), KIB)[1]


@pytest.mark.skipif(namespaces.kernel_version() < (6, 15), reason="TCP_RTO_MAX_MS is younger")
def test_a_timer_that_is_kept_short(bed: Bed, plane: MakePlane) -> None:
    """Claim: a sender that gives up soon for its own TCP_RTO_MAX_MS is not kept waiting either."""
    underpass = plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    near.set_option(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, struct.pack("i", 1000))
    far.worker.call(_asked, far.number, "poll")
    _close_at_the_border(underpass, near, KIB)
    time.sleep(6)  # it has given up
    assert far.worker.call(_read_all, far.number) == 2 * PART + KIB


def test_many_waiters_are_no_doubt(bed: Bed, plane: MakePlane) -> None:
    """Claim: a sender's socket that twenty epolls watch does not keep its end of file back."""
    plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    near.worker.call(_watch_often, near.number)
    near.shut()
    wait_until(lambda: near.queues()[0] == 0, "the FIN is acknowledged", 10)
    far.expect_eof()


def _counts_tcp(underpass: Dataplane, near: Remote, far: Remote) -> bool:
    """Does FIONREAD tell of bytes that came by TCP?"""
    underpass.set_paused(True)
    near.send(3, PART)
    wait_until(lambda: near.queues()[0] == 0, "all is acknowledged")
    told = far.worker.call(_waiting, far.number)
    far.receive(3, PART)
    underpass.set_paused(False)
    exchange(near, far, 3)
    return told > 0


def _taken_by_count(bed: Bed, underpass: Dataplane) -> tuple[int, bool]:
    """What such a reader has taken of bytes by both ways, and whether FIONREAD told all of them."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    far.worker.call(_asked, far.number, "poll")
    far.worker.call(_waiting, far.number)  # as any program that does so has done before
    near.send(3, PART)
    by_shortcut = far.worker.call(_waiting, far.number)
    far.receive(3, PART)
    by_tcp = _counts_tcp(underpass, near, far)
    near.send(3, PART)
    if by_shortcut:
        far.receive(3, PART)
        underpass.set_paused(True)
        near.send(3, PART)
    near.shut()
    time.sleep(0.3)  # the FIN comes again meanwhile
    taken = far.worker.call(_read_as_stunnel, far.number, patient(30))
    return taken, by_tcp and by_shortcut > 0


def test_a_count_of_nothing_is_not_the_end(bed: Bed, plane: MakePlane) -> None:
    """Claim: where FIONREAD misses bytes of sockets in the map, who asks it sees the end last."""
    assert _taken_by_count(bed, plane(UNGUARDED))[0] == PART


def test_twin_for_those_who_count(bed: Bed, plane: MakePlane) -> None:
    """Claim: told at once, such a reader takes nothing; the test above would notice."""
    taken, right = _taken_by_count(bed, plane(UNGUARDED, Fault.EARLY_FIN))
    if right:
        pytest.skip("FIONREAD of this kernel counts all bytes")
    assert taken == 0


def _taken_of_the_last(bed: Bed, underpass: Dataplane) -> tuple[int, bool]:
    """What a reader that asks FIONREAD takes of what comes with the FIN; does that tell of it?"""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 3)
    far.worker.call(_asked, far.number, "poll")
    right = _counts_tcp(underpass, near, far)
    reading = far.worker.submit(_read_as_stunnel, far.number, patient(30))
    time.sleep(0.1)  # it sleeps
    underpass.set_paused(True)
    near.worker.call(_send_the_last, near.number, KIB)
    return reading.result(patient(40)), right


def test_bytes_in_the_last_packet_count(bed: Bed, plane: MakePlane) -> None:
    """Claim: who asks FIONREAD takes also what comes with the FIN itself."""
    assert _taken_of_the_last(bed, plane(UNGUARDED))[0] == KIB


def test_twin_for_the_last_packet(bed: Bed, plane: MakePlane) -> None:
    """Claim: a reader that stays in the map takes nothing, where its FIONREAD misses TCP bytes."""
    taken, right = _taken_of_the_last(bed, plane(UNGUARDED, Fault.EARLY_FIN))
    assert taken == (KIB if right else 0)


def _run(program: str, *words: str) -> str:
    return subprocess.run(
        [program, *words], capture_output=True, text=True, check=True, timeout=patient(100)
    ).stdout


def _overtakes(bed: Bed, directory: Path, rounds: int) -> bool:
    """Whether a reader sees the end before bytes whose send() succeeded, in one of the rounds."""
    program = directory / "overtake"
    build: list[str | Path] = [
        "clang",
        "-O1",
        "-Wall",
        "-Werror",
        "-pthread",
        "-o",
        program,
        OVERTAKE,
    ]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return bed.worker("client").call(_run, str(program), str(rounds)) == "1\n"


def test_an_end_of_file_waits_for_a_send(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: what one thread has sent comes before the end that another's shutdown makes."""
    underpass = plane(UNGUARDED)
    assert not _overtakes(bed, tmp_path, 300)
    assert underpass.counters().shortcut_messages_total > 300


def test_twin_whose_end_overtakes(bed: Bed, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: told at once, such an end overtakes the last message; the test above would notice."""
    plane(UNGUARDED, Fault.EARLY_FIN)
    assert _overtakes(bed, tmp_path, 5000)


def test_an_end_of_file_comes_at_once_where_it_may(bed: Bed, plane: MakePlane) -> None:
    """Claim: with bytes of one queue before it, or none, nothing waits: no packet is sent again."""
    plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    near.send(1, PART)
    near.shut()
    wait_until(lambda: near.queues()[0] == 0, "the FIN is acknowledged though bytes wait")
    far.receive(1, PART)
    far.expect_eof()
