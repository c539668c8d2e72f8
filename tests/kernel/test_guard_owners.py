"""Whose verdict counts: who serves a connection need not be who listened, nor be seen to."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

import pytest

from tests.kernel import test_guard as guard
from tests.kernel.bed import ADMITTING, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.handing import hand_on
from tests.kernel.remote import connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass import abi, libbpf, programs
from underpass.generation import Dataplane
from underpass.model import Fault, Rule
from underpass.torture.worker import Worker

TO, ELSEWHERE = (SERVER4, 8080), (SERVER4, 8081)
MESSAGE = guard.MESSAGE
NARROW = Path(__file__).with_name("narrow.c")


def _forget_by_pressure(plane: Dataplane, worker: Worker) -> None:
    """What an LRU does when it is full: the entry is gone, and with it what was known."""
    found = programs.identify(worker.pid)
    assert found is not None
    libbpf.delete(plane.fd("programs"), abi.u64(found[0]))


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
    client, holder = _admit_a_holder(underpass, bed)
    heir = bed.worker("server")
    listener = hand_on(listen(holder, ELSEWHERE), heir)
    near = connect(client, ELSEWHERE)
    near.send(1, MESSAGE)  # before anybody has accepted
    far = listener.accept()
    if fault:
        with pytest.raises(BlockingIOError):
            heir.call(guard._splice_now, far.number, MESSAGE)
        return
    assert heir.submit(guard._splice, far.number, MESSAGE).result(20) == MESSAGE
    assert guard._of(underpass, heir).verdict == "kept-out"
    assert guard._of(underpass, holder).verdict == "admitted"
    near, far = connect(client, ELSEWHERE), listener.accept()
    for _ in range(3):
        assert not guard._carried(underpass, near, far)


def test_who_was_handed_a_listener_is_watched(bed: Bed, plane: MakePlane) -> None:
    """Claim: its first connection leaves the map, and it is admitted once it has run."""
    underpass = plane(guard.SOON, watch=True)
    client, holder = _admit_a_holder(underpass, bed)
    heir = bed.worker("server")
    listener = hand_on(listen(holder, ELSEWHERE), heir)
    near = connect(client, ELSEWHERE)
    far = listener.accept()
    assert not guard._carried(underpass, near, far)

    def left() -> bool:
        exchange(near, far, 1, rounds=1)
        return underpass.endpoints() == []

    wait_until(left, "the pair leaves the map")
    again = connect(client, ELSEWHERE), listener.accept()
    guard._run_until_admitted(underpass, *again)
    assert guard._carried(underpass, connect(client, ELSEWHERE), listener.accept())


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


def _run(program: str) -> int:
    return subprocess.run([program], check=False, timeout=30).returncode
