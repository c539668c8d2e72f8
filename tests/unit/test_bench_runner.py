"""How a comparison runs: what a broken run of the naive bypass may do to the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from underpass.bench import runner
from underpass.bench.bed import Bed
from underpass.bench.compare import Mode, Placement, Reading, Volume
from underpass.bench.naive import Naive
from underpass.bench.programs import Measure, Workload
from underpass.bench.way import Reach
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.model import Counters

HERE = Placement("one-core", (0,), (0,))


class Fake:
    """A bed, a generation and a stage without a kernel; ``breaks`` says which runs fail."""

    def __init__(self, breaks: Callable[[Mode], bool]) -> None:
        self.breaks, self.said, self.reach = breaks, cast("list[str]", []), Reach(Path())

    def counters(self) -> Counters:
        return Counters(0, 0, 0, {}, {"not-local": 0, "small-stream": 0})

    def cpu_seconds(self) -> float:
        return 0.0

    def passed(self) -> int:
        return 0

    def redirected(self) -> tuple[int, int]:
        return (0, 0)

    def client(self, mode: Mode, *_: object) -> str:
        if self.breaks(mode):
            raise UnderpassError("run", "wrk", "no end after 11 s", "see whether it answers")
        return "1.0"

    def end_servers(self, modes: list[Mode]) -> None:
        self.said += [f"end {mode.value}" for mode in modes]


def compare(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> list[Any]:
    measure = Measure(
        "t", "row", "u", False, 0.0, lambda _: [], lambda t: Reading(float(t), Volume("bytes", 1))
    )

    def serve(_: object, mode: Mode) -> None:
        fake.said.append(f"serve {mode.value}")

    class Stage:
        placement = HERE

        def __init__(self, *_: object) -> None:
            self.client, self.end_servers = fake.client, fake.end_servers

    monkeypatch.setattr(runner, "Stage", Stage)
    plan = runner.Plan(Workload("w", {}, serve, lambda *_: [measure]), (HERE,), 2, 1, naive=True)
    kernel = (cast("Dataplane", fake), cast("Naive", fake))
    return list(runner.Comparison(plan, cast("Bed", fake), kernel, lambda _: None).run())


def test_a_naive_run_that_breaks_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its line, its servers are started afresh, and everything else is measured on."""
    fake = Fake(lambda mode: mode is Mode.NAIVE)
    (outcome,) = compare(monkeypatch, fake)
    assert [line[:15] for line in outcome.broken] == ["round 1: cannot", "round 2: cannot"]
    assert len(outcome.figures(Mode.DEFAULT)) == len(outcome.figures(Mode.SHORTCUT)) == 2
    assert outcome.spread(Mode.NAIVE) is None
    again = ["end naive", "serve naive"]
    assert fake.said[3:-3] == again * 2
    assert fake.said[-3:] == ["end default", "end shortcut", "end naive"]


@pytest.mark.parametrize("mode", [Mode.DEFAULT, Mode.SHORTCUT])
def test_any_other_run_that_breaks_ends_it(monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    """A run that underpass or plain TCP stands for must not fail."""
    with pytest.raises(UnderpassError, match="no end after 11 s"):
        compare(monkeypatch, Fake(lambda at: at is mode))


class Trailing(Fake):
    """Every run leaves messages behind that are counted with later looks, or in the next run."""

    def __init__(self) -> None:
        super().__init__(lambda _: False)
        self.counted = self.under_way = 0

    def counters(self) -> Counters:
        if self.under_way:
            self.under_way, self.counted = self.under_way - 1, self.counted + 1
        return replace(super().counters(), shortcut_messages_total=self.counted)

    def client(self, mode: Mode, *rest: object) -> str:
        self.counted, self.under_way = self.counted + self.under_way, 4
        return super().client(mode, *rest)


def test_what_a_run_left_under_way_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins when the counters stand still: only its own first message is seen here."""
    (outcome,) = compare(monkeypatch, Trailing())
    assert [sample.moved.shortcut_messages for sample in outcome.samples] == [1] * 6
