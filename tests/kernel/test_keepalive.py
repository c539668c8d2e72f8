"""Keepalive options, which underpass borrows while TCP bytes wait on an endpoint, come back."""

from __future__ import annotations

import socket

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import wait_until
from underpass import dataplane
from underpass.dataplane import Dataplane

Values = tuple[int, int, int, int]
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
)
OWN_VALUES: Values = (1, 300, 20, 5)
OWN = pytest.mark.parametrize("own", [None, OWN_VALUES], ids=["keepalive off", "own values"])
_SIZE = 1000


def _values(end: Remote) -> Values:
    on, idle, interval, count = (end.option(*option) for option in OPTIONS)
    return on, idle, interval, count


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


@OWN
def test_options_come_back_once_all_is_read(bed: Bed, plane: MakePlane, own: Values | None) -> None:
    """Claim: when what waited by TCP is read, all four options are soon what they were."""
    near, far, values = _borrowed(bed, plane(), own)
    far.receive(1, _SIZE)
    wait_until(lambda: _values(far) == values, f"{values} are back", 5)
    exchange(near, far, 1)


@OWN
def test_options_come_back_with_down(bed: Bed, plane: MakePlane, own: Values | None) -> None:
    """Claim: after `down` all four options are what they were, even where TCP bytes still wait."""
    near, far, values = _borrowed(bed, plane(), own)
    assert dataplane.down(bed.pins) == []
    assert _values(far) == values
    far.receive(1, _SIZE)
    exchange(near, far, 1)


def test_what_the_program_sets_meanwhile_stays(bed: Bed, plane: MakePlane) -> None:
    """Claim: keepalive that a program sets while underpass uses it is the program's, and stays."""
    near, far, (_, _, interval, count) = _borrowed(bed, plane(), None)
    own = (1, 33, interval, count)
    for option, value in zip(OPTIONS[:2], own[:2], strict=True):
        far.set_option(*option, value)
    far.receive(1, _SIZE)

    def back() -> bool:
        # with an idle time of 33 s only a message makes the socket build a packet soon
        far.send(2, 10)
        near.receive(2, 10)
        return _values(far) == own

    wait_until(back, f"{own} are set", 5)
