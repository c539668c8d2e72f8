"""The way back: open connections on plain TCP are taken in where that is safe."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.adopting import (
    ADDRESS,
    goes_by_the_shortcut,
    in_flight,
    program,
    reasons,
    shortcut,
)
from tests.kernel.bed import SERVER4, SERVER6, UNGUARDED, Bed
from tests.kernel.commands import Done, command, finish, start
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import _RECVFROM, _SINKS, _SOCKETS, Remote, couple, exchange, listen
from tests.kernel.traffic import Load
from tests.kernel.waiting import wait_until
from underpass import adoption, dataplane
from underpass.generation import Dataplane
from underpass.model import Fault, Rule, Settings, Small
from underpass.torture.patience import patient
from underpass.torture.plans import KIB, MIB

_OLD = not adoption.possible()


@pytest.mark.skipif(not _OLD, reason="this kernel can")
def test_an_older_kernel_says_so(bed: Bed, plane: MakePlane) -> None:
    """Claim: where callbacks cannot be set on open sockets, all stays as it is, with a reason."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) == ["not-suitable"]
    assert underpass.endpoints() == []
    exchange(near, far, 1)


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest) -> None:
    if _OLD and request.function is not test_an_older_kernel_says_so:
        pytest.skip("callbacks cannot be set on open sockets here")


@pytest.mark.parametrize("server", [SERVER4, SERVER6])
def test_a_connection_that_stood_before_is_taken_in(
    bed: Bed, plane: MakePlane, server: str
) -> None:
    """Claim: an idle connection that was open before `up` becomes a pair, and nothing is lost."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (server, 8080))
    exchange(near, far, 1)
    underpass = plane()
    outcomes = adoption.adopt(bed.pins)
    assert reasons(outcomes) == ["shortcut"]
    assert underpass.open_pairs() == 1
    goes_by_the_shortcut(underpass, near, far)
    (pair,) = underpass.pairs()
    assert (outcomes[0].client, outcomes[0].server) == (pair.client, pair.server)
    assert pair.client.netns == bed.netns["client"]
    assert adoption.adopt(bed.pins) == []
    assert underpass.counters().pairs_total == 1


def _dnat(bed: Bed) -> tuple[str, int]:
    rule = f"-p tcp -d 10.99.0.1 --dport 80 -j DNAT --to-destination {SERVER4}:8080"
    bed.within("router", "iptables", "-t", "nat", "-A", "PREROUTING", *rule.split())
    return "10.99.0.1", 80


def test_a_service_address_is_no_obstacle(bed: Bed, plane: MakePlane) -> None:
    """Claim: where the destination is rewritten on the way, the two ends are found all the same."""
    near, far = couple(bed.worker("client"), bed.worker("server"), _dnat(bed), listen_on=ADDRESS)
    exchange(near, far, 1)
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
    goes_by_the_shortcut(underpass, near, far)


def test_a_rewritten_source_is_not_believed(bed: Bed, plane: MakePlane) -> None:
    """Claim: if the server sees another client than the one that is there, it stays on TCP."""
    address = _dnat(bed)
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    near, far = couple(bed.worker("client"), bed.worker("server"), address, listen_on=ADDRESS)
    exchange(near, far, 1)
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) == ["address-mismatch"]
    assert underpass.endpoints() == []
    exchange(near, far, 1)


_ROUNDS = 40 if os.environ.get("UNDERPASS_LONG") else 3
#: The bound on every road below which a stream of messages leaves.
SMALL = Settings(small=Small(*[64] * len(Small._fields)))


def _leaves_by_streaming(underpass: Dataplane, near: Remote, far: Remote) -> None:
    def gone() -> bool:
        near.send(1, 600 * 8, 8)
        far.receive(1, 600 * 8)
        return underpass.endpoints() == []

    wait_until(gone, "the stream leaves")


def test_a_small_stream_that_has_ended_comes_back(bed: Bed, plane: MakePlane) -> None:
    """Claim: it regains the shortcut, once it has waited; if it streams again, it waits longer."""
    underpass = plane(SMALL)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    for _ in range(2):
        _leaves_by_streaming(underpass, near, far)
        assert reasons(adoption.adopt(bed.pins)) == ["small-stream"]
        assert underpass.endpoints() == []
        assert reasons(adoption.adopt(bed.pins, first_wait=0)) == ["shortcut"]
        goes_by_the_shortcut(underpass, near, far)
    _leaves_by_streaming(underpass, near, far)
    (found,) = adoption.adopt(bed.pins, first_wait=100)
    assert 390 < float(found.detail.split()[-2]) <= 400


def _received(number: int) -> int:
    return _SINKS[number].offset


def _buffer_over_budget(near: Remote, far: Remote) -> int:
    """The sender's buffer, in bytes, while more waits than the budget allows."""
    most = near.fill(1, 1, 0) + 3 * MIB  # so few that the spell in which it is narrow lasts
    for _ in range(20):
        sent = near.fill(1, 64 * KIB, most, 0.1)
        far.receive(1, 64 * KIB)  # its packets call us
    size = near.option(socket.SOL_SOCKET, socket.SO_SNDBUF)
    far.receive(1, sent - far.worker.call(_received, far.number))
    return size


@pytest.mark.parametrize("again", [False, True], ids=["left", "down and up"])
def test_who_comes_back_is_held_tightly_again(bed: Bed, plane: MakePlane, *, again: bool) -> None:
    """Claim: the size that we gave a send buffer is not taken for the program's own later."""
    underpass = plane(replace(SMALL, budget_bytes=MIB))
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    first = _buffer_over_budget(near, far)
    if again:
        assert dataplane.down(bed.pins) == []
        plane(replace(SMALL, budget_bytes=MIB))
    else:
        _leaves_by_streaming(underpass, near, far)
    wait_until(
        lambda: reasons(adoption.adopt(bed.pins, first_wait=0)) == ["shortcut"], "it comes back"
    )
    exchange(near, far, 1)
    assert _buffer_over_budget(near, far) == first < MIB


def test_busy_connections_come_and_go(bed: Bed, plane: MakePlane) -> None:
    """Claim: where connections are taken in and leave while they are busy, no byte is wrong."""
    load = Load(bed)
    load.start(16)
    load.wait_moves(4 << 20)
    underpass = plane(UNGUARDED)
    (name,) = UNGUARDED.allow

    def most_in() -> bool:
        """On a busy machine some look stuck, and leave again, before the last are in."""
        adoption.adopt(bed.pins, first_wait=0)
        return underpass.open_pairs() >= 12

    for _ in range(_ROUNDS):
        wait_until(most_in, "most are taken in", 60)
        before = shortcut(underpass)
        load.wait_moves(4 << 20)
        assert shortcut(underpass) > before
        dataplane.set_rule(bed.pins, name, Rule.DENY)
        wait_until(lambda: underpass.endpoints() == [], "all leave")
        dataplane.set_rule(bed.pins, name, Rule.ALLOW)
    load.stop_and_check()


#: Connects, then reads messages of 1 KiB in a blocking recv, answers each with its first byte.
_READER = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
while data := sock.recv(1024):
    sock.sendall(data[:1])
"""


def _sleeps_in_recv(pid: int) -> bool:
    text = Path(f"/proc/{pid}/syscall").read_text()
    return text.split()[0] == _RECVFROM


def test_a_reader_asleep_in_a_native_read_is_woken(bed: Bed, plane: MakePlane) -> None:
    """Claim: what is sent to it first goes by TCP, and what comes after by the shortcut."""
    listener = listen(bed.worker("server"), ADDRESS)
    with program(bed, "client", _READER) as reader:
        far = listener.accept()
        wait_until(lambda: _sleeps_in_recv(reader.pid), "it sleeps in recv")
        underpass = plane()
        assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
        for by_shortcut in (0, 0, 1):
            assert underpass.pairs()[0].server_to_client.shortcut_messages == by_shortcut
            far.send(1, KIB)
            far.worker.call(_one_byte, far.number)
        by_tcp = {r: n for r, n in underpass.counters().tcp_messages_total.items() if n}
        assert by_tcp == {"reader-waits-for-tcp": 1}
        far.close()


def _one_byte(number: int) -> None:
    assert len(_SOCKETS[number].recv(1)) == 1


def test_a_thread_asleep_in_a_native_read_is_woken(bed: Bed, plane: MakePlane) -> None:
    """Claim: the same where other threads share its descriptors."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    reading = near.submit_read(2, KIB, patient(20))
    wait_until(near.sleeps_in_recv, "a thread sleeps in recv")
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
    far.send(2, KIB)
    reading.result(patient(20))
    assert shortcut(underpass) == 0
    far.send(2, KIB)
    near.receive(2, KIB)
    assert shortcut(underpass) == 1


def test_a_holder_that_is_not_to_be_seen_keeps_it_on_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: a reference that no process explains may be a thread in recv: not now."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    with in_flight(near):
        assert reasons(adoption.adopt(bed.pins)) == ["reader-waits-for-tcp"]
        assert underpass.endpoints() == []
    assert reasons(adoption.adopt(bed.pins, first_wait=0)) == ["shortcut"]
    goes_by_the_shortcut(underpass, near, far)


def test_twin_without_the_check(bed: Bed, plane: MakePlane) -> None:
    """Claim: the test above would notice."""
    near, _ = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    plane(faults=Fault.HASTY_PAIR)
    with in_flight(near):
        assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]


def test_programs_are_watched_first(bed: Bed, plane: MakePlane) -> None:
    """Claim: the first pass lets the guard watch their programs, and a later one takes them in."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane(Settings(observe_seconds=0.5), watch=True)
    assert reasons(adoption.adopt(bed.pins)) == ["observed"]

    def admitted() -> bool:
        exchange(near, far, 1)
        return {program.verdict for program in underpass.programs()} == {"admitted"}

    wait_until(admitted, "the programs are admitted")
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
    goes_by_the_shortcut(underpass, near, far)


def test_denied_programs_stay(bed: Bed, plane: MakePlane) -> None:
    """Claim: a rule counts for what is open, too; once it is taken back, a pass takes it in."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane(UNGUARDED)
    (name,) = UNGUARDED.allow
    dataplane.set_rule(bed.pins, name, Rule.DENY)
    assert reasons(adoption.adopt(bed.pins)) == ["guarded"]
    exchange(near, far, 1)
    assert underpass.endpoints() == []
    dataplane.set_rule(bed.pins, name, Rule.ALLOW)
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]


def test_what_the_shortcut_cannot_serve_stays(bed: Bed, plane: MakePlane) -> None:
    """Claim: the state of a socket tells of its program, as in a handshake."""
    near, _ = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    near.set_option(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100)
    underpass = plane()
    assert reasons(adoption.adopt(bed.pins)) == ["guarded"]
    assert underpass.endpoints() == []


def test_ends_outside_the_cgroup_are_not_touched(bed: Bed, plane: MakePlane) -> None:
    """Claim: a connection with one end outside is none of ours."""
    near, far = couple(bed.worker("client"), bed.worker("server", outside=True), ADDRESS)
    plane()
    assert adoption.adopt(bed.pins) == []
    exchange(near, far, 1)


def test_pairs_of_a_replaced_generation_are_left_to_it(bed: Bed, plane: MakePlane) -> None:
    """Claim: what another map holds is not taken."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    plane()
    assert reasons(adoption.adopt(bed.pins)) == ["shortcut"]
    assert dataplane.upgrade(bed.pins) == 1
    assert adoption.adopt(bed.pins) == []
    exchange(near, far, 1)


def test_a_killed_pass_is_taken_back_by_the_next(
    bed: Bed, plane: MakePlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: ends that entered and were not paired go by TCP, and the next pass begins anew."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    underpass = plane()
    with monkeypatch.context() as patched:
        patched.setattr(adoption._Pass, "_see", _killed)
        patched.setattr(adoption._Pass, "_clear", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            adoption.adopt(bed.pins)
    assert (len(underpass.endpoints()), underpass.open_pairs()) == (2, 0)
    assert underpass.leftovers()["orders"] == 2
    exchange(near, far, 1)
    assert shortcut(underpass) == 0
    assert reasons(adoption.adopt(bed.pins, first_wait=0)) == ["shortcut"]
    assert underpass.leftovers()["orders"] == 0
    goes_by_the_shortcut(underpass, near, far)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def _adopt(bed: Bed, *words: str) -> Done:
    return finish(start(command(bed.pins, "adopt", *words)))


def test_the_command_says_what_it_did(bed: Bed, plane: MakePlane) -> None:
    """Claim: one line, then a row for each that stays with its reason; the same as JSON."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    _adopt(bed).failed(1, "no generation is pinned")
    plane(Settings(observe_seconds=60), watch=True)
    done = _adopt(bed).ok()
    assert "0 open connections taken in; on TCP for now: 1 observed" in done.out
    assert f"{SERVER4}:8080" in done.out
    dataplane.set_rule(bed.pins, UNGUARDED.allow[0], Rule.ALLOW)
    said = _adopt(bed, "--json").document()
    assert (said["adopted"], said["stay"]) == (1, {})
    (one,) = said["connections"]
    assert (one["server"]["address"], one["server"]["port"]) == ADDRESS
    assert one["reason"] == "shortcut"
    exchange(near, far, 1)
    assert "0 open connections taken in" in _adopt(bed).ok().out
    dataplane.pause(bed.pins, True)
    paused = _adopt(bed).ok().out
    assert paused.count("\n") == 1
    assert f"paused: everything stays on TCP until `underpass --pins {bed.pins} resume`" in paused
    assert _adopt(bed, "--json").document()["state"] == "paused"


def test_it_goes_on_until_it_is_told_to_stop(bed: Bed, plane: MakePlane) -> None:
    """Claim: `--every` takes in what changes later, and ends with 0 at SIGTERM."""
    underpass = plane(UNGUARDED)
    (name,) = UNGUARDED.allow
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    going = start(command(bed.pins, "adopt", "--every", "0.2"))
    dataplane.set_rule(bed.pins, name, Rule.DENY)

    def left() -> bool:
        exchange(near, far, 1)
        return underpass.endpoints() == []

    wait_until(left, "both ends leave")
    dataplane.set_rule(bed.pins, name, Rule.ALLOW)
    wait_until(lambda: underpass.open_pairs() == 1, "it is back", 60)
    going.terminate()
    done = finish(going).ok()
    assert "1 open connection taken in" in done.out


def test_up_takes_in_what_it_finds(bed: Bed) -> None:
    """Claim: `up` ends with a pass of its own, and says so in one line."""
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    words = command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    done = finish(start(words)).ok()
    assert done.out.endswith("1 open connection taken in\n")
    with Dataplane.open(bed.pins) as underpass:
        goes_by_the_shortcut(underpass, near, far)
    assert dataplane.down(bed.pins) == []
