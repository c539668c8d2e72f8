"""Programs that do by io_uring what only TCP serves are recognised as those that make calls."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.kernel import test_guard as guard
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple
from tests.semantics.uring import Uring
from underpass import dataplane
from underpass.model import Sign

TO, AGAIN = (SERVER4, 8080), (SERVER4, 8081)
SIZE = 1000


@dataclass(frozen=True)
class Way:
    """How a program uses its ring.

    Attributes:
        name: in a test's name.
        polled: a thread of the kernel takes the requests.
        registered: the socket is named by its number in the ring's own table.
    """

    name: str
    polled: bool = False
    registered: bool = False

    def ring(self, handle: int) -> Uring:
        """A ring for a socket."""
        ring = Uring(polled=self.polled)
        if self.registered:
            ring.register(handle)
        return ring


PLAIN = Way("plain")
BOTH = Way("polled-registered", polled=True, registered=True)


def _send(number: int, way: Way, flags: int = 0) -> int:
    return way.ring(number).send(number, bytes(SIZE), flags)


def _send_zc(number: int, way: Way) -> int:
    return way.ring(number).send_zc(number, bytes(SIZE))


def _recv(number: int, way: Way, flags: int = 0) -> int:
    return way.ring(number).recv(number, bytearray(SIZE), flags)


def _splice(number: int, way: Way) -> int:
    into, out = os.pipe()
    try:
        return way.ring(number).splice(number, out, SIZE)
    finally:
        os.close(into)
        os.close(out)


def _splice_into(number: int) -> int:
    into, out = os.pipe()
    try:
        os.write(out, bytes(SIZE))
        return Uring().splice(into, number, SIZE)
    finally:
        os.close(into)
        os.close(out)


def _take(end: Remote, flags: int = 0) -> int:
    return end.worker.submit(guard._read_all, end.number, SIZE, flags).result(20)


def _by_send_zc(near: Remote, far: Remote, way: Way) -> None:
    assert far.worker.submit(_send_zc, far.number, way).result(20) == SIZE
    assert _take(near) == SIZE


def _by_splice(near: Remote, far: Remote, way: Way) -> None:
    near.send(1, SIZE)
    assert far.worker.submit(_splice, far.number, way).result(20) == SIZE


def _by_waitall(near: Remote, far: Remote, way: Way) -> None:
    near.send(1, SIZE)
    assert far.worker.submit(_recv, far.number, way, socket.MSG_WAITALL).result(20) == SIZE


def _by_trunc(near: Remote, far: Remote, way: Way) -> None:
    near.send(1, SIZE)
    assert far.worker.submit(_recv, far.number, way, socket.MSG_TRUNC).result(20) == SIZE


def _by_oob(_: Remote, far: Remote, way: Way) -> None:
    assert far.worker.submit(_send, far.number, way, socket.MSG_OOB).result(20) == SIZE


def _by_plain(near: Remote, far: Remote, way: Way) -> None:
    """What gives no sign: each end sends and receives."""
    for one, other in ((near, far), (far, near)):
        assert one.worker.submit(_send, one.number, way).result(20) == SIZE
        assert other.worker.submit(_recv, other.number, way).result(20) == SIZE


Use = Callable[[Remote, Remote, Way], None]
USES: list[tuple[Sign, Use, Way]] = [
    (Sign.ZEROCOPY, _by_send_zc, PLAIN),
    (Sign.SPLICE, _by_splice, PLAIN),
    (Sign.ZEROCOPY, _by_send_zc, Way("registered", registered=True)),
    (Sign.ZEROCOPY, _by_send_zc, Way("polled", polled=True)),
    (Sign.SPLICE, _by_splice, BOTH),
    (Sign.WAITALL, _by_waitall, PLAIN),
    (Sign.TRUNC, _by_trunc, PLAIN),
    (Sign.OOB, _by_oob, PLAIN),
]
"""How the far end's program gives signs away; over plain TCP each works."""


def test_signs_keep_a_program_out(bed: Bed, plane: MakePlane) -> None:
    """Claim: programs seen at it while they are watched are listed with it and stay on TCP."""
    underpass_ = plane(guard.SOON, watch=True)
    client = bed.worker("client")
    servers = [(bed.worker("server"), *use) for use in USES]
    for port, (server, _, use, way) in enumerate(servers, TO[1]):
        use(*couple(client, server, (SERVER4, port)), way)
    listed = {p["id"]: p for p in underpass(bed.pins, "guard", "list", "--json").document()}
    for port, (server, sign, use, way) in enumerate(servers, 2 * TO[1]):
        found = listed[guard._of(underpass_, server).id]
        assert (found["verdict"], found["signs"]) == ("kept-out", sign.words), (use, way)
        near, far = couple(client, server, (SERVER4, port))
        assert not guard._carried(underpass_, near, far)
        use(near, far, way)
    assert guard._of(underpass_, client).signs == []
    assert underpass_.counters().pairs_total == 0


def test_plain_requests_are_no_sign(bed: Bed, plane: MakePlane) -> None:
    """Claim: programs that send and receive by io_uring are admitted and take the shortcut.

    Nor is a splice a sign that does not read from a socket.
    """
    underpass_ = plane(guard.SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    for way in (PLAIN, BOTH):
        _by_plain(near, far, way)
    assert far.worker.submit(_splice_into, far.number).result(20) == SIZE
    assert _take(near) == SIZE
    near, far = couple(client, server, AGAIN)
    guard._run_until_admitted(underpass_, near, far)
    near, far = couple(client, server, (SERVER4, 8082))
    assert guard._carried(underpass_, near, far)
    for way in (PLAIN, BOTH):
        before = underpass_.counters().shortcut_messages_total
        _by_plain(near, far, way)
        assert underpass_.counters().shortcut_messages_total == before + 2
    found = [guard._of(underpass_, end) for end in (client, server)]
    assert [(program.verdict, program.signs) for program in found] == [("admitted", [])] * 2


def test_what_it_prevents(bed: Bed, plane: MakePlane) -> None:
    """Claim: the first zero-copy send of a program that was not watched fails; then none does."""
    underpass_ = plane()
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    assert guard._carried(underpass_, near, far)
    with pytest.raises(OSError, match=rf"Errno {errno.EOPNOTSUPP}\b"):
        near.worker.submit(_send_zc, near.number, PLAIN).result(20)
    assert guard._of(underpass_, client).signs == Sign.ZEROCOPY.words
    near, far = couple(client, server, AGAIN)
    _by_send_zc(far, near, PLAIN)


def test_a_kernel_without_it(bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where the tracepoint is missing, all goes on but for the signs that it would show."""
    monkeypatch.setattr(dataplane, "_URING", ("no_such_tracepoint",))
    underpass_ = plane(guard.SOON, watch=True)
    assert {path.name for path in bed.pins.iterdir()}.isdisjoint({"up_uring", "link_uring"})
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    _by_splice(near, far, PLAIN)
    assert guard._of(underpass_, server).signs == []
    guard._by_splice(near, far)
    assert guard._of(underpass_, server).signs == Sign.SPLICE.words
    assert not dataplane.try_load("up_uring")
    monkeypatch.undo()
    dataplane.upgrade(bed.pins)
    assert {"up_uring", "link_uring"} <= {path.name for path in bed.pins.iterdir()}
