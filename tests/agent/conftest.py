"""An agent of the test's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.agent.agents import Agent
from tests.kernel.bed import Bed
from tests.kernel.kernel_objects import wait_gone
from underpass import dataplane
from underpass.torture.kernel_objects import pinned


class StartAgent(Protocol):
    """Starts an agent on the bed's cgroup and pins."""

    def __call__(
        self, *words: str, inside: Sequence[str] = ..., top: str = ..., **options: str
    ) -> Agent:
        """`words` of the command line, `inside` what runs it, the others of the configuration."""


@pytest.fixture
def agent(bed: Bed, tmp_path: Path) -> Iterator[StartAgent]:
    """Start agents; afterwards end them, take down what they left, and see that it is gone."""
    started: list[Agent] = []

    def start(*words: str, inside: Sequence[str] = (), top: str = "", **options: str) -> Agent:
        started.append(Agent(bed, tmp_path, *words, inside=inside, top=top, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
    bed.kill_workers()
    objects = pinned(bed.pins)
    assert dataplane.down(bed.pins) == []
    wait_gone(objects)
