"""Fixtures of tests with the real kernel: the bed and a data plane of the test's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import pytest

from tests.kernel import bed as beds
from tests.kernel.bed import Bed
from tests.kernel.kernel_objects import sock_ops_on, wait_gone
from underpass import dataplane, knobs
from underpass.dataplane import Dataplane
from underpass.model import Fault, Settings
from underpass.torture.kernel_objects import pinned

COUNTS = "tcp_bpf_ioctl" in knobs._symbols()
"""This kernel's FIONREAD counts what is redirected."""


class MakePlane(Protocol):
    """Loads the data plane on the bed's cgroup."""

    def __call__(
        self, settings: Settings = ..., faults: Fault = ..., *, watch: bool = ...
    ) -> Dataplane:
        """`watch`: programs are watched before they are admitted, as in life."""


@pytest.fixture(scope="session")
def clean_machine() -> Iterator[None]:
    """Sweep what dead runs left; at the end nothing of this run may be left."""
    if os.geteuid() != 0:
        pytest.skip("kernel tests need root: run them with sudo")
    beds.sweep()
    yield
    assert beds.leftovers(os.getpid()) == []


@pytest.fixture
def bed(clean_machine: None) -> Iterator[Bed]:  # noqa: ARG001 - swept before, checked after
    """A bed of the test's own; see `tests.kernel.bed`."""
    with contextlib.ExitStack() as undo:
        yield beds.make_bed(undo)


@pytest.fixture
def plane(bed: Bed) -> Iterator[MakePlane]:
    """Load the data plane for the test; afterwards take it down and see that nothing is left."""
    opened = contextlib.ExitStack()

    def make(
        settings: Settings = beds.USUAL, faults: Fault = Fault(0), *, watch: bool = False
    ) -> Dataplane:
        if not watch:
            settings = replace(settings, admit_unknown=True)
        dataplane.up(bed.pins, bed.cgroup, settings, faults)
        return opened.enter_context(Dataplane.open(bed.pins))

    with opened:
        yield make
    bed.kill_workers()
    if bed.pins.exists():
        objects = pinned(bed.pins)
        assert dataplane.down(bed.pins) == []
        assert not bed.pins.exists()
        wait_gone(objects)
    assert sock_ops_on(bed.cgroup) == []


@pytest.fixture
def miscounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data plane that takes this kernel for one that does not count what is redirected."""
    has = knobs._has_symbol
    monkeypatch.setattr(knobs, "_has_symbol", lambda name: name != "tcp_bpf_ioctl" and has(name))
