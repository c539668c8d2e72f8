"""`underpass torture`: right on the product, and not to be deceived by a planted fault."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.bed import BPFFS
from tests.kernel.commands import Done, command, start, underpass
from tests.kernel.waiting import wait_until
from underpass.generation import Dataplane
from underpass.model import Fault
from underpass.torture.bed import leftovers
from underpass.torture.patience import fewer, patient

SECONDS = round(patient(int(os.environ.get("UNDERPASS_TORTURE_SECONDS", "20"))))
"""Of the clean run: CI asks for more."""
FOUND_WITHIN = 60
"""Seconds in which every planted fault has to be found."""
PINS = BPFFS / "underpass-test-no-such-pins"
MUST_FIND = (
    Fault.NO_GATE,
    Fault.ACKED_GATE,
    Fault.ADDRESS_KEYS,
    Fault.NO_BUDGET,
    Fault.DRAIN_UNREAD,
    Fault.SK_DROP,
    Fault.STALE_PEER,
)
pytestmark = pytest.mark.usefixtures("clean_machine")


def _torture(*words: str, seconds: int) -> tuple[int, Any, str]:
    """Run it to its end: exit code, the JSON document, stderr. Nothing may be left behind."""
    process = start(command(PINS, "torture", "--seconds", str(seconds), "--json", *words))
    try:
        out, err = process.communicate(timeout=seconds + 200)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.communicate()
        raise
    assert leftovers(process.pid) == []
    return process.returncode, Done(0, out, "").document(), err


@pytest.mark.timeout(SECONDS + 240)
def test_a_run_without_a_fault(measured: Callable[[str], None]) -> None:
    """Claim: every shape, under every disturbance: 0 errors, 0 leaks, thousands of connections."""
    code, result, err = _torture("--seed", "5", seconds=SECONDS)
    assert (code, result["errors"], result["leaks"]) == (0, [], []), err
    measured(
        f"torture: {result['connections']} connections, {result['bytes']} bytes, "
        f"{result['path_switches']} path switches in {result['seconds']} s; "
        f"disturbed by {result['disturbances']}"
    )
    assert result["connections"] > fewer(100 * SECONDS)
    assert result["bytes"] > fewer(SECONDS << 20)
    assert result["messages"]["shortcut"] > 1000
    assert result["messages"]["tcp"]["tcp-unread"] > 0
    assert result["disturbances"]["down-up"] > 0
    assert result["killed"] > 0


@pytest.mark.timeout(FOUND_WITHIN + 240)
@pytest.mark.parametrize("fault", MUST_FIND, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Fault, measured: Callable[[str], None]) -> None:
    """Claim: with this rule left out the run fails within a minute, and says on what."""
    assert fault.name
    code, result, err = _torture("--seed", "5", "--fault", fault.name, seconds=FOUND_WITHIN)
    assert code == 1, err
    assert result["errors"], err
    assert "Traceback" not in err
    measured(f"torture found {fault.name} after {result['seconds']} s: {result['errors'][0]}")


def _running() -> subprocess.Popen[str]:
    """A run that has made its surroundings, and whose lanes have begun.

    While threads are being started, a signal's exception can meet one half-way (CPython's
    Thread.start), and its traceback is nobody's fault here.
    """
    process = start(command(PINS, "torture", "--seconds", "100", "--seed", "1"))
    pins = BPFFS / f"underpass-torture-{process.pid}"
    wait_until((pins / "link_handshake").exists, "the generation is up", 60)
    with Dataplane.open(pins) as plane:
        wait_until(plane.open_pairs, "the torture is under way", 60)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals) -> None:
    """Claim: each of them ends it in one line; namespaces, cgroup, pins and processes are gone."""
    process = _running()
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == (130 if number is signal.SIGINT else 1)
    assert number.name in err.splitlines()[-1]
    assert "Traceback" not in err
    assert leftovers(process.pid) == []


def test_what_a_killed_run_left_is_swept() -> None:
    """Claim: the next run removes what one that was killed could not."""
    process = _running()
    process.kill()
    process.communicate(timeout=60)
    assert len(leftovers(process.pid)) >= 6
    code, _, err = _torture("--connections", "1", seconds=10)
    assert code == 0, err
    assert leftovers(process.pid) == []


@pytest.mark.parametrize("words", [("--seconds", "0"), ("--fault", "none"), ("--seed", "-1")])
def test_wrong_words(words: tuple[str, ...]) -> None:
    """Claim: a wrong value is a usage error in one line."""
    underpass(PINS, "torture", *words).failed(2)
