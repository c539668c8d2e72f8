"""The tests' own tools, without underpass: right streams pass, every kind of wrong is named."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.bed import CLIENT4, REPOSITORY, SERVER4, SERVER6, Bed, leftovers, sweep
from tests.kernel.remote import couple, exchange
from tests.kernel.waiting import wait_until
from underpass.torture.churn import Churn, churn_connect, churn_serve
from underpass.torture.patience import patient
from underpass.torture.plans import BUSY, MIB, SMALL_MESSAGES, Batch, Mode, Plan, Step, mixed
from underpass.torture.traffic import Running, run_batch


@pytest.mark.parametrize(
    ("target", "listen"),
    [(SERVER4, SERVER4), (SERVER6, SERVER6), (SERVER4, "::"), (f"::ffff:{SERVER4}", "::")],
)
def test_plain_tcp_passes_every_shape(bed: Bed, target: str, listen: str) -> None:
    """Claim: over plain TCP every shape in every mode and address family is found right."""
    batch = Batch(1, mixed(200, seed=1), target, listen)
    report = run_batch(bed.worker("client"), bed.worker("server"), batch)
    report.check()
    assert report.woken == 0


def test_plain_tcp_passes_deferred_clients(bed: Bed) -> None:
    """Claim: over plain TCP 64 messages behind a deferred handshake ACK arrive in order."""
    batch = Batch(1, (SMALL_MESSAGES,) * 100, SERVER4, source=CLIENT4, deferred=True)
    run_batch(bed.worker("client"), bed.worker("server"), batch).check()


@pytest.mark.parametrize("mode", Mode)
def test_streams_until_stop_are_counted(bed: Bed, mode: Mode) -> None:
    """Claim: streams that end when the test says so are whole over plain TCP."""
    batch = Batch(1, (replace(BUSY, mode=mode),) * 10, SERVER4)
    running = Running(bed.worker("client"), bed.worker("server"), batch)
    wait_until(lambda: running.moved() > 10 * MIB, "traffic moves")
    running.stop()
    report = running.report()
    report.check()
    assert report.sent_bytes > 10 * MIB


@pytest.mark.parametrize("mode", Mode)
def test_a_hang_names_its_connection(bed: Bed, mode: Mode) -> None:
    """Claim: a connection on which awaited bytes never come is reported, the others are right."""
    deaf = Plan("deaf", (Step(send=1), Step(receive=1)), (Step(receive=1), Step(receive=1)), mode)
    plans = (*mixed(20, seed=2), deaf)
    batch = Batch(1, plans, SERVER4, deadline=3)
    wrong = run_batch(bed.worker("client"), bed.worker("server"), batch).wrong
    assert len(wrong) == 1
    assert wrong[0].startswith(f"connection 20 (port 20020, deaf, {mode.value})")
    assert "HungError" in wrong[0]


def test_lost_bytes_are_found(bed: Bed) -> None:
    """Claim: an end that closes before it has sent all is reported with the offset."""
    early = Plan("early", (Step(send=100, shut=True),), (Step(receive=200),))
    batch = Batch(1, (early,), SERVER4, deadline=5)
    [line] = run_batch(bed.worker("client"), bed.worker("server"), batch).wrong
    assert "EOF at offset 100 of 200" in line


@pytest.mark.usefixtures("clean_machine")
def test_an_interrupted_run_leaves_nothing() -> None:
    """Claim: Ctrl-C undoes the bed: namespaces, cgroups, pins and workers."""
    script = (
        "import contextlib, signal\n"
        "from tests.kernel.bed import make_bed\n"
        "with contextlib.ExitStack() as undo:\n"
        "    bed = make_bed(undo)\n"
        "    bed.pins.mkdir()\n"
        "    print(bed.worker('client').pid, flush=True)\n"
        "    signal.pause()\n"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        worker = Path(f"/proc/{int(running.stdout.readline())}")
        assert worker.exists()
        running.send_signal(signal.SIGINT)
        assert running.wait(30) != 0
    assert leftovers(running.pid) == []
    assert not worker.exists()


@pytest.mark.usefixtures("clean_machine")
def test_what_a_dead_run_left_is_swept() -> None:
    """Claim: namespaces, cgroups and pins of a killed run are removed by the next one."""
    script = (
        "import contextlib, os, signal\n"
        "from tests.kernel.bed import make_bed\n"
        "bed = make_bed(contextlib.ExitStack())\n"
        "bed.pins.mkdir()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dead = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY)
    assert dead.wait(30) == -signal.SIGKILL
    assert len(leftovers(dead.pid)) == 6
    sweep()
    assert leftovers(dead.pid) == []


@pytest.mark.parametrize("processes", [0, 2])
def test_plain_tcp_passes_short_connections(bed: Bed, processes: int) -> None:
    """Claim: short connections are right over plain TCP, with threads or forked acceptors."""
    churn = Churn((SERVER4, 8080), 4000, processes=processes)
    serving = bed.worker("server").submit(churn_serve, churn)
    assert bed.worker("client").call(churn_connect, churn) == []
    assert serving.result(patient(20)) == []


def test_plain_tcp_stops_a_sender(bed: Bed) -> None:
    """Claim: over plain TCP a reader that does not read stops the sender; all is right after."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    accepted = near.fill(1, 65536, 128 * MIB)
    assert accepted < 64 * MIB
    far.receive(1, accepted)
    exchange(near, far, 1)
