"""Slow first packets: the handshake and the bytes behind it come late, doubled or out of order."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.kernel.bed import SERVER4, Bed, cgroup2, run
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import ROUND, Remote, begin_connect, connect, couple, exchange, listen
from tests.kernel.verdicts import check_named, check_paired
from tests.kernel.waiting import wait_until
from tests.kernel.wire import Kind, Wire
from underpass.bench import bed as bench
from underpass.bench.way import CLIENT_ADDRESS6, SERVER_ADDRESS, SERVER_ADDRESS6, Way
from underpass.dataplane import Dataplane
from underpass.model import Fault
from underpass.torture.content import WrongBytesError
from underpass.torture.plans import Batch, Plan, Step, mixed
from underpass.torture.traffic import Report, run_batch

PORT = 8080
_EARLY = 400
"""Bytes that go by TCP before there is a pair: few enough that it stays on every kernel."""
_BURST = Step(send=80_000, write=100)
_HEARD = Step(receive=80_000)
_TALK = Plan(
    "a burst that lasts longer than a handshake, its answer, another",
    (_BURST, _HEARD, _BURST, Step(shut=True, eof=True)),
    (_HEARD, _BURST, _HEARD, Step(eof=True), Step(shut=True)),
)
_WHOLE = tuple(plan for plan in mixed(48, seed=8) if "reset" not in plan.name)
"""Without resets: a wire or switch that loses an RST lets the other end wait for ever, natively."""
BY_FAMILY = pytest.mark.parametrize(
    "address", [SERVER_ADDRESS, SERVER_ADDRESS6], ids=["IPv4", "IPv6"]
)
HANDSHAKE = pytest.mark.parametrize("kind", [Kind.SYN, Kind.SYN_ACK, Kind.ACK])


@HANDSHAKE
def test_a_late_handshake_pairs(bed: Bed, plane: MakePlane, kind: Kind) -> None:
    """Claim: whichever packet of the handshake is late, the pair is made when it comes."""
    underpass, wire = plane(), Wire(bed)
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    wire.hold(kind)
    near = begin_connect(bed.worker("client"), (SERVER4, PORT))
    wire.wait_held(kind)
    assert underpass.counters().pairs_total == 0
    wire.release(kind)
    far = listener.accept()
    far.send(2, 100)  # the server may speak first
    near.receive(2, 100)
    check_paired(underpass, near, far)
    check_named(bed, near, far)


@HANDSHAKE
def test_a_lost_handshake_pairs(bed: Bed, plane: MakePlane, kind: Kind) -> None:
    """Claim: whichever packet of the handshake is lost and sent again, the connection pairs."""
    underpass, wire = plane(), Wire(bed)
    wire.lose(kind)
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    assert wire.lost()
    check_paired(underpass, *ends)


def _early_bytes(bed: Bed, wire: Wire, size: int = _EARLY) -> tuple[Remote, Remote]:
    """A connection whose client's first bytes are on the wire while its handshake ends.

    They left by TCP before the server knew of the connection.
    """
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    wire.hold(Kind.ACK, Kind.CLIENT_BYTES)
    near = connect(bed.worker("client"), (SERVER4, PORT))
    near.send(1, size)
    wire.wait_held(Kind.CLIENT_BYTES)
    wire.wait_held(Kind.ACK)
    wire.release(Kind.ACK)
    return near, listener.accept()


def _more_bytes(wire: Wire, near: Remote, far: Remote) -> None:
    """More of the client's bytes, while the first are on the wire: all have to come in order.

    The server's first bytes come meanwhile, before it has read any.
    """
    near.send(1, ROUND)
    reading = far.submit_receive(1, _EARLY + ROUND)
    far.send(2, ROUND)
    near.receive(2, ROUND)
    wire.release(Kind.CLIENT_BYTES)
    reading.result()
    exchange(near, far, 1)


def test_early_bytes_are_not_passed(bed: Bed, plane: MakePlane) -> None:
    """Claim: what is sent while the first bytes are on the wire comes behind them, both ways."""
    underpass, wire = plane(), Wire(bed)
    near, far = _early_bytes(bed, wire)
    _more_bytes(wire, near, far)
    assert underpass.counters().tcp_messages_total["tcp-unread"] > 0
    [pair] = underpass.pairs()
    assert {pair.client_to_server.path, pair.server_to_client.path} == {"shortcut"}


def test_the_check_of_early_bytes_catches_a_missing_gate(bed: Bed, plane: MakePlane) -> None:
    """Claim: without the gate the second message comes before the first, and the check sees it."""
    plane(faults=Fault.NO_GATE)
    wire = Wire(bed)
    near, far = _early_bytes(bed, wire)
    with pytest.raises(WrongBytesError):
        _more_bytes(wire, near, far)


def test_many_early_bytes_leave(bed: Bed, plane: MakePlane) -> None:
    """Claim: a pair with more than 512 early bytes leaves again (they may hide from FIONREAD)."""
    underpass, wire = plane(), Wire(bed)
    near, far = _early_bytes(bed, wire, 2000)
    wire.release(Kind.CLIENT_BYTES)
    far.receive(1, 2000)
    assert underpass.counters().pairs_total == 1
    exchange(near, far, 1)
    wait_until(lambda: underpass.endpoints() == [], "both ends leave the map")
    assert underpass.counters().refused_total["tcp-first"] == 1
    exchange(near, far, 1)


def test_early_bytes_end_the_handshake(bed: Bed, plane: MakePlane) -> None:
    """Claim: where the client's bytes overtake its ACK and end the handshake, it pairs."""
    underpass, wire = plane(), Wire(bed)
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    wire.hold(Kind.ACK)
    near = connect(bed.worker("client"), (SERVER4, PORT))
    wire.wait_held(Kind.ACK)
    near.send(1, 100)
    far = listener.accept()
    far.receive(1, 100)
    wire.release(Kind.ACK)
    exchange(near, far, 1)
    [pair] = underpass.pairs()
    assert {pair.client_to_server.path, pair.server_to_client.path} == {"shortcut"}


@pytest.mark.parametrize("end", ["client", "server"])
def test_bytes_on_the_wire_are_not_passed(bed: Bed, plane: MakePlane, end: str) -> None:
    """Claim: bytes that left by TCP and are on the wire yet are not passed by the shortcut's."""
    _behind_the_wire(bed, plane(), Wire(bed), end)


@pytest.mark.parametrize("end", ["client", "server"])
def test_the_check_of_the_wire_catches_a_missing_gate(bed: Bed, plane: MakePlane, end: str) -> None:
    """Claim: without the gate the later bytes come first, and the check sees it."""
    underpass, wire = plane(faults=Fault.NO_GATE), Wire(bed)
    with pytest.raises(WrongBytesError):
        _behind_the_wire(bed, underpass, wire, end)


def _behind_the_wire(bed: Bed, underpass: Dataplane, wire: Wire, end: str) -> None:
    """A pair sends by TCP what the wire keeps, then is free to take the shortcut."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    sender, reader, stream = (near, far, 1) if end == "client" else (far, near, 2)
    kind = Kind.CLIENT_BYTES if end == "client" else Kind.SERVER_BYTES
    wire.hold(kind)
    underpass.set_paused(True)
    sender.send(stream, 1000)
    wire.wait_held(kind)
    underpass.set_paused(False)
    before = underpass.counters()
    sender.send(stream, 1000)
    reading = reader.submit_receive(stream, 2000)
    gated = underpass.counters().tcp_messages_total["tcp-unread"]
    if gated == before.tcp_messages_total["tcp-unread"]:
        reading.result()  # it went by the shortcut, so it comes, and comes too early
    wire.release(kind)
    reading.result()
    exchange(near, far, 1)
    assert underpass.counters().shortcut_messages_total > before.shortcut_messages_total


def _disturbed(bed: Bed, *, double: bool, deadline: float = 30) -> tuple[Report, int]:
    """Bursts behind deferred ACKs over such a wire; also how many packets were overtaken."""
    wire = Wire(bed)
    wire.disturb(0.005, double=double)
    batch = Batch(1, (_TALK,) * 40, SERVER4, deferred=True, deadline=deadline)
    report = run_batch(bed.worker("client"), bed.worker("server"), batch)
    return report, wire.counts()[1]


@pytest.mark.parametrize("double", [False, True], ids=["reordered", "reordered and doubled"])
def test_a_disorderly_wire_loses_no_order(bed: Bed, plane: MakePlane, *, double: bool) -> None:
    """Claim: packets up to 5 ms late, out of order and twice: all pair, streams are right."""
    underpass = plane()
    report, late = _disturbed(bed, double=double)
    report.check()
    assert late > 0
    counters = underpass.counters()
    assert counters.pairs_total == 40


def test_the_check_of_a_disorderly_wire_catches_a_missing_gate(bed: Bed, plane: MakePlane) -> None:
    """Claim: the check above fails when messages are redirected past unread TCP bytes."""
    plane(faults=Fault.NO_GATE)
    report, _ = _disturbed(bed, double=False, deadline=5)
    with pytest.raises(AssertionError, match="bytes from offset"):
        report.check()


def test_every_shape_over_a_disorderly_wire(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections of every shape, thrown between the paths at random, are right there."""
    underpass, wire = plane(), Wire(bed)
    wire.disturb(0.002)
    underpass.set_forced(0.1)
    batch = Batch(1, _WHOLE[:24], SERVER4, deadline=60)
    run_batch(bed.worker("client"), bed.worker("server"), batch).check()
    assert wire.counts()[1] > 0
    counters = underpass.counters()
    # a late packet may find its end in the midst of closing: that one stays on TCP, counted
    assert 21 <= counters.pairs_total <= 24, counters
    assert counters.pairs_total + counters.refused_total["peer-refused"] >= 24, counters


@pytest.fixture
def switched(bed: Bed) -> Iterator[bench.Bed]:
    """Two namespaces on an Open vSwitch in user space, in the place of the bed's own."""
    bench.sweep(cgroup2())
    with bench.Bed(cgroup2(), Way("ovs")) as road:
        bed.netns.update(client=road.client_netns, server=road.server_netns)
        for where, address in (("client", CLIENT_ADDRESS6), ("server", SERVER_ADDRESS6)):
            bed.within(where, "ip", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
        yield road
        bed.kill_workers()


def _misses(road: bench.Bed) -> int:
    """Packets of new flows, which the switch has asked its upper half about."""
    control = road.directory / "ovs" / "sw.ctl"
    shown = run("ovs-appctl", "-t", str(control), "dpif-netdev/pmd-stats-show")
    return sum(int(n) for n in re.findall(r"miss with success upcall: (\d+)", shown))


@BY_FAMILY
def test_open_vswitch_pairs(bed: Bed, plane: MakePlane, switched: bench.Bed, address: str) -> None:
    """Claim: over Open vSwitch in user space, whose first packets wait for upcalls, all pairs."""
    underpass = plane()
    before = _misses(switched)
    ends = couple(bed.worker("client"), bed.worker("server"), (address, PORT))
    assert _misses(switched) > before
    check_paired(underpass, *ends)
    check_named(bed, *ends)


def _over_the_switch(bed: Bed, address: str, deadline: float = 30) -> Report:
    batch = Batch(1, (_TALK,) * 100, address, deferred=True, deadline=deadline)
    return run_batch(bed.worker("client"), bed.worker("server"), batch)


@BY_FAMILY
@pytest.mark.usefixtures("switched")
def test_open_vswitch_loses_no_order(bed: Bed, plane: MakePlane, address: str) -> None:
    """Claim: what follows first packets that wait in the switch comes behind them."""
    underpass = plane()
    _over_the_switch(bed, address).check()
    counters = underpass.counters()
    assert counters.pairs_total == 100
    assert counters.tcp_messages_total["tcp-unread"] > 0
    assert counters.shortcut_messages_total > 0


@BY_FAMILY
@pytest.mark.usefixtures("switched")
def test_the_check_over_open_vswitch_catches_a_missing_gate(
    bed: Bed, plane: MakePlane, address: str
) -> None:
    """Claim: the check above fails when messages are redirected past unread TCP bytes."""
    plane(faults=Fault.NO_GATE)
    report = _over_the_switch(bed, address, deadline=5)
    with pytest.raises(AssertionError, match="bytes from offset"):
        report.check()


@BY_FAMILY
@pytest.mark.usefixtures("switched")
def test_every_shape_over_open_vswitch(bed: Bed, plane: MakePlane, address: str) -> None:
    """Claim: connections of every shape are right there, thrown between the paths at random."""
    underpass = plane()
    underpass.set_forced(0.1)
    batch = Batch(1, _WHOLE, address, deadline=60)
    run_batch(bed.worker("client"), bed.worker("server"), batch).check()
    counters = underpass.counters()
    assert counters.pairs_total == len(_WHOLE), counters.refused_total
