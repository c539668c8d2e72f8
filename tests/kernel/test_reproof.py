"""Re-proof: a stream on the shortcut meets the network path now and then, and what stops it."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import remote
from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.traffic import Load
from tests.kernel.waiting import wait_until
from underpass import dataplane
from underpass.dataplane import Dataplane
from underpass.model import Direction, Fault, Settings

OFTEN = Settings(reproof_seconds=0.3)
NEVER = Settings(reproof_seconds=0)
PORT = 8080
HEAD, RECORD = 100, 1000
BOTH = ("client", "server")
TRACKED = Path("/proc/net/nf_conntrack")
COUNT = "net.netfilter.nf_conntrack_count"
RASH = pytest.mark.parametrize("fault", [Fault(0), Fault.RASH_PROOF], ids=["spared", "twin"])
LOSSY = 1.5
"""Seconds without a byte after which a stream counts as stopped."""


def _pair(bed: Bed) -> tuple[Remote, Remote]:
    ends = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(*ends, 1)
    return ends


def _proofs(plane: Dataplane) -> int:
    return plane.counters().tcp_messages_total["reproof"]


def _talk(ends: tuple[Remote, Remote], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        exchange(*ends, 1, rounds=1, deadline=LOSSY)


def _ask(number: int) -> None:
    fcntl.ioctl(remote._SOCKETS[number], termios.FIONREAD, b"\0" * 4)


def _send_records(number: int, seconds: float) -> int:
    """Records in two writes each; how many were taken by the socket."""
    sock, sent, end = remote._SOCKETS[number], 0, time.monotonic() + seconds
    with contextlib.suppress(BlockingIOError):
        while time.monotonic() < end:
            sock.sendall(b"h" * HEAD)
            time.sleep(0.0005)
            sock.sendall(b"b" * (RECORD - HEAD))
            sent += 1
    return sent


def _peek_records(number: int, quiet: float) -> int:
    """Take a record once all of it is there to be seen; how many, until none comes for `quiet`."""
    sock, taken, last = remote._SOCKETS[number], 0, time.monotonic()
    while time.monotonic() - last < quiet:
        if not select.select([sock], [], [], 0.1)[0]:
            continue
        if len(sock.recv(RECORD, socket.MSG_PEEK)) == RECORD:
            assert len(sock.recv(RECORD)) == RECORD
            taken, last = taken + 1, time.monotonic()
    return taken


class _Reader(threading.Thread):
    """In a worker: reads in a blocking recv; counts how often that was woken for nothing."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.woken = 0
        self.done = False
        self._sock = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"\0" * 16)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, b"\0" * 16)

    def run(self) -> None:
        while not self.done:
            try:
                self._sock.recv(1)
            except BlockingIOError:
                self.woken += not self.done  # shutdown() wakes it, too


_READING: dict[int, _Reader] = {}


def _start_reading(number: int) -> None:
    _READING[number] = _Reader(remote._SOCKETS[number])
    _READING[number].start()


def _stop_reading(number: int) -> int:
    """How often the reader was woken for nothing."""
    reader = _READING.pop(number)
    reader.done = True
    remote._SOCKETS[number].shutdown(socket.SHUT_RDWR)
    reader.join(10)
    return reader.woken


def _write_large(number: int) -> None:
    remote._SOCKETS[number].sendall(bytes(4 << 20))


def _take_large(number: int) -> None:
    sock, left = remote._SOCKETS[number], 4 << 20
    while left:
        left -= len(sock.recv(min(left, 1 << 20)))


def test_a_message_of_each_direction_goes_by_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: both directions are re-proven again and again, and then are back on the shortcut."""
    underpass = plane(OFTEN)
    ends = _pair(bed)

    def proven() -> bool:
        exchange(*ends, 1, rounds=1)
        return _proofs(underpass) >= 8

    def directions() -> tuple[Direction, Direction]:
        [pair] = underpass.pairs()
        return pair.client_to_server, pair.server_to_client

    def back() -> bool:
        exchange(*ends, 1, rounds=2)  # of which one more may be a proof
        return all(direction.path == "shortcut" for direction in directions())

    wait_until(proven, "eight proofs")
    wait_until(back, "both are back on the shortcut")
    for direction in directions():
        assert 2 <= direction.tcp_messages < direction.shortcut_messages


def test_never_is_never(bed: Bed, plane: MakePlane) -> None:
    """Claim: with 0 no message is sent by TCP for it, until it is switched on."""
    underpass = plane(NEVER)
    ends = _pair(bed)
    _talk(ends, 2 * OFTEN.reproof_seconds)
    assert _proofs(underpass) == 0
    dataplane.set_reproof(bed.pins, OFTEN.reproof_seconds)
    dataplane.upgrade(bed.pins)  # open pairs stay with the old generation, which has it, too
    _talk(ends, 3 * OFTEN.reproof_seconds)
    assert _proofs(underpass) > 0
    with Dataplane.open(bed.pins) as heir:
        assert heir.settings.reproof_seconds == OFTEN.reproof_seconds


@pytest.mark.parametrize("settings", [OFTEN, NEVER], ids=["re-proven", "twin"])
def test_a_drop_rule_stops_a_running_stream(bed: Bed, plane: MakePlane, settings: Settings) -> None:
    """Claim: a rule that drops its packets stops it, and it goes on when the rule is gone.

    Twin: without re-proof it goes on as if there were no rule.
    """
    plane(settings)
    ends = near, far = _pair(bed)
    rule = ("INPUT", "-p", "tcp", "--dport", str(PORT), "-j", "DROP")
    bed.within("server", "iptables", "-A", *rule)
    if settings is NEVER:
        _talk(ends, 4 * OFTEN.reproof_seconds)
        return
    with pytest.raises(BlockingIOError):
        _talk(ends, 60)
    bed.within("server", "iptables", "-D", *rule)
    far.receive(1, remote.ROUND)
    far.send(2, remote.ROUND)
    near.receive(2, remote.ROUND)
    exchange(*ends, 1)


@pytest.mark.parametrize("settings", [OFTEN, NEVER], ids=["re-proven", "twin"])
def test_conntrack_sees_that_a_stream_lives(bed: Bed, plane: MakePlane, settings: Settings) -> None:
    """Claim: a busy stream outlives conntrack's timeout: TCP packets are of a known connection.

    Twin: without re-proof the entry is gone, and the next packet is dropped as invalid.
    """
    _track(bed, "server", 3)
    plane(settings)
    ends = _pair(bed)
    _talk(ends, 7)
    dataplane.pause(bed.pins, True)
    if settings is NEVER:
        with pytest.raises(BlockingIOError):
            _talk(ends, 5)
        return
    _talk(ends, 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [Settings(), NEVER], ids=["re-proven", "twin"])
def test_five_busy_minutes(
    bed: Bed,
    plane: MakePlane,
    long_run: bool,
    measured: Callable[[str], None],
    settings: Settings,
) -> None:
    """Claim: five busy minutes on the shortcut outlive a conntrack timeout of one at both ends.

    Twin: without re-proof the entries are gone after a minute, and the next packets are dropped.
    """
    if not long_run:
        pytest.skip("five minutes: UNDERPASS_LONG=1")
    if not TRACKED.exists():
        pytest.skip(f"this kernel has no {TRACKED}")
    for where in BOTH:
        _track(bed, where, 60)
    underpass = plane(settings)
    ends, began = _pair(bed), time.monotonic()

    def busy() -> float:
        exchange(*ends, 1, rounds=1)
        return time.monotonic() - began

    if settings is NEVER:
        wait_until(
            lambda: busy() and not any(_tracked(bed, where) for where in BOTH),
            "the entries are gone",
            180,
        )
    else:
        wait_until(lambda: busy() >= 300, "five minutes have passed", 360)
    passed, left = busy(), {where: _tracked(bed, where) for where in BOTH}
    counted = {where: bed.within(where, "sysctl", "-n", COUNT).strip() for where in BOTH}
    went = underpass.counters()
    measured(
        f"{passed:.0f} s busy, {went.shortcut_messages_total} messages by the shortcut,"
        f" {_proofs(underpass)} proofs; conntrack: {left}, entries {counted}"
    )
    assert went.shortcut_messages_total > 100 * sum(went.tcp_messages_total.values())
    dataplane.pause(bed.pins, True)
    if settings is NEVER:
        assert set(counted.values()) == {"0"}
        with pytest.raises(BlockingIOError):
            _talk(ends, 60)
        assert _dropped(bed, "server") > 0
        return
    assert all("ESTABLISHED" in line for line in left.values())
    exchange(*ends, 1)
    assert [_dropped(bed, where) for where in BOTH] == [0, 0]


def _track(bed: Bed, where: str, seconds: int) -> None:
    """Let in only packets of connections that conntrack knows, for so long after the last one."""
    bed.within(where, "sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=0")
    known = ("-m", "conntrack", "--ctstate", "NEW,ESTABLISHED", "-j", "ACCEPT")
    bed.within(where, "iptables", "-A", "INPUT", *known)
    bed.within(where, "iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP")
    timeout = f"net.netfilter.nf_conntrack_tcp_timeout_established={seconds}"
    bed.within(where, "sysctl", "-qw", timeout)


def _tracked(bed: Bed, where: str) -> str:
    """What conntrack has of the connection there; empty: nothing. What is overdue goes by this."""
    lines = bed.within(where, "cat", str(TRACKED)).splitlines()
    return next((" ".join(line.split()) for line in lines if f"dport={PORT}" in line), "")


def _dropped(bed: Bed, where: str) -> int:
    """Packets of no known connection that were dropped there."""
    rules = bed.within(where, "iptables", "-v", "-S", "INPUT").splitlines()
    drop = next(rule.split() for rule in rules if rule.endswith("-j DROP"))
    return int(drop[drop.index("-c") + 1])


@RASH
def test_a_program_that_counts_is_spared(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: where FIONREAD misses TCP bytes, a reader that asks it gets none as a proof."""
    underpass = plane(OFTEN, fault)
    near, far = _pair(bed)
    for end in (near, far):
        end.worker.call(_ask, end.number)
    before = _proofs(underpass)
    _talk((near, far), 4 * OFTEN.reproof_seconds)
    assert (_proofs(underpass) > before) == bool(fault)


@RASH
def test_a_reader_that_peeks(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: one that peeks for a whole record sees its rest. Twin: it waits for ever for it."""
    underpass = plane(OFTEN, fault)
    near, far = _pair(bed)
    missed = 0
    for _ in range(5 if fault else 1):  # on a busy machine the twin may need another round
        reading = far.worker.submit(_peek_records, far.number, 3.0)
        sent = near.worker.call(_send_records, near.number, 20 * OFTEN.reproof_seconds)
        missed = sent - reading.result(60)
        if missed:
            break
    assert _proofs(underpass) > 0
    assert (missed > 0) == bool(fault)


@RASH
def test_a_reader_asleep_beside_a_writer(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: a thread in a blocking recv sleeps through a proof. Twin: EAGAIN."""
    plane(OFTEN, fault)
    near, far = _pair(bed)
    near.worker.call(_start_reading, near.number)
    end = time.monotonic() + 15 * OFTEN.reproof_seconds
    while time.monotonic() < end:  # never more than one is on its way: over budget TCP wakes, too
        taking = far.worker.submit(_take_large, far.number)
        near.worker.call(_write_large, near.number)
        taking.result(60)
        time.sleep(0.05)
    assert (near.worker.call(_stop_reading, near.number) > 0) == bool(fault)


def test_streams_stay_whole(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections of every kind of reader, busy both ways, lose and swap nothing by it."""
    underpass = plane(Settings(reproof_seconds=0.1))
    load = Load(bed)
    load.start(12)

    def proven() -> bool:
        load.wait_moves(4 << 20)
        return _proofs(underpass) >= 100

    wait_until(proven, "a hundred proofs", 60)
    load.stop_and_check()
