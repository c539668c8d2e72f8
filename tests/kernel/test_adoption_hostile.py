"""Attacks on `adopt`: hidden readers, interrupts at bad moments."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.kernel import absent
from tests.kernel.adopting import (
    ADDRESS,
    drink,
    goes_by_the_shortcut,
    hear_once,
    in_flight,
    program,
    pump,
    reasons,
    say,
)
from tests.kernel.bed import NETNS, UNGUARDED, Bed
from tests.kernel.commands import command, finish, start
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _SOCKETS, Remote, couple, exchange, listen
from tests.kernel.traffic import Load
from tests.kernel.waiting import holds_for, wait_until
from underpass import adoption, dataplane, holders, libbpf, namespaces, pinning
from underpass.abi import Step
from underpass.adoption import Couple
from underpass.errors import UnderpassError
from underpass.model import Fault, Rule
from underpass.namespaces import NetNamespace
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB

T = TypeVar("T")

pytestmark = pytest.mark.skipif(
    not adoption.possible(), reason="callbacks cannot be set on open sockets here"
)

# -- readers that could be overlooked ---------------------------------------------------------

PAGES = pytest.mark.skipif(absent.why_not() is not None, reason=str(absent.why_not()))


def _awaits_a_lock(end: Remote) -> bool:
    """Whether a thread of its worker waits for a socket's lock."""
    tasks = Path(f"/proc/{end.worker.pid}/task").iterdir()
    return any("lock_sock" in (task / "wchan").read_text() for task in tasks)


def _spoken_to_beside_a_writer(
    bed: Bed, plane: MakePlane, faults: Fault = Fault(0)
) -> tuple[Remote, Future[int], int]:
    """One thread sleeps in native recv and another is inside send, awake, as the peer speaks.

    Who reads at the far end holds its lock, since the page that it copies to is not there yet. The
    speaker waits for that lock, and behind it the writer, who has let go of its own to redirect.

    Returns:
        The end with both, what its reader will have read, how many messages were redirected to it.
    """
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    reading = near.worker.submit(hear_once, near.number)
    wait_until(near.sleeps_in_recv, "a thread sleeps in recv")
    underpass = plane(faults=faults | Fault.SLEEPY)  # or nobody would wait for a lock
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
    page = absent.absent_page(far.worker)
    page.submit_read(far, 1, KIB)
    wait_until(far.sleeps_in_recv, "its reader waits")
    near.send(1, KIB)
    page.wait_touched()
    speaking = far.worker.submit(say, far.number, bytes(KIB))
    wait_until(lambda: _awaits_a_lock(far), "the speaker waits")
    writing = near.submit_send(1, KIB)
    wait_until(lambda: _awaits_a_lock(near), "the writer waits")
    page.provide()
    for one in (speaking, writing):
        one.result(patient(20))
    (pair,) = underpass.pairs()
    assert pair.client_to_server.shortcut_messages == 2
    return near, reading, pair.server_to_client.shortcut_messages


@PAGES
def test_a_writer_does_not_hide_a_reader(bed: Bed, plane: MakePlane) -> None:
    """Claim: a thread asleep in native recv is woken, also while another one writes beside it."""
    _, reading, redirected = _spoken_to_beside_a_writer(bed, plane)
    assert redirected == 0
    assert reading.result(patient(20)) == KIB


@PAGES
def test_twin_that_is_blind(bed: Bed, plane: MakePlane) -> None:
    """Claim: a reader that is overlooked sleeps on, and the test above would notice."""
    near, reading, redirected = _spoken_to_beside_a_writer(bed, plane, Fault.BLIND_READER)
    assert redirected == 1
    assert holds_for(lambda: not reading.done(), 0.5)
    assert near.sleeps_in_recv()


@PAGES
def test_a_thread_that_waits_for_the_lock_has_not_rested(bed: Bed) -> None:
    """Claim: one that sleeps in recv is elsewhere, one that sleeps on its way there is not."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    page = absent.absent_page(near.worker)

    def rests() -> bool:
        return not holders.restless([near.worker.pid], 0.2, lambda _: False)

    holding = page.submit_read(near, 1, KIB)
    far.send(1, KIB)
    page.wait_touched()
    wait_until(rests, "all threads of the worker sleep")
    reading = near.worker.submit(hear_once, near.number)
    wait_until(lambda: _awaits_a_lock(near), "a thread waits for the socket's lock")
    assert not rests()
    page.provide()
    holding.result(patient(20))
    wait_until(near.sleeps_in_recv, "it sleeps in recv")
    wait_until(rests, "it has rested")
    far.send(1, KIB)
    assert reading.result(patient(20)) == KIB


# -- bytes that wait -----------------------------------------------------------------------------


def _adopted_before_all_is_read(
    bed: Bed, plane: MakePlane, faults: Fault = Fault(0)
) -> tuple[list[str], int]:
    """Bytes that came by TCP wait, acknowledged, as their socket is adopted.

    Returns:
        What became of the connection, and what FIONREAD says to its reader then.
    """
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    plane(faults=faults)  # as for a kernel that miscounts
    near.send(1, KIB)
    wait_until(lambda: near.queues()[0] == 0, "all is acknowledged")
    outcomes = reasons(adoption.adopt(bed.pins))
    return outcomes, far.worker.call(_waiting, far.number)


def _waiting(number: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(_SOCKETS[number], termios.FIONREAD, b"four"))[0]
    return count


def test_a_socket_with_bytes_that_wait_is_not_taken_in(bed: Bed, plane: MakePlane) -> None:
    """Claim: where FIONREAD misses TCP bytes of sockets in the map, none enters that has such.

    Another pass is worth it soon: they are read by then, as a rule.
    """
    assert _adopted_before_all_is_read(bed, plane) == (["tcp-unread"], KIB)
    assert adoption.again(adoption.adopt(bed.pins)) == 0


def test_twin_that_takes_it_in(bed: Bed, plane: MakePlane) -> None:
    """Claim: one that is taken in is told of no bytes, on such a kernel, and may wait for ever."""
    outcomes, waiting = _adopted_before_all_is_read(bed, plane, Fault.LATE_EVENT)
    assert outcomes == ["shortcut"]
    if waiting:
        pytest.skip("this kernel counts them")


# -- giving up leaves nothing behind ----------------------------------------------------------

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
)
_EVENTS: dict[int, select.epoll] = {}


def _before_it_sees(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something while the two ends are in the map and not paired yet."""
    see = adoption._Pass._see

    def instead(self: adoption._Pass, inside: list[Couple]) -> list[Couple]:
        act()
        return see(self, inside)

    patch.setattr(adoption._Pass, "_see", instead)


def test_given_up_what_was_set_is_put_back(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a pass that comes to nothing leaves the program's options as they were."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)

    def options() -> list[int]:
        return [near.option(*name) for name in _KEEPALIVE]

    def arrive() -> None:
        far.send(2, KIB)
        wait_until(lambda: options() != before, "the options are borrowed")

    before = options()
    underpass = plane()
    _before_it_sees(monkeypatch, arrive)
    with in_flight(near):
        assert reasons(adoption.adopt(bed.pins)) == ["reader-waits-for-tcp"]
    assert underpass.endpoints() == []
    assert options() == before
    near.receive(2, KIB)
    exchange(near, far, 1)


def _await_edges(number: int) -> None:
    _SOCKETS[number].setblocking(False)
    _EVENTS[number] = select.epoll()
    _EVENTS[number].register(_SOCKETS[number], select.EPOLLIN | select.EPOLLET)


def _read_by_edges(number: int, size: int, deadline: float) -> int:
    """Reads as nginx does: until FIONREAD says that nothing is left, then waits for an event."""
    sock, got = _SOCKETS[number], 0
    while got < size and _EVENTS[number].poll(deadline):
        with contextlib.suppress(BlockingIOError):
            while True:
                got += len(sock.recv(KIB))
                if not struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]:
                    break
    return got


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_reader_by_edges_is_woken(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    """Claim: bytes that came while it was in the map, unpaired, are read; it may give up or not."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    near.worker.call(_await_edges, near.number)
    reading = near.worker.submit(_read_by_edges, near.number, 8 * KIB, patient(20))
    plane()

    def arrive() -> None:
        far.worker.call(say, far.number, bytes(8 * KIB))
        wait_until(
            lambda: far.queues()[0] == 0 and near.queues()[1] < 8 * KIB, "it has read what it sees"
        )

    _before_it_sees(monkeypatch, arrive)
    with in_flight(near) if gives_up else contextlib.nullcontext():
        found = reasons(adoption.adopt(bed.pins))
    assert found == ["reader-waits-for-tcp" if gives_up else "shortcut"]
    assert reading.result(patient(30)) == 8 * KIB


def test_given_up_though_it_is_busy(bed: Bed, plane: MakePlane) -> None:
    """Claim: what is not taken in does not stay in the map, however busy it is."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    ends = [(near, far), (far, near)]
    busy = [a.worker.submit(pump, a.number, KIB) for a, _ in ends for _ in range(3)]
    busy += [b.worker.submit(drink, b.number) for _, b in ends for _ in range(3)]
    underpass = plane()
    with in_flight(near):
        for _ in range(4):
            # none at all is found while a call still holds what it had in the map
            assert "shortcut" not in reasons(adoption.adopt(bed.pins, first_wait=0))
            assert underpass.endpoints() == []
    near.shut()
    far.shut()
    for one in busy:
        one.result(patient(20))


# -- interrupted and killed -------------------------------------------------------------------

NAMESPACE = pytest.mark.parametrize("paired", ["client", "server"])


def _interrupt_at(patch: pytest.MonkeyPatch, at: Step, only: str | None = None) -> None:
    """Interrupt passes after a step that only the ends in one namespace may have taken."""
    real = adoption._Pass._step

    def step(
        self: adoption._Pass, some: list[Couple], which: Step, tells: bool = True
    ) -> list[Couple]:
        if only and which == at:
            self.netns = dict.fromkeys(self.netns, (NETNS / only).stat().st_ino)
        agreed = real(self, some, which, tells)
        if some and which == at:
            raise KeyboardInterrupt
        return agreed

    patch.setattr(adoption._Pass, "_step", step)


def test_interrupted_as_it_enters(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: Ctrl-C in the step that enters leaves nothing in the map."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    _interrupt_at(monkeypatch, Step.ENTER)
    with pytest.raises(KeyboardInterrupt):
        adoption.adopt(bed.pins)
    assert underpass.endpoints() == []
    assert underpass.leftovers()["orders"] == 0
    exchange(near, far, 1)


def test_interrupted_while_it_pairs(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: Ctrl-C between the two namespaces of the last step makes no byte wrong."""
    load = Load(bed)
    load.start(3)
    load.wait_moves(MIB)
    underpass = plane(UNGUARDED)
    (name,) = UNGUARDED.allow
    interrupted = 0

    def all_in() -> bool:
        nonlocal interrupted
        try:
            adoption.adopt(bed.pins, first_wait=0)
        except KeyboardInterrupt:
            interrupted += 1
        return underpass.open_pairs() == 3

    for paired in ("client", "server"):
        with monkeypatch.context() as patch:
            _interrupt_at(patch, Step.PAIR, bed.netns[paired])
            wait_until(all_in, "all are taken in", 60)
        load.wait_moves(MIB)
        dataplane.set_rule(bed.pins, name, Rule.DENY)
        wait_until(lambda: underpass.endpoints() == [], "all leave")
        dataplane.set_rule(bed.pins, name, Rule.ALLOW)
    assert interrupted >= 2
    load.stop_and_check()


def test_interrupted_between_the_two_orders_of_a_pair(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: neither end is paired then, though one speaks while the pass takes all back."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    underpass = plane()
    update, in_namespace = libbpf.update, namespaces.in_namespace
    ordered = 0

    def torn(fd: int, key: Any, value: Any, **more: Any) -> bool:
        nonlocal ordered
        if getattr(value, "step", None) == Step.PAIR and ordered < 2:
            ordered += 1
            if ordered == 2:
                raise KeyboardInterrupt
        return update(fd, key, value, **more)

    def taken_back(place: NetNamespace, act: Callable[[], T]) -> T | None:
        done = in_namespace(place, act)
        if ordered == 2 and place.label == bed.netns["client"]:
            near.send(1, KIB)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(libbpf, "update", torn)
        patch.setattr(namespaces, "in_namespace", taken_back)
        with pytest.raises(KeyboardInterrupt):
            adoption.adopt(bed.pins)
    assert ordered == 2
    assert underpass.endpoints() == []
    far.receive(1, KIB)
    exchange(near, far, 1)


@NAMESPACE
def test_killed_between_the_namespaces_of_the_last_step(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch, paired: str
) -> None:
    """Claim: the next pass completes the pair, whichever end had been paired."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    with monkeypatch.context() as patch:
        _interrupt_at(patch, Step.PAIR, bed.netns[paired])
        patch.setattr(adoption._Pass, "_clear", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            adoption.adopt(bed.pins)
    (one,) = [end.local_port for end in underpass.endpoints() if end.peer]
    assert (one == ADDRESS[1]) == (paired == "server")
    exchange(near, far, 1)
    adoption.adopt(bed.pins, first_wait=0)
    assert underpass.open_pairs() == 1
    assert underpass.leftovers()["orders"] == 0
    goes_by_the_shortcut(underpass, near, far)


def test_every_goes_on_beside_other_commands(bed: Bed, plane: MakePlane) -> None:
    """Claim: `adopt --every` works beside an `up` or `down`, and outlives another pass."""
    couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    with contextlib.ExitStack() as held:
        held.enter_context(pinning.locked(bed.pins))
        going = start(command(bed.pins, "adopt", "--every", "0.1"))
        wait_until(lambda: underpass.open_pairs() == 1, "it takes one in")
        assert going.stdout
        assert "1 open connection taken in" in going.stdout.readline()

        def alone() -> bool:
            with contextlib.suppress(UnderpassError):
                held.enter_context(pinning.alone(bed.pins))
                return True
            return False

        wait_until(alone, "a pass of our own")
        assert going.stderr
        for _ in range(2):
            assert "another pass is at work" in going.stderr.readline()
    assert going.poll() is None
    going.terminate()
    assert finish(going).code == 0


# -- references that cancel out ---------------------------------------------------------------

#: One of its references nobody is to see. Descriptors that two processes have in common count
#: twice; a thread with descriptors of its own makes a call hold no reference: either hides it.
_HIDES_ONE = """
import ctypes, os, platform, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
CLONE_FILES, SIGCHLD = 0x400, 17
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
flying = socket.socketpair(socket.AF_UNIX)
socket.send_fds(flying[0], [b"x"], [sock.fileno()])
own = threading.Event()
def unshare():
    libc.unshare(CLONE_FILES)
    os.close(sock.fileno())
    own.set()
    threading.Event().wait()
if sys.argv[3] == "shared" and not libc.syscall(CLONE, CLONE_FILES | SIGCHLD, 0, 0, 0, 0):
    threading.Event().wait()
if sys.argv[3] == "unshared":
    threading.Thread(target=unshare, daemon=True).start()
    own.wait()
print(flush=True)
if sys.argv[3] == "shared":
    threading.Event().wait()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 20000))
while True:
    try: sock.recv(10)
    except BlockingIOError: pass
"""


@pytest.mark.parametrize("how", ["plain", "shared", "unshared"])
def test_references_that_cancel_out(bed: Bed, plane: MakePlane, how: str) -> None:
    """Claim: a holder that is not to be seen keeps it on TCP, also where others are miscounted."""
    listener = listen(bed.worker("server"), ADDRESS)
    with program(bed, "client", _HIDES_ONE, how) as running:
        listener.accept()
        assert running.stdout
        assert running.stdout.readline()
        plane()
        assert reasons(adoption.adopt(bed.pins)) == ["reader-waits-for-tcp"]
