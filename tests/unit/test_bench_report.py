"""The table, the document and the chart; the paths and leftovers of the bed."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from underpass.bench import chart, report
from underpass.bench.bed import leftovers
from underpass.bench.compare import Mode, Moved, Outcome, Placement, Reading, Sample, Spread, Volume
from underpass.bench.programs import QPERF
from underpass.bench.runner import Plan
from underpass.bench.way import Reach, Way
from underpass.errors import Usage

PLAN = Plan(QPERF, (Placement("one-core", (0,), (0,)),), rounds=2, seconds=1, unix_milliseconds=200)


def outcomes(carried: float = 1.0) -> list[Outcome]:
    found = []
    for measure in QPERF.measures(Reach(Path()), 1):
        samples = []
        for number in range(2):
            for mode, figure in ((Mode.DEFAULT, 10.0), (Mode.SHORTCUT, 4.0), (Mode.UNIX, 3.0)):
                reading = Reading(figure + number, Volume("messages", 1000), 1000)
                count = int(1000 * carried) if mode is Mode.SHORTCUT else 0
                moved = Moved(2 if count else 0, count, 0, {"tcp-unread": 1000 - count})
                samples.append(Sample(mode, number, reading, moved))
        found.append(Outcome(measure.row("one-core"), tuple(samples)))
    return found


def text(rows: list[Outcome]) -> str:
    out = io.StringIO()
    document = report.document(PLAN, Way(), rows, 0.0)
    report.print_tables(rows, PLAN, document, Console(file=out, width=180))
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(4.153, "4.15"), (12.64, "12.6"), (846.2, "846"), (24912.0, "24900"), (1680.0, "1680")],
)
def test_three_digits_as_qperf_prints(value: float, shown: str) -> None:
    """Figures carry no more digits than qperf itself gives."""
    assert report.figure(value) == shown


def test_the_table_is_the_references_own() -> None:
    """The reference's columns, a line for each of its sizes, and a spread under each median."""
    shown = text(outcomes())
    for words in ("Packet Size", "Shortcut", "Default", "tcp_lat (us)", "tcp_bw (Mb/s)", "AF_UNIX"):
        assert words in shown
    for size in ("1", "4", "16", "64", "256", "1024", "4096", "16384"):
        assert f"│ {size:>11} │" in shown
    assert "4.00..5.00" in shown
    assert "0.43x" in shown
    assert "*" not in shown


def test_a_row_held_on_tcp_is_marked() -> None:
    """A share below a half is marked and explained, so that nobody takes it for the shortcut."""
    shown = text(outcomes(carried=0.1))
    assert "10% *" in shown
    assert "most of this went by TCP" in shown
    assert "do not bear this comparison out" in shown


def test_the_document_is_whole_json() -> None:
    """Every run with its counters is in the document, and it survives JSON."""
    document = json.loads(json.dumps(report.document(PLAN, Way("iptables", 5), outcomes(), 0.0)))
    assert document["ok"] is True
    assert document["path"] == "veth + bridge + service address + 5 iptables rules"
    row = document["rows"][0]
    assert row["default"] == {"median": 10.5, "low": 10.0, "high": 11.0}
    assert len(row["runs"]) == 6
    assert row["runs"][1]["counters"]["shortcut_messages"] == 1000
    assert document["machine"]["kernel"] == os.uname().release
    refused = report.document(PLAN, Way(), outcomes(carried=0.1), 0.0)
    assert refused["ok"] is False
    assert refused["failures"]


def test_figures_beside_a_rows_own_are_shown_and_told() -> None:
    """What runs say beside their figure has a table, and stands in the document by mode."""
    row = outcomes()[0].row
    reading = Reading(10.0, Volume("bytes", 1e9))
    runs = tuple(Sample(m, 0, reading, Moved(2, 1, 10**9), 0.25) for m in Mode)
    shown = text([Outcome(row, runs), *outcomes()[1:]])
    assert "CPU seconds per GB" in shown
    assert "0.25" in shown
    (told, *_) = report.document(PLAN, Way(), [Outcome(row, runs)], 0.0)["rows"]
    price = {"median": 0.25, "low": 0.25, "high": 0.25}
    assert told["also"]["shortcut"] == {"cpu_seconds_per_gigabyte": price}
    assert told["runs"][0]["cpu_seconds"] == 0.25
    assert "beside it" not in text(outcomes())


def test_the_naive_bypass_has_a_column_where_it_ran() -> None:
    """Its figure stands beside the others, with the runs that broke; without it no word of it."""
    rows = []
    for outcome in outcomes():
        moved = Moved(naive_messages=1000)
        naive = Sample(Mode.NAIVE, 0, outcome.samples[0].reading, moved)
        rows.append(
            Outcome(outcome.row, (*outcome.samples, naive), ("round 2: cannot run x: hung",))
        )
    shown = text(rows)
    assert "Naive" in shown
    assert "1 broke" in shown
    told = report.document(PLAN, Way(), rows, 0.0)["rows"][0]
    assert told["naive"] == {"median": 10.0, "low": 10.0, "high": 10.0}
    assert told["naive_broken"] == ["round 2: cannot run x: hung"]
    assert "Naive" not in text(outcomes())


def test_the_chart_is_drawn_in_both_formats(tmp_path: Path) -> None:
    """A PNG and an SVG come out, with every size of the reference on the axis."""
    pytest.importorskip("matplotlib")
    rows = outcomes()
    document = report.document(PLAN, Way(), rows, 0.0)
    assert chart.draw(rows, PLAN, document, tmp_path) is None
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_a_single_run_shows_no_spread() -> None:
    """One run has no lowest and highest."""
    assert report.cell(Spread(4.0, 4.0, 4.0)) == "4.00"


def test_only_leftovers_of_dead_benchmarks_are_swept() -> None:
    """The names of a living process's benchmark, and all other names, are left alone."""
    parent, dead = os.getppid(), 2**22 + 1  # above the highest pid there can be
    names = [f"up-bench-{parent}-a", f"underpass-bench-{parent}", f"up-bench-{dead}-sw"]
    names += [f"underpass-bench-{dead}", f"underpass-benchmark-{dead}", "underpass", f"{dead}"]
    assert leftovers(names) == [dead]


def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    """Claim: that is told before anything is measured; nothing is made meanwhile."""
    report.check(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "deep", Path("/proc/none")):
        with pytest.raises(Usage, match="cannot write to"):
            report.check(wrong)
