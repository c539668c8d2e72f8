"""Rule 4: a direction that streams small messages leaves; requests and answers stay."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from tests.kernel.waiting import wait_until
from underpass.generation import Dataplane
from underpass.model import Fault, Settings, Small
from underpass.torture.patience import SLOW, patient
from underpass.torture.plans import KIB

ADDRESS = (SERVER4, 8080)
#: The bound on every road: what is tested is what happens below it and above.
LIMIT = 64
SETTINGS = Settings(small=Small(*[LIMIT] * len(Small._fields)))
TINY = 8
#: More messages than it takes to be judged.
MANY = 600
CONNECTIONS = 200
CALL = 60


def _ends(bed: Bed) -> tuple[Remote, Remote]:
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    exchange(near, far, 1)
    return near, far


def _burst(near: Remote, far: Remote, stream: int = 1, write: int = TINY) -> None:
    """Messages that wait for their reader, who then takes all of them."""
    near.send(stream, MANY * write, write)
    far.receive(stream, MANY * write)


def _left(underpass: Dataplane) -> dict[str, int]:
    return {reason: n for reason, n in underpass.counters().refused_total.items() if n}


def _wait_both_leave(underpass: Dataplane, near: Remote, far: Remote, stream: int) -> None:
    def gone() -> bool:
        near.send(stream, TINY)
        far.receive(stream, TINY)
        return underpass.endpoints() == []

    wait_until(gone, "both ends leave the map")


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize("nodelay", [False, True])
def test_a_stream_of_small_messages_leaves(
    bed: Bed, plane: MakePlane, sender: str, *, nodelay: bool
) -> None:
    """Claim: both ends leave the map, for this reason, and not a byte is lost on the way."""
    underpass = plane(SETTINGS)
    near, far = _ends(bed)
    source, sink, stream = (near, far, 1) if sender == "client" else (far, near, 2)
    source.set_option(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    _burst(source, sink, stream)
    _wait_both_leave(underpass, source, sink, stream)
    assert _left(underpass) == {"small-stream": 2}
    exchange(near, far, 1)


def test_it_goes_only_when_its_reader_has_taken_all(bed: Bed, plane: MakePlane) -> None:
    """Claim: no byte goes by TCP behind one that waits redirected: whoever peeks sees them all."""
    underpass = plane(SETTINGS)
    near, far = _ends(bed)
    for size in (MANY * TINY, MANY * TINY - TINY):
        near.send(1, size, TINY)
        assert sum(underpass.counters().tcp_messages_total.values()) == 0
        far.receive(1, size - TINY)
    near.send(1, TINY)
    assert sum(underpass.counters().tcp_messages_total.values()) == 0
    far.receive(1, 3 * TINY)
    near.send(1, TINY)
    assert underpass.counters().tcp_messages_total["leaving"] == 1
    far.receive(1, TINY)
    _wait_both_leave(underpass, near, far, 1)


def test_a_thread_that_sleeps_in_recv_keeps_the_stream(bed: Bed, plane: MakePlane) -> None:
    """Claim: TCP's room for more would wake it for nothing; once it is gone the stream leaves."""
    underpass = plane(SETTINGS)
    near, far = _ends(bed)
    reading = near.submit_read(2, TINY, patient(20))
    wait_until(near.sleeps_in_recv, "a thread sleeps in recv")
    _burst(near, far)
    _burst(near, far)
    assert (len(underpass.endpoints()), _left(underpass)) == (2, {})
    assert sum(underpass.counters().tcp_messages_total.values()) == 0
    far.send(2, TINY)
    reading.result(patient(20))
    _burst(near, far)
    _wait_both_leave(underpass, near, far, 1)


def test_a_stream_that_nobody_answers_from_the_first_byte(bed: Bed, plane: MakePlane) -> None:
    """Claim: a server that only ever sends, and that its client never spoke to, leaves with it."""
    underpass = plane(SETTINGS)
    near, far = couple(bed.worker("client"), bed.worker("server"), ADDRESS)
    _burst(far, near)
    _wait_both_leave(underpass, far, near, 1)
    near.send(2, KIB)
    far.receive(2, KIB)


def _ping_pong(near: Remote, far: Remote) -> None:
    for _ in range(MANY):
        near.send(1, TINY)
        far.receive(1, TINY)
        far.send(2, TINY)
        near.receive(2, TINY)


def _pipelined(near: Remote, far: Remote) -> None:
    for _ in range(MANY // 16):
        near.send(1, 16 * TINY, TINY)
        far.receive(1, 16 * TINY)
        far.send(2, 16 * TINY, TINY)
        near.receive(2, 16 * TINY)


def _long_answers(near: Remote, far: Remote) -> None:
    for _ in range(MANY // 100):
        near.send(1, 100 * TINY, TINY)
        far.receive(1, 100 * TINY)
        far.send(2, 64 * KIB, 64 * KIB)
        near.receive(2, 64 * KIB)


def _trickle(near: Remote, far: Remote) -> None:
    for _ in range(2 * MANY):
        near.send(1, TINY)
        far.receive(1, TINY)


def _large(near: Remote, far: Remote) -> None:
    _burst(near, far, write=LIMIT)


def _mixed(near: Remote, far: Remote) -> None:
    for _ in range(MANY // 10):
        near.send(1, 20 * TINY, TINY)
        near.send(1, 64 * KIB, 64 * KIB)
        far.receive(1, 20 * TINY + 64 * KIB)


@pytest.mark.parametrize("talk", [_ping_pong, _pipelined, _long_answers, _trickle, _large, _mixed])
def test_what_is_no_small_stream_stays(
    bed: Bed, plane: MakePlane, talk: Callable[[Remote, Remote], None]
) -> None:
    """Claim: requests, pipelined too, single messages and large ones keep the shortcut."""
    underpass = plane(replace(SETTINGS, reproof_seconds=0))  # a slow machine talks for longer
    near, far = _ends(bed)
    talk(near, far)
    assert (len(underpass.endpoints()), _left(underpass)) == (2, {})
    assert sum(underpass.counters().tcp_messages_total.values()) == 0


@pytest.mark.parametrize("talk", [_pipelined, _long_answers])
def test_the_check_catches_one_that_does_not_look_for_answers(
    bed: Bed, plane: MakePlane, talk: Callable[[Remote, Remote], None]
) -> None:
    """Claim: judged by its messages alone, pipelined traffic leaves, and the check above fails."""
    underpass = plane(SETTINGS, Fault.DEAF)
    near, far = _ends(bed)
    talk(near, far)
    assert underpass.counters().tcp_messages_total["leaving"] > 0


def test_the_rule_can_be_switched_off(bed: Bed, plane: MakePlane) -> None:
    """Claim: with a bound of 0 no stream leaves; set at run time, the bound holds at once."""
    underpass = plane(replace(SETTINGS, small=Small(*[0] * len(Small._fields))))
    near, far = _ends(bed)
    _burst(near, far)
    assert (len(underpass.endpoints()), _left(underpass)) == (2, {})
    underpass.set_small(SETTINGS.small)
    _burst(near, far)
    _wait_both_leave(underpass, near, far, 1)


def _run(command: list[str]) -> str:
    """Run a program in a worker's place; what it complained of, empty if it was content."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL, check=False)
    return done.stderr or ("" if done.returncode == 0 else f"exit {done.returncode}")


@pytest.fixture(scope="session")
def duplex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of `duplex.c`."""
    program = tmp_path_factory.mktemp("duplex") / "duplex"
    source = Path(__file__).with_name("duplex.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["clang", *flags, "-o", program, source], check=True)
    return program


def _both_ways(bed: Bed, duplex: Path, connections: int) -> list[str]:
    """Streams both ways whose ends leave in the midst of them; what was wrong."""
    words = [SERVER4, "8080", str(connections), str(4000 * TINY)]
    server, client = bed.worker("server"), bed.worker("client")
    serving = server.submit(_run, [str(duplex), "listen", *words])
    wait_until(lambda: bed.within("server", "ss", "-Hltn"), "it listens")
    asking = client.submit(_run, [str(duplex), "connect", *words])
    return [said for said in (asking.result(CALL), serving.result(CALL)) if said]


def test_nothing_is_lost_while_both_ends_leave(bed: Bed, plane: MakePlane, duplex: Path) -> None:
    """Claim: ends that leave while the other is sending lose, swap and refuse nothing.

    What they must ask before they leave has its twin in `test_leaving.py`.
    """
    underpass = plane(SETTINGS, Fault.DEAF)  # so that they leave though both send
    assert _both_ways(bed, duplex, int(CONNECTIONS / SLOW)) == []
    assert _left(underpass)["small-stream"] > CONNECTIONS / SLOW
    assert underpass.endpoints() == []
