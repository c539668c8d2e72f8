"""Whose verdict counts: who serves a connection need not be who listened, nor be seen to."""

from __future__ import annotations

import platform
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel import remote
from tests.kernel import test_guard as guard
from tests.kernel.bed import ADMITTING, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.handing import hand_on
from tests.kernel.remote import Remote, connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass import abi, libbpf, programs
from underpass.generation import Dataplane
from underpass.model import Fault, Rule
from underpass.torture.worker import Worker

TO, ELSEWHERE = (SERVER4, 8080), (SERVER4, 8081)
MESSAGE = guard.MESSAGE
SHORT = 100
NARROW = Path(__file__).with_name("narrow.c")


def _forget_by_pressure(plane: Dataplane, worker: Worker) -> None:
    """What an LRU does when it is full: the entry is gone, and with it what was known."""
    found = programs.identify(worker.pid)
    assert found is not None
    libbpf.delete(plane.fd("programs"), abi.u64(found[0]))


@dataclass(frozen=True)
class _Handed:
    """A listener that its program never accepted from, in the hands of a new one."""

    client: Worker
    holder: Worker
    heir: Worker
    listener: Remote

    @classmethod
    def on(cls, plane: Dataplane, bed: Bed) -> _Handed:
        """Client and holder are admitted."""
        client, holder = _admit_a_holder(plane, bed)
        heir = bed.worker("server")
        return cls(client, holder, heir, hand_on(listen(holder, ELSEWHERE), heir))

    def pair(self) -> tuple[Remote, Remote]:
        """A connection that the heir has accepted."""
        return connect(self.client, ELSEWHERE), self.listener.accept()


def _admit_a_holder(plane: Dataplane, bed: Bed) -> tuple[Worker, Worker]:
    """A client, and an admitted program in the server's pod that has never accepted."""
    client, server = guard._admit(plane, bed)
    holder = bed.worker("server")
    guard._run_until_admitted(plane, *couple(holder, server, (SERVER4, 8082)))
    return client, holder


@pytest.mark.parametrize("fault", [Fault(0), Fault.LISTENER_DECIDES], ids=["rule", "twin"])
def test_who_accepts_decides(bed: Bed, plane: MakePlane, fault: Fault) -> None:
    """Claim: a new program that was handed a listener gets its first bytes by TCP."""
    underpass = plane(guard.SOON, fault, watch=True)
    handed = _Handed.on(underpass, bed)
    near = connect(handed.client, ELSEWHERE)
    near.send(1, MESSAGE)  # before anybody has accepted
    far = handed.listener.accept()
    if fault:
        with pytest.raises(BlockingIOError):
            far.worker.call(guard._splice_now, far.number, MESSAGE)
        return
    assert far.worker.submit(guard._splice, far.number, MESSAGE).result(20) == MESSAGE
    assert guard._of(underpass, handed.heir).verdict == "kept-out"
    assert guard._of(underpass, handed.holder).verdict == "admitted"
    again = handed.pair()
    for _ in range(3):
        assert not guard._carried(underpass, *again)


def test_who_was_handed_a_listener_is_watched(bed: Bed, plane: MakePlane) -> None:
    """Claim: its first connection leaves the map, and it is admitted once it has run."""
    underpass = plane(guard.SOON, watch=True)
    handed = _Handed.on(underpass, bed)
    first = handed.pair()
    assert not guard._carried(underpass, *first)

    def left() -> bool:
        exchange(*first, 1, rounds=1)
        return underpass.endpoints() == []

    wait_until(left, "the pair leaves the map")
    guard._run_until_admitted(underpass, *handed.pair())
    assert guard._carried(underpass, *handed.pair())


def test_of_several_who_accept_the_new_one_decides(bed: Bed, plane: MakePlane) -> None:
    """Claim: an admitted program's calls do not admit another that shares its listener."""
    underpass = plane(guard.SOON, watch=True)
    client, holder = guard._admit(underpass, bed)
    own = listen(holder, ELSEWHERE)
    first = connect(client, ELSEWHERE), own.accept()
    assert guard._carried(underpass, *first)
    shared = hand_on(own, bed.worker("server"))
    connect(client, ELSEWHERE)
    shared.accept()
    connect(client, ELSEWHERE)
    own.accept()
    assert not guard._carried(underpass, connect(client, ELSEWHERE), shared.accept())
    assert guard._carried(underpass, *first)


@pytest.mark.parametrize("fault", [Fault(0), Fault.LISTENER_DECIDES], ids=["rule", "twin"])
def test_every_message_to_who_was_handed_a_listener(
    bed: Bed, plane: MakePlane, fault: Fault
) -> None:
    """Claim: small messages, each read before the next, stay on TCP until the heir is admitted."""
    underpass = plane(guard.SOON, fault, watch=True)
    near, far = _Handed.on(underpass, bed).pair()
    before = underpass.counters().shortcut_messages_total
    near.send(1, SHORT)
    far.receive(1, SHORT)
    for _ in range(3):
        near.send(1, SHORT)
    if fault:
        assert underpass.counters().shortcut_messages_total == before + 4
        return
    assert underpass.counters().shortcut_messages_total == before
    assert far.worker.call(guard._splice_now, far.number, 4 * SHORT) == 3 * SHORT


def test_an_accept_in_vain_admits_nobody(bed: Bed, plane: MakePlane) -> None:
    """Claim: of a herd, the admitted program's failed accept does not speak for the new one."""
    underpass = plane(guard.SOON, watch=True)
    client, holder = guard._admit(underpass, bed)
    own = listen(holder, ELSEWHERE)
    heir = bed.worker("server")
    shared = hand_on(own, heir)
    for accepting in (own, shared):
        connect(client, ELSEWHERE)
        accepting.accept()
    near = connect(client, ELSEWHERE)
    far = shared.accept()
    with pytest.raises(BlockingIOError):
        holder.call(_accept_now, own.number)
    before = underpass.counters().shortcut_messages_total
    near.send(1, SHORT)
    assert underpass.counters().shortcut_messages_total == before
    assert heir.call(guard._splice_now, far.number, SHORT) == SHORT


@pytest.mark.parametrize("size", [SHORT, MESSAGE])
def test_workers_that_share_a_listener_are_not_slowed(
    bed: Bed, plane: MakePlane, size: int
) -> None:
    """Claim: with two admitted programs at one listener all requests take the shortcut."""
    underpass = plane(guard.SOON, watch=True)
    client, one = guard._admit(underpass, bed)
    two = bed.worker("server")
    guard._run_until_admitted(underpass, *couple(client, two, (SERVER4, 8082)))
    own = listen(one, ELSEWHERE)
    shared = hand_on(own, two)
    for accepting in (shared, own):
        connect(client, ELSEWHERE)
        accepting.accept()
    for accepting in (own, shared, own, shared):
        before = underpass.counters().shortcut_messages_total
        near = connect(client, ELSEWHERE)
        near.send(1, size)
        far = accepting.accept()
        far.receive(1, size)
        assert underpass.counters().shortcut_messages_total == before + 1


@pytest.mark.parametrize(
    ("old", "new"), [(SERVER4, "0.0.0.0"), ("0.0.0.0", "::"), ("::", "0.0.0.0")]
)
def test_a_listener_that_has_closed_has_no_say(
    bed: Bed, plane: MakePlane, old: str, new: str
) -> None:
    """Claim: a new program on the port of an admitted one that has gone is watched first."""
    underpass = plane(guard.SOON, watch=True)
    client, server = guard._admit(underpass, bed)
    to = (SERVER4, 8090)
    listener = listen(server, (old, 8090))
    for end in (connect(client, to), listener.accept(), listener):
        end.close()
    heir = bed.worker("server")
    listener = listen(heir, (new, 8090))
    near, far = connect(client, to), listener.accept()
    before = underpass.counters().shortcut_messages_total
    near.send(1, SHORT)
    assert underpass.counters().shortcut_messages_total == before
    assert heir.call(guard._splice_now, far.number, SHORT) == SHORT


def _accept_now(number: int) -> None:
    listener = remote._SOCKETS[number]
    listener.setblocking(False)
    listener.accept()


def test_a_forgotten_server_is_met_again(bed: Bed, plane: MakePlane) -> None:
    """Claim: a server that only accepts and had to make room in the list comes back into it."""
    underpass = plane(guard.SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, TO)
    guard._run_until_admitted(underpass, connect(client, TO), listener.accept())
    _forget_by_pressure(underpass, server)
    near, far = connect(client, TO), listener.accept()
    guard._run_until_admitted(underpass, near, far)
    assert guard._carried(underpass, connect(client, TO), listener.accept())


def test_a_forgotten_denial_holds(bed: Bed, plane: MakePlane) -> None:
    """Claim: a denied server stays denied when the list has lost it, even if all are admitted."""
    underpass = plane(ADMITTING)
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, TO)
    assert guard._carried(underpass, connect(client, TO), listener.accept())
    underpass.set_rule(guard._of(underpass, server).id, Rule.DENY)
    _forget_by_pressure(underpass, server)
    for _ in range(3):
        assert not guard._carried(underpass, connect(client, TO), listener.accept())
    assert guard._of(underpass, server).verdict == "denied"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="written for x86")
@pytest.mark.parametrize("bits", [64, 32])
def test_programs_of_32_bits_stay_on_tcp(
    bed: Bed, plane: MakePlane, tmp_path: Path, bits: int
) -> None:
    """Claim: a program whose system calls we cannot read stays on TCP; one of 64 bits does not."""
    program = tmp_path / f"narrow{bits}"
    build = ["clang", f"-m{bits}", "-nostdlib", "-static", "-ffreestanding", "-O1"]
    made = subprocess.run(
        [*build, "-o", program, NARROW], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    underpass = plane(guard.SOON, watch=True)
    client, server = guard._admit(underpass, bed)
    listener = listen(server, ELSEWHERE)

    def runs() -> bool:
        """One connection of the program; whether the shortcut carried any of it."""
        before = underpass.counters().shortcut_messages_total
        running = client.submit(_run, str(program))
        far = listener.accept()
        for _ in range(5):
            far.send(1, MESSAGE)
            far.receive(1, MESSAGE)
            time.sleep(guard.SOON.observe_seconds / 4)
        far.close()
        assert running.result(20) == 0
        return underpass.counters().shortcut_messages_total > before

    assert not runs()
    assert runs() == (bits == 64)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="written for x86")
def test_a_listener_handed_to_a_program_of_32_bits(
    bed: Bed, plane: MakePlane, tmp_path: Path
) -> None:
    """Claim: it is not taken for who listened: its MSG_WAITALL reads are whole."""
    program = tmp_path / "narrow"
    build = ["clang", "-m32", "-nostdlib", "-static", "-ffreestanding", "-O1", "-DSERVER"]
    subprocess.run([*build, "-o", program, NARROW], check=True)
    underpass = plane(guard.SOON, watch=True)
    client, holder = _admit_a_holder(underpass, bed)
    listener = listen(holder, ELSEWHERE)
    listener.set_option(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))
    running = holder.submit(_serve, str(program), listener.number)
    near = connect(client, ELSEWHERE)
    before = underpass.counters().shortcut_messages_total
    for _ in range(6):
        near.send(1, SHORT)
        time.sleep(0.1)
    assert running.result(20) == 0
    assert underpass.counters().shortcut_messages_total == before


def _serve(program: str, number: int) -> int:
    """Run it with the listener as its standard input."""
    listener = remote._SOCKETS[number]
    listener.setblocking(True)
    return subprocess.run([program], stdin=listener.fileno(), check=False, timeout=30).returncode


def _run(program: str) -> int:
    return subprocess.run([program], check=False, timeout=30).returncode
