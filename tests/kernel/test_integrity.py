"""No byte lost, swapped or repeated, whatever the connection does and whichever path it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.kernel.bed import SERVER4, SERVER6, Bed
from tests.kernel.fixtures import MakePlane
from underpass.model import Fault
from underpass.torture.plans import HALF_CLOSE_IN_MID_STREAM, SMALL_MESSAGES, Batch, Mode, mixed
from underpass.torture.traffic import Report, run_batch

FAMILIES = pytest.mark.parametrize(
    ("target", "listen"),
    [
        pytest.param(SERVER4, SERVER4, id="IPv4"),
        pytest.param(SERVER6, SERVER6, id="IPv6"),
        pytest.param(SERVER4, "::", id="IPv4 to a dual-stack listener"),
        pytest.param(f"::ffff:{SERVER4}", "::", id="IPv4-mapped at both ends"),
    ],
)
ROUNDS = 5
"""Of deferred clients, until a server reads in time: on a busy machine none of 500 may."""
FORCED = 0.3
"""Share of messages thrown onto TCP at random."""


def _deferred(bed: Bed, deadline: float = 30) -> Report:
    batch = Batch(1, (SMALL_MESSAGES,) * 500, SERVER4, deferred=True, deadline=deadline)
    return run_batch(bed.worker("client"), bed.worker("server"), batch)


def _mixed(bed: Bed, target: str, listen: str, seed: int, deadline: float = 30) -> Report:
    batch = Batch(1, mixed(200, seed), target, listen, deadline=deadline)
    return run_batch(bed.worker("client"), bed.worker("server"), batch)


def test_deferred_clients_lose_no_order(bed: Bed, plane: MakePlane) -> None:
    """Claim: 500 times, 64 messages behind a deferred handshake ACK arrive in order."""
    underpass = plane()
    for rounds in range(1, ROUNDS + 1):
        _deferred(bed).check()
        counters = underpass.counters()
        assert counters.pairs_total == 500 * rounds
        assert counters.tcp_messages_total["tcp-unread"] > 0
        if counters.shortcut_messages_total:
            return
    pytest.fail(f"all of {500 * ROUNDS} clients had sent all before their servers read any")


def test_writers_that_wait_for_the_connection(bed: Bed, plane: MakePlane) -> None:
    """Claim: what is written before the handshake is over arrives in order, 500 times."""
    underpass = plane()
    batch = Batch(1, (SMALL_MESSAGES,) * 500, SERVER4, writer_waits=True)
    run_batch(bed.worker("client"), bed.worker("server"), batch).check()
    assert underpass.counters().pairs_total == 500


def test_deferred_clients_catch_a_missing_gate(bed: Bed, plane: MakePlane) -> None:
    """Claim: the check above fails when messages are redirected past unread TCP bytes."""
    plane(faults=Fault.NO_GATE)
    report = _deferred(bed)
    with pytest.raises(AssertionError, match="bytes from offset"):
        report.check()


def test_deferred_clients_catch_a_drop(bed: Bed, plane: MakePlane) -> None:
    """Claim: the check above fails when a doubt is answered with SK_DROP instead of TCP."""
    plane(faults=Fault.SK_DROP)
    with pytest.raises(AssertionError, match="PermissionError"):
        _deferred(bed, deadline=5).check()


@FAMILIES
def test_every_shape_by_the_shortcut(bed: Bed, plane: MakePlane, target: str, listen: str) -> None:
    """Claim: 200 connections of every shape are right, and the shortcut carried most bytes."""
    underpass = plane()
    report = _mixed(bed, target, listen, seed=3)
    report.check()
    counters = underpass.counters()
    assert counters.pairs_total == 200
    assert counters.shortcut_bytes_total > report.sent_bytes // 2


@FAMILIES
def test_every_shape_with_forced_switches(
    bed: Bed, plane: MakePlane, measured: Callable[[str], None], target: str, listen: str
) -> None:
    """Claim: streams stay right while messages are thrown between the paths at random."""
    underpass = plane()
    underpass.set_forced(FORCED)
    report = _mixed(bed, target, listen, seed=4)
    measured(f"forced switches, {target} to {listen}: {report.woken} blocking reads woken early")
    report.check()
    counters = underpass.counters()
    assert counters.pairs_total == 200
    assert counters.tcp_messages_total["forced"] > 1000
    assert counters.shortcut_messages_total > 1000


def test_forced_switches_catch_a_missing_gate(bed: Bed, plane: MakePlane) -> None:
    """Claim: the check above fails when the gate is off."""
    plane(faults=Fault.NO_GATE).set_forced(FORCED)
    report = _mixed(bed, SERVER4, SERVER4, seed=4, deadline=10)
    with pytest.raises(AssertionError, match="bytes from offset"):
        report.check()


def test_half_close_in_mid_stream(bed: Bed, plane: MakePlane) -> None:
    """Claim: 600 ends that half-close while the other end sends at full speed lose no byte."""
    underpass = plane()
    client, server = bed.worker("client"), bed.worker("server")
    for number, mode in enumerate((Mode.BLOCKING, Mode.LEVEL, Mode.SHORT)):
        plans = (replace(HALF_CLOSE_IN_MID_STREAM, mode=mode),) * 200
        batch = Batch(number, plans, SERVER4, first_port=20000 + 200 * number)
        run_batch(client, server, batch).check()
    assert underpass.counters().pairs_total == 600


@pytest.mark.timeout(1200)
def test_torture(bed: Bed, plane: MakePlane, *, long_run: bool) -> None:
    """Claim: the same for many seeds and shares of forced switches."""
    if not long_run:
        pytest.skip("a long run: set UNDERPASS_LONG=1")
    underpass = plane()
    client, server = bed.worker("client"), bed.worker("server")
    for seed in range(160):
        underpass.set_forced((0.0, 0.02, 0.3, 0.9)[seed % 4])
        plans = mixed(200, seed)
        if seed % 5 == 0:
            plans = tuple(replace(HALF_CLOSE_IN_MID_STREAM, mode=plan.mode) for plan in plans)
        first_port = 20000 + 200 * seed
        batch = Batch(seed, plans, SERVER4, first_port=first_port, deferred=seed % 3 == 0)
        run_batch(client, server, batch).check()
