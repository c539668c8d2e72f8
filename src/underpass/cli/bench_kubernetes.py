"""`underpass bench --kubernetes`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import click

from underpass.bench import kubernetes, report
from underpass.bench.compare import Outcome
from underpass.bench.runner import Plan
from underpass.bench.way import Reach, Way
from underpass.bench.workloads import choose
from underpass.cli.interrupt import interruptible
from underpass.model import many


class Reporter(Protocol):
    """Tells how far it is."""

    def done(self, what: str) -> None:
        """One more run is."""


@dataclass(frozen=True)
class Wanted:
    """Where to measure, and how often."""

    kubectl: kubernetes.Kubectl
    node: str | None
    image: str
    rounds: int
    seconds: int


def run(
    wanted: Wanted, reporter: Callable[[int], AbstractContextManager[Reporter]]
) -> tuple[dict[str, Any], list[Outcome], Plan]:
    """Measure; the document, the rows, and the plan that was followed.

    Raises:
        UnderpassError: the cluster, a pod or qperf is not as it has to be.
    """
    started = time.time()
    with interruptible("the benchmark"):
        there = kubernetes.find_node(wanted.kubectl, wanted.node)
        workload = replace(choose("qperf"), needs={}, unix=False)
        plan = Plan(workload, (there,), wanted.rounds, wanted.seconds)
        bed = kubernetes.Bed(wanted.kubectl, there, wanted.image)
        rows = len(workload.measures(_NOWHERE, wanted.seconds))
        total = 2 * rows * wanted.rounds
        minutes = total * (wanted.seconds + 2) / 60
        click.echo(
            f"{many(rows, 'row')} on node {there.name}, about {minutes:.0f} minutes", err=True
        )
        with bed.made(), reporter(total) as told:
            bed.warm()
            outcomes = kubernetes.compare(bed, plan, told.done)
    document = report.document(plan, Way(), outcomes, started) | {
        "path": "pod network",
        "path_counter": None,
        "machine": kubernetes.machine(there),
    }
    return document, outcomes, plan


_NOWHERE = Reach(Path())
