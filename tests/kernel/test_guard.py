"""Programs that use what the shortcut cannot serve stay on TCP, and are remembered."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import remote
from tests.kernel.bed import SERVER4, UNGUARDED, Bed
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass import abi, libbpf, programs
from underpass.generation import Dataplane
from underpass.model import Program, Settings, Sign
from underpass.torture.patience import patient
from underpass.torture.worker import Worker

TO = (SERVER4, 8080)
SOON = Settings(observe_seconds=patient(0.3))
SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000
IPPROTO_MPTCP = 262
MESSAGE = 1000
_STREAM = 1
_SPLICE_F_NONBLOCK = 2


def _of(plane: Dataplane, worker: Worker) -> Program:
    """What the guard knows of the worker's program."""
    found = programs.identify(worker.pid)
    assert found is not None
    wanted = programs.id_of(found[0])
    return next(program for program in plane.programs() if program.id == wanted)


def _run_until_admitted(plane: Dataplane, near: Remote, far: Remote) -> None:
    """Let both programs talk until they have been watched for long enough."""

    def admitted() -> bool:
        exchange(near, far, _STREAM, rounds=1)
        return {_of(plane, end.worker).verdict for end in (near, far)} == {"admitted"}

    wait_until(admitted, "both programs are admitted")


def _admit(plane: Dataplane, bed: Bed) -> tuple[Worker, Worker]:
    """Two workers that have been watched and admitted."""
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    _run_until_admitted(plane, near, far)
    for end in (near, far):
        end.close()
    return client, server


def _carried(plane: Dataplane, near: Remote, far: Remote) -> bool:
    """Whether the shortcut carries what the two now say to each other."""
    before = plane.counters().shortcut_messages_total
    exchange(near, far, _STREAM, rounds=2)
    return plane.counters().shortcut_messages_total > before


def _read_all(number: int, size: int, flags: int) -> int:
    return len(remote._SOCKETS[number].recv(size, flags))


def _splice(number: int, size: int) -> int:
    """Move bytes from the socket into a pipe; how many arrived."""
    into, out = os.pipe()
    try:
        taken = os.splice(number, out, size)
        return len(os.read(into, size)) if taken else 0
    finally:
        os.close(into)
        os.close(out)


def _sendfile(number: int, size: int) -> int:
    """The same by sendfile."""
    into, out = os.pipe()
    try:
        return os.sendfile(out, number, None, size)
    finally:
        os.close(into)
        os.close(out)


def _splice_now(number: int, size: int) -> int:
    """Move what is there, without waiting."""
    into, out = os.pipe()
    blocking = os.get_blocking(number)
    os.set_blocking(number, False)  # the flag alone is about the pipe
    try:
        return os.splice(number, out, size, flags=_SPLICE_F_NONBLOCK)
    finally:
        os.set_blocking(number, blocking)
        os.close(into)
        os.close(out)


def _send_flagged(number: int, flags: int) -> None:
    remote._SOCKETS[number].send(b"x", flags)


def _receive_with(far: Remote, flags: int) -> None:
    far.worker.submit(_read_all, far.number, MESSAGE, flags).result(20)


def _by_waitall(near: Remote, far: Remote) -> None:
    reading = far.worker.submit(_read_all, far.number, 2 * MESSAGE, socket.MSG_WAITALL)
    near.send(1, MESSAGE)
    near.send(1, MESSAGE)
    assert reading.result(20) == 2 * MESSAGE


def _by_splice(near: Remote, far: Remote) -> None:
    near.send(1, MESSAGE)
    assert far.worker.submit(_splice, far.number, MESSAGE).result(20) == MESSAGE


def _by_trunc(near: Remote, far: Remote) -> None:
    near.send(1, MESSAGE)
    _receive_with(far, socket.MSG_TRUNC)


def _by_oob(_: Remote, far: Remote) -> None:
    far.worker.call(_send_flagged, far.number, socket.MSG_OOB)


def _by_zerocopy(near: Remote, far: Remote) -> None:
    far.set_option(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    far.worker.call(_send_flagged, far.number, MSG_ZEROCOPY)
    near.worker.submit(_read_all, near.number, 1, 0).result(20)


def _by_lowat(near: Remote, far: Remote) -> None:
    far.set_option(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MESSAGE)
    near.send(1, MESSAGE)
    far.receive(1, MESSAGE)
    far.send(2, 10)  # a packet of its own shows its state
    near.receive(2, 10)


USES: dict[Sign, Callable[[Remote, Remote], None]] = {
    Sign.WAITALL: _by_waitall,
    Sign.SPLICE: _by_splice,
    Sign.TRUNC: _by_trunc,
    Sign.OOB: _by_oob,
    Sign.ZEROCOPY: _by_zerocopy,
    Sign.RCVLOWAT: _by_lowat,
}
"""How the far end's program gives each sign away; over plain TCP each works."""


def test_programs_are_watched_before_they_are_admitted(bed: Bed, plane: MakePlane) -> None:
    """Claim: a new program's connections take TCP, and the shortcut once it has run for a while."""
    underpass = plane(SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    assert not _carried(underpass, near, far)
    assert underpass.counters().refused_total["observed"] > 0
    near.close()
    far.close()
    near, far = couple(client, server, TO)
    _run_until_admitted(underpass, near, far)
    again = couple(client, server, (SERVER4, 8081))
    assert _carried(underpass, *again)


def test_a_watched_server_that_speaks_first(bed: Bed, plane: MakePlane) -> None:
    """Claim: an admitted client of a watched server leaves the map before it says anything."""
    underpass_ = plane(SOON, watch=True)
    client, _ = _admit(underpass_, bed)
    near, far = couple(client, bed.worker("server"), (SERVER4, 8081))
    far.send(1, MESSAGE)
    near.receive(1, MESSAGE)

    def left() -> bool:
        return underpass_.endpoints() == []

    wait_until(left, "the client leaves the map")
    near.send(2, MESSAGE)
    far.receive(2, MESSAGE)


def test_an_idle_program_is_not_admitted_by_time(bed: Bed, plane: MakePlane) -> None:
    """Claim: what counts is that a program runs: silence counts a second at most."""
    underpass = plane(Settings(observe_seconds=30), watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    exchange(near, far, _STREAM)
    assert _of(underpass, server).observed_seconds < 2
    assert {_of(underpass, end).verdict for end in (client, server)} == {"watched"}


@pytest.mark.parametrize("sign", USES, ids=lambda sign: sign.words[0])
def test_signs_keep_a_program_out(bed: Bed, plane: MakePlane, sign: Sign) -> None:
    """Claim: a program seen at what only TCP serves is listed with it and stays on TCP."""
    underpass = plane(SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    USES[sign](near, far)
    program = _of(underpass, server)
    assert (program.verdict, program.signs) == ("kept-out", sign.words)
    assert _of(underpass, client).verdict != "kept-out"
    near, far = couple(client, server, (SERVER4, 8081))
    for _ in range(3):
        assert not _carried(underpass, near, far)
    assert underpass.counters().pairs_total == 0


def test_sendfile_from_a_socket_is_a_splice(bed: Bed, plane: MakePlane) -> None:
    """Claim: sendfile from a socket into a pipe keeps its program out, as splice does."""
    underpass = plane(SOON, watch=True)
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    near.send(1, MESSAGE)
    assert far.worker.call(_sendfile, far.number, MESSAGE) == MESSAGE
    program = _of(underpass, far.worker)
    assert (program.verdict, program.signs) == ("kept-out", Sign.SPLICE.words)
    assert _of(underpass, near.worker).signs == []


def _look_for_errors(number: int) -> None:
    with pytest.raises(BlockingIOError):
        remote._SOCKETS[number].recv(1, socket.MSG_ERRQUEUE | socket.MSG_TRUNC)


def test_the_error_queue_is_no_part_of_the_stream(bed: Bed, plane: MakePlane) -> None:
    """Claim: flags of a read of that are no sign (socat asks so after a refused connect)."""
    underpass = plane(SOON, watch=True)
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    far.worker.call(_look_for_errors, far.number)
    exchange(near, far, _STREAM)
    assert _of(underpass, far.worker).signs == []


@pytest.mark.parametrize("sign", [Sign.WAITALL, Sign.SPLICE], ids=lambda sign: sign.words[0])
def test_a_late_sign_moves_open_pairs_to_tcp(bed: Bed, plane: MakePlane, sign: Sign) -> None:
    """Claim: an admitted program that shows a sign leaves the shortcut with all its pairs."""
    underpass = plane(SOON, watch=True)
    client, server = _admit(underpass, bed)
    near, far = couple(client, server, (SERVER4, 8081))
    other = couple(client, server, (SERVER4, 8082))
    assert _carried(underpass, near, far)
    assert _carried(underpass, *other)
    # over TCP, as after a pause, the call itself works
    underpass.set_paused(True)
    near.send(_STREAM, MESSAGE)
    assert far.worker.submit(_splice, far.number, MESSAGE).result(20) == MESSAGE
    if sign is Sign.WAITALL:
        near.send(_STREAM, MESSAGE)
        _receive_with(far, socket.MSG_WAITALL)
    underpass.set_paused(False)
    assert not _carried(underpass, *other)
    assert underpass.counters().tcp_messages_total["marked"] > 0

    def left() -> bool:
        exchange(*other, _STREAM, rounds=1)
        return underpass.counters().refused_total["guarded"] > 0

    wait_until(left, "the pair leaves the map")


def test_what_the_guard_prevents(bed: Bed, plane: MakePlane) -> None:
    """Claim: without the guard a splice finds nothing, and MSG_WAITALL returns short."""
    plane(UNGUARDED)
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    exchange(near, far, _STREAM)
    near.send(_STREAM, MESSAGE)
    with pytest.raises(BlockingIOError):
        far.worker.call(_splice_now, far.number, MESSAGE)
    far.receive(_STREAM, MESSAGE)
    near.send(_STREAM, MESSAGE)
    short = far.worker.call(_read_all, far.number, 2 * MESSAGE, socket.MSG_WAITALL)
    assert short == MESSAGE


def test_rules_overrule_signs(bed: Bed, plane: MakePlane) -> None:
    """Claim: allow lets a program take the shortcut in spite of its signs, deny keeps it out."""
    underpass_ = plane(SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    near, far = couple(client, server, TO)
    _by_splice(near, far)
    name = _of(underpass_, server).name
    assert "allowed" in underpass(bed.pins, "guard", "allow", name).ok().out
    again = couple(client, server, (SERVER4, 8081))
    assert _carried(underpass_, *again)
    underpass(bed.pins, "guard", "deny", _of(underpass_, client).id).ok()
    assert not _carried(underpass_, *again)
    (listed,) = [
        p
        for p in underpass(bed.pins, "guard", "list", "--json").document()
        if p["id"] == _of(underpass_, client).id
    ]
    assert (listed["verdict"], listed["reason"]) == ("denied", "rule")
    listener = listen(server, (SERVER4, 8082))  # and does not listen again
    underpass(bed.pins, "guard", "forget", name).ok()
    assert {program.verdict for program in _of_name(underpass_, name)} == {"watched"}
    near, far = connect(client, (SERVER4, 8082)), listener.accept()
    _run_until_admitted(underpass_, near, far)
    underpass(bed.pins, "guard", "deny", "never-seen").ok()
    underpass(bed.pins, "guard", "forget", "never-seen").ok()
    underpass(bed.pins, "guard", "forget", "never-seen").failed(1, "forget", "never-seen")


def _unseen(plane: Dataplane) -> list[Program]:
    return programs.unseen(plane.rules(), plane.programs())


def _of_name(plane: Dataplane, name: str) -> list[Program]:
    return [program for program in plane.programs() if program.name == name]


def test_a_denied_name_is_denied_before_it_starts(bed: Bed, plane: MakePlane) -> None:
    """Claim: a rule for a name holds for a program that was never seen."""
    name = Path("/proc/self/exe").readlink().name
    underpass_ = plane(Settings(deny=(name,)))
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    assert not _carried(underpass_, near, far)
    assert _of(underpass_, near.worker).verdict == "denied"


def test_status_speaks_of_verdicts(bed: Bed, plane: MakePlane) -> None:
    """Claim: beside the reasons of connections `status` has the verdict that `guard list` gives."""
    underpass_ = plane(watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    exchange(*couple(client, server, TO), _STREAM, rounds=1)
    for reason, verdict in (("observed", "watched"), ("guarded", "denied")):
        assert _of(underpass_, client).verdict == verdict
        lines = underpass(bed.pins, "status").ok().out.splitlines()
        [line] = [line for line in lines if reason in line]
        assert verdict in line
        assert f"`underpass --pins {bed.pins} guard list`" in line
        underpass(bed.pins, "guard", "deny", _of(underpass_, client).id).ok()
        exchange(*couple(client, server, (SERVER4, 8081)), _STREAM, rounds=1)


def test_a_rule_for_a_program_that_was_never_seen(bed: Bed, plane: MakePlane) -> None:
    """Claim: it is said that none was seen; the rule is listed, holds, and can be taken back."""
    underpass_ = plane(Settings(allow=("friend",)))
    said = underpass(bed.pins, "guard", "deny", "never-seen").ok().out
    assert "no program never-seen has been seen" in said
    listed = underpass(bed.pins, "guard", "list", "--json").document()
    nothing = {"id": "", "pid": 0, "command": "", "by_arguments": False, "observed_seconds": 0.0}
    for name, verdict in (("friend", "allowed"), ("never-seen", "denied")):
        entry = {"name": name, "verdict": verdict, "reason": "rule", "signs": [], **nothing}
        assert entry in listed
    assert "never-seen" in underpass(bed.pins, "guard", "list").ok().out
    name = Path("/proc/self/exe").readlink().name
    underpass(bed.pins, "guard", "deny", name).ok()
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    assert not _carried(underpass_, near, far)
    listed = underpass(bed.pins, "guard", "list", "--json").document()
    assert [p["pid"] != 0 for p in listed if p["name"] == name] == [True, True]
    for one in ("never-seen", "friend"):
        underpass(bed.pins, "guard", "forget", one).ok()
    assert _unseen(underpass_) == []


@pytest.mark.parametrize("name", ["", "/usr/bin/curl", "x" * 32, "é" * 16, "\udcff", "a\nb"])
@pytest.mark.parametrize("word", ["allow", "deny", "forget"])
def test_what_is_no_name(bed: Bed, plane: MakePlane, word: str, name: str) -> None:
    """Claim: what can be no program's name is a usage error of one line, and no rule."""
    underpass_ = plane()
    underpass(bed.pins, "guard", word, name).failed(2, "name", "guard list")
    assert underpass_.rules() == {}


def test_a_rule_for_a_program_that_was_evicted(bed: Bed, plane: MakePlane) -> None:
    """Claim: the rule for one program by its id is listed and taken back without the program."""
    underpass_ = plane()
    couple(bed.worker("client"), bed.worker("server"), TO)
    (program, *_) = underpass_.programs()
    underpass(bed.pins, "guard", "deny", program.id).ok()
    libbpf.delete(underpass_.fd("programs"), abi.u64(int(program.id, 16)))
    [listed] = _unseen(underpass_)
    assert (listed.id, listed.name, listed.verdict) == (program.id, "", "denied")
    underpass(bed.pins, "guard", "forget", program.id).ok()
    assert underpass_.rules() == {}


def test_a_rule_for_a_link(
    bed: Bed, plane: MakePlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: who names a symbolic link, or a script, is told what its program goes by."""
    underpass_ = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), TO)
    assert _carried(underpass_, near, far)
    (tmp_path / "our-server").symlink_to(Path("/proc/self/exe").resolve())
    (tmp_path / "our-script").write_text("#!/bin/sh\n")
    (tmp_path / "our-script").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = underpass(bed.pins, "guard", "deny", "our-server").ok().out
    step = shlex.split(re.findall("`(.*?)`", said)[0])
    assert step[1:] == ["--pins", str(bed.pins), "guard", "deny", _of(underpass_, near.worker).name]
    assert "2 known" in underpass(bed.pins, *step[3:]).ok().out
    assert not _carried(underpass_, near, far)
    assert "is a script" in underpass(bed.pins, "guard", "allow", "our-script").ok().out


def test_owners_of_standing_listeners_are_found(bed: Bed, plane: MakePlane) -> None:
    """Claim: a program that listened before `up` is known by its own identity afterwards."""
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, TO)
    underpass_ = plane(SOON, watch=True)
    near = connect(client, TO)
    far = listener.accept()
    _run_until_admitted(underpass_, near, far)
    assert _carried(underpass_, connect(client, TO), listener.accept())


def test_identity_is_the_same_in_both_worlds(bed: Bed, plane: MakePlane) -> None:
    """Claim: the kernel's key of a program is the one that is computed from /proc."""
    underpass_ = plane(SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    couple(client, server, TO)
    for worker in (client, server):
        program = _of(underpass_, worker)
        assert (program.pid, program.by_arguments) == (worker.pid, True)
        assert "underpass.torture.worker" in program.command


def test_multipath_tcp_is_left_alone(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections over MPTCP work and never enter the map."""
    for where in ("client", "server"):
        bed.within(where, "sysctl", "-qw", "net.mptcp.enabled=1")
    underpass_ = plane()
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, TO, protocol=IPPROTO_MPTCP)
    near = connect(client, TO, protocol=IPPROTO_MPTCP)
    far = listener.accept()
    near.send(1, MESSAGE)
    far.receive(1, MESSAGE)
    far.send(2, MESSAGE)
    near.receive(2, MESSAGE)
    assert underpass_.counters().shortcut_messages_total == 0
    assert underpass_.endpoints() == []


def test_a_listener_of_multipath_tcp_is_no_sign(bed: Bed, plane: MakePlane) -> None:
    """Claim: what it accepts from plain TCP is watched and admitted as any other (Go's default)."""
    bed.within("server", "sysctl", "-qw", "net.mptcp.enabled=1")
    underpass = plane(SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, TO, protocol=IPPROTO_MPTCP)
    near = connect(client, TO)
    _run_until_admitted(underpass, near, listener.accept())
    assert _of(underpass, server).signs == []
    near = connect(client, TO)
    assert _carried(underpass, near, listener.accept())
