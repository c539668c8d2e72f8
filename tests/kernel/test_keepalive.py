"""Keepalive options, which underpass borrows while TCP bytes wait on an endpoint, come back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import holds_for, wait_until
from underpass import dataplane, namespaces
from underpass.dataplane import Dataplane
from underpass.model import Fault
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB

Values = tuple[int, int, int, int, int]
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
)
OWN_VALUES: Values = (1, 300, 20, 5, 30000)
OWN = pytest.mark.parametrize("own", [None, OWN_VALUES], ids=["keepalive off", "own values"])
SHUTS = pytest.mark.skipif(
    namespaces.kernel_version() < (6, 6),
    reason="a window that was offered stays open, and bytes are dropped (e2142825c120)",
)
_SIZE = 1000


def _values(end: Remote) -> Values:
    on, idle, interval, count, timeout = (end.option(*option) for option in OPTIONS)
    return on, idle, interval, count, timeout


def _borrowed(bed: Bed, underpass: Dataplane, own: Values | None) -> tuple[Remote, Remote, Values]:
    """Both ends of a pair and the server's own options, changed now: TCP bytes wait for it."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    for option, value in zip(OPTIONS, own or (), strict=False):
        far.set_option(*option, value)
    values = _values(far)
    assert own in {None, values}
    underpass.set_paused(True)
    near.send(1, _SIZE)
    wait_until(lambda: _values(far) != values, "the options are borrowed", 5)
    return near, far, values


def _wait_for(near: Remote, far: Remote, own: tuple[int, ...]) -> None:
    """Until `far` has these options; only with a message does its socket build a packet soon."""

    def back() -> bool:
        far.send(2, 10)
        near.receive(2, 10)
        return _values(far) == own

    wait_until(back, f"{own} are set", 5)


@OWN
def test_options_come_back_once_all_is_read(bed: Bed, plane: MakePlane, own: Values | None) -> None:
    """Claim: when what waited by TCP is read, all five options are soon what they were."""
    near, far, values = _borrowed(bed, plane(), own)
    far.receive(1, _SIZE)
    wait_until(lambda: _values(far) == values, f"{values} are back", 5)
    exchange(near, far, 1)


@pytest.mark.parametrize(("changed", "value"), [(1, 77), (2, 77), (3, 77), (4, 77), (4, 0)])
def test_what_a_program_sets_meanwhile_stays(
    bed: Bed, plane: MakePlane, changed: int, value: int
) -> None:
    """Claim: and the other options come back, keepalive's own switch, too."""
    near, far, values = _borrowed(bed, plane(), (0, *OWN_VALUES[1:]))
    far.set_option(*OPTIONS[changed], value)
    far.receive(1, _SIZE)
    _wait_for(near, far, (*values[:changed], value, *values[changed + 1 :]))


@OWN
def test_options_come_back_with_down(bed: Bed, plane: MakePlane, own: Values | None) -> None:
    """Claim: after `down` all five options are what they were, even where TCP bytes still wait."""
    near, far, values = _borrowed(bed, plane(), own)
    assert dataplane.down(bed.pins) == []
    assert _values(far) == values
    far.receive(1, _SIZE)
    exchange(near, far, 1)


@contextlib.contextmanager
def _talk(near: Remote, far: Remote) -> Iterator[None]:
    """Meanwhile one sends, again and again, to the other's thread that sleeps in a read."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(0.05):
            reading = far.submit_read(1, _SIZE, patient(20))
            wait_until(far.sleeps_in_recv, "a thread sleeps in recv")
            over.wait(0.1)
            near.send(1, _SIZE)
            reading.result(patient(20))

    with ThreadPoolExecutor(1) as pool:
        speaking = pool.submit(speak)
        try:
            yield
        finally:
            over.set()
        speaking.result()


@OWN
def test_options_come_back_under_a_sleeping_reader(
    bed: Bed, plane: MakePlane, own: Values | None
) -> None:
    """Claim: after `down` they are what they were, though a thread slept in a read meanwhile."""
    near, far, values = _borrowed(bed, plane(), own)
    far.receive(1, _SIZE)
    with _talk(near, far):
        assert dataplane.down(bed.pins) == []
    assert _values(far) == values
    exchange(near, far, 1)


def _stalled(bed: Bed, underpass: Dataplane) -> tuple[Remote, Remote, int]:
    """A reader that does not read, with more for it than budget and window take; how much."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    sent = near.fill(1, 64 * KIB, 64 * MIB)
    assert underpass.counters().tcp_messages_total["budget-bytes"]
    assert near.queues()[0], "the window holds something back"
    return near, far, sent


@SHUTS
def test_no_tick_while_the_window_is_shut(bed: Bed, plane: MakePlane) -> None:
    """Claim: then the sender's probes are packets enough, and the next of its bytes come at once.

    A keepalive probe would tell of the room that redirected bytes leave as they are read, in vain,
    and the reader would not tell again: its sender waited for its own next probe.
    """
    near, far, sent = _stalled(bed, plane(UNGUARDED))
    wait_until(lambda: not _values(far)[0], "no timer of ours runs")
    assert holds_for(lambda: not _values(far)[0], 1.5)
    far.receive(1, sent)
    exchange(near, far, 1)


@SHUTS
def test_twin_that_ticks_all_the_same(bed: Bed, plane: MakePlane) -> None:
    """Claim: without the look at the window the timer runs, and the test above would notice."""
    near, far, sent = _stalled(bed, plane(UNGUARDED, Fault.VAIN_PROBE))
    wait_until(lambda: _values(far)[0], "the timer runs")
    assert holds_for(lambda: bool(_values(far)[0]), 1.5)
    far.receive(1, sent)
    exchange(near, far, 1)


def test_what_the_program_sets_meanwhile_stays(bed: Bed, plane: MakePlane) -> None:
    """Claim: keepalive that a program sets while underpass uses it is the program's, and stays."""
    near, far, (_, _, interval, count, timeout) = _borrowed(bed, plane(), None)
    own = (1, 33, interval, count, timeout)
    for option, value in zip(OPTIONS[:2], own[:2], strict=True):
        far.set_option(*option, value)
    far.receive(1, _SIZE)
    _wait_for(near, far, own)


@pytest.mark.parametrize("on", [True, False], ids=["on", "on and off again"])
def test_keepalive_alone_that_is_switched_meanwhile(
    bed: Bed, plane: MakePlane, *, on: bool
) -> None:
    """Claim: SO_KEEPALIVE stays as the program set it, though it was on for our sake already."""
    near, far, values = _borrowed(bed, plane(), None)
    own = (int(on), *values[1:])
    far.set_option(*OPTIONS[0], 1)
    if not on:
        far.set_option(*OPTIONS[0], 0)
    far.receive(1, _SIZE)
    _wait_for(near, far, own)


def test_no_timeout_of_the_program_ends_it_meanwhile(bed: Bed, plane: MakePlane) -> None:
    """Claim: probes that underpass sends are not held against TCP_USER_TIMEOUT of the program."""
    _, far, _ = _borrowed(bed, plane(), OWN_VALUES)
    wait_until(lambda: _values(far)[4] > 10 * OWN_VALUES[4], "it is set aside", 5)
