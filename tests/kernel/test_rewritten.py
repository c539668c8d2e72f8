"""Streams that NAT rewrites on the way: all later numbers are shifted."""

from __future__ import annotations

import pytest

from tests.kernel.adopting import hear, hear_line, reasons, say
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple
from tests.kernel.waiting import wait_until
from underpass import adoption, dataplane
from underpass.model import Fault

pytestmark = pytest.mark.skipif(
    not adoption.possible(),
    reason="seen on Linux 6.1: NAT with the FTP helper answers no SYN there",
)

_SERVICE = ("10.199.200.1", 21)


def _ftp(bed: Bed) -> tuple[Remote, Remote]:
    """Both ends of a connection in which NAT rewrites addresses, as it does for FTP."""
    rule = f"PREROUTING -p tcp -d {_SERVICE[0]} --dport 21 -j"
    for words in (
        f"-t raw -A {rule} CT --helper ftp",
        f"-t nat -A {rule} DNAT --to-destination {SERVER4}:21",
    ):
        bed.within("router", "iptables", *words.split())
    return couple(bed.worker("client"), bed.worker("server"), _SERVICE, listen_on=(SERVER4, 21))


def _lengthen(near: Remote, far: Remote) -> None:
    """Say a line by TCP that NAT makes three bytes longer, which shifts all later numbers."""
    for line in (b"220 ready\r\n", b"227 Entering Passive Mode (10,77,0,2,10,1).\r\n"):
        far.worker.call(say, far.number, line)
        heard = near.worker.call(hear_line, near.number)
    if heard == line:
        pytest.skip("this kernel does not rewrite FTP (nf_nat_ftp)")
    assert len(heard) == len(line) + 3


def _say_in_two(near: Remote, far: Remote) -> bytes:
    """Say "abc", which waits unread, then "defghi"; what is heard."""
    far.worker.call(say, far.number, b"abc")
    wait_until(lambda: near.queues()[1] == 3, "three bytes wait")
    far.worker.call(say, far.number, b"defghi")
    return near.worker.call(hear, near.number, 9)


def test_adopted_after_a_line_was_lengthened(bed: Bed, plane: MakePlane) -> None:
    """Claim: a stream that NAT has rewritten is not taken in, although its first numbers mirror."""
    near, far = _ftp(bed)
    _lengthen(near, far)
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) != ["shortcut"]
    assert underpass.endpoints() == []
    assert _say_in_two(near, far) == b"abcdefghi"


def _lengthened_in_a_pause(bed: Bed) -> tuple[Remote, Remote]:
    near, far = _ftp(bed)
    dataplane.pause(bed.pins, True)
    _lengthen(near, far)
    dataplane.pause(bed.pins, False)
    return near, far


def test_a_line_is_lengthened_in_a_pause(bed: Bed, plane: MakePlane) -> None:
    """Claim: a pair whose stream NAT rewrites goes by TCP from then on, in order."""
    underpass = plane()
    near, far = _lengthened_in_a_pause(bed)
    assert underpass.counters().pairs_total == 1
    assert _say_in_two(near, far) == b"abcdefghi"
    assert underpass.counters().shortcut_messages_total == 0


def test_twin_that_does_not_see_the_shift(bed: Bed, plane: MakePlane) -> None:
    """Claim: without that look the gate opens one message too early, and the test above notices."""
    underpass = plane(faults=Fault.SHIFTED)
    near, far = _lengthened_in_a_pause(bed)
    assert _say_in_two(near, far) == b"defghiabc"
    assert underpass.counters().shortcut_messages_total == 1
