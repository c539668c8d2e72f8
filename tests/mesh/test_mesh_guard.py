"""Envoy under the guard: watched first, then admitted for what it does, like any program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.kernel.bed import ADMITTING
from tests.kernel.commands import underpass
from tests.kernel.waiting import wait_until
from tests.mesh.conftest import Running, running
from tests.mesh.legs import curl, load, steady, url, wrong
from underpass.bench.envoy import Kind
from underpass.bench.mesh import Leg

WATCHED = replace(ADMITTING, admit_unknown=False, observe_seconds=1.0)
KINDS = (Kind.TCP, Kind.MTLS)


@pytest.mark.usefixtures("clean_machine")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
def test_envoy_is_admitted_after_it_was_watched(kind: Kind) -> None:
    """Claim: Envoy shows no sign; what it opens once it is admitted takes the shortcut, all legs.

    What it opened while it was watched stays on TCP, counted as observed.
    """
    with running(settings=WATCHED) as run:
        curl(run.mesh, kind, url(run.mesh, kind))
        assert run.plane.counters().pairs_total == 0
        assert verdicts(run)["envoy"] == "watched"
        with load(run, kind):
            names = {"envoy", "nginx", "wrk"}

            def admitted() -> bool:
                told = verdicts(run)
                assert set(told.values()) <= {"watched", "admitted"}, told
                return all(told.get(name) == "admitted" for name in names)

            wait_until(admitted, f"{names} are admitted: {verdicts(run)}", 40)
        assert run.plane.counters().refused_total["observed"] > 0
        run.mesh.restart_envoys()  # which closes what they kept open
        with load(run, kind):
            assert wrong(*steady(run, kind), run, kind) == []


@pytest.mark.usefixtures("clean_machine")
def test_a_denied_envoy_stays_on_tcp() -> None:
    """Twin: `guard deny envoy` keeps every leg on TCP, and the judgement says so."""
    with running() as run:
        underpass(run.bed.pins, "guard", "deny", "envoy").ok()
        with load(run, Kind.TCP):
            wait_until(
                lambda: run.plane.counters().refused_total["guarded"] >= len(Leg), "it is denied"
            )
            told = wrong([], [], run, Kind.TCP)
            assert len(told) == len(Leg), told
            assert run.plane.counters().shortcut_messages_total == 0


def verdicts(run: Running) -> dict[str, str]:
    """What the guard thinks of each program, by its name."""
    listed: list[dict[str, Any]] = underpass(run.bed.pins, "guard", "list", "--json").document()
    return {str(line["name"]): str(line["verdict"]) for line in listed}
