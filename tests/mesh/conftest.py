"""A mesh of real sidecars in the benchmark's bed, with a generation of the test's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.apps.programs import find
from tests.kernel.bed import ADMITTING, BPFFS, NETNS, cgroup2, mount_bpffs
from underpass.bench import bed as beds
from underpass.bench.bed import Bed
from underpass.bench.mesh import EVERY, Cover, Mesh, Part
from underpass.bench.runner import generation
from underpass.bench.way import Way
from underpass.dataplane import Dataplane
from underpass.model import Settings


@dataclass(frozen=True)
class Running:
    """A mesh whose server answers, and what is attached to its cgroup."""

    bed: Bed
    mesh: Mesh
    plane: Dataplane


@contextlib.contextmanager
def running(parts: frozenset[Part] = EVERY, settings: Settings = ADMITTING) -> Iterator[Running]:
    """A mesh with these parts in the covered cgroup; afterwards nothing of it is left."""
    for program, package in (("nginx", "nginx"), ("iptables-restore", "iptables")):
        find(program, package)
    mount_bpffs()
    beds.sweep(cgroup2())
    with Bed(cgroup2(), Way()) as bed, generation(bed, settings) as plane:
        mesh = Mesh(bed, "mesh", Cover(bed.shortcut, bed.default, parts))
        mesh.start()
        mesh.serve_site()
        yield Running(bed, mesh, plane)
    places = (cgroup2(), BPFFS, NETNS)
    names = [path.name for place in places for path in place.iterdir()]
    assert os.getpid() not in beds.leftovers(names)
    assert not bed.directory.exists()


@pytest.fixture(scope="module")
def whole(clean_machine: None) -> Iterator[Running]:  # noqa: ARG001 - it needs root, too
    """A mesh that is covered as a whole, for all tests of a module."""
    with running() as mesh:
        yield mesh


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory for what clients write."""
    tmp_path.chmod(0o755)
    return tmp_path
