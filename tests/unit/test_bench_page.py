"""The page that is passed on: whole, in one file, and true to the JSON report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_bench_report import PLAN, outcomes
from underpass.bench import drawing, page, report
from underpass.bench.compare import Outcome, Row
from underpass.bench.way import Way
from underpass.errors import UnderpassError, Usage

#: Elements that HTML closes by itself.
VOID = {"meta", "br", "hr", "img", "link", "input"}
#: What makes a browser look outside a page.
OUTSIDE = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}


class Page(HTMLParser):
    """A page taken apart: text by cells, the embedded data, what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in OUTSIDE]
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data += data
        elif "td" in self.open:
            self.cells[-1][-1] += data


def document(rows: list[Outcome]) -> dict[str, Any]:
    return report.document(PLAN, Way(), rows, 0.0)


def test_the_page_is_whole() -> None:
    """Every element is closed, and every row of the report is a line of a table."""
    shown = Page(page.render(document(outcomes())))
    assert shown.open == []
    for outcome in outcomes():
        row = outcome.row
        (line,) = [c for c in shown.cells if c[:3] == [row.test, row.label, row.unit]]
        assert line[3] == "10.510.0..11.0"
        assert line[4] == "4.504.00..5.00"
        assert line[5] == "3.503.00..4.00"
        assert line[6].startswith("0.43x")
    assert shown.tags.count("svg") == 2


def test_the_page_holds_every_run_and_the_json_report() -> None:
    """The embedded JSON is the JSON report, and each round of each mode has a line."""
    told = document(outcomes())
    shown = Page(page.render(told))
    assert json.loads(shown.data) == json.loads(json.dumps(told))
    runs = [c[:5] for c in shown.cells if c[:1] == ["one-core"]]
    assert len(runs) == sum(len(o.samples) for o in outcomes())
    assert ["one-core", "tcp_bw", "64", "shortcut", "2"] in runs


def test_the_page_says_where_it_comes_from() -> None:
    """Machine, kernel and settings stand on the page as the JSON report has them."""
    told = document(outcomes())
    shown = {tuple(c[:2]): c[2] for c in Page(page.render(told)).cells if len(c) == 3}
    assert shown["machine", "kernel"] == os.uname().release
    assert shown["machine", "cpu"] == told["machine"]["cpu"]
    assert shown["settings", "rounds"] == "2"
    assert ("versions", "underpass") in shown


def test_nothing_is_fetched() -> None:
    """No address, no script that runs, no attribute that makes a browser look elsewhere."""
    text = page.render(document(outcomes()))
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    shown = Page(text)
    assert shown.fetched == []
    assert "link" not in shown.tags
    assert shown.tags.count("script") == 1  # the data


def test_what_others_wrote_cannot_leave_its_place() -> None:
    """Names, versions and failures are text, whatever they hold."""
    hostile = '</script><b onload="x">&amp;\''
    told = document([])
    told["benchmark"] = told["path"] = told["machine"]["cpu"] = told["versions"]["wrk"] = hostile
    told["ok"], told["failures"] = False, [hostile]
    row = report.document(PLAN, Way(), [bars()], 0.0)["rows"][0]
    told["rows"] = [{**row, "placement": "one-core", "label": hostile, "unit": hostile}]
    text = page.render(told)
    shown = Page(text)
    assert shown.open == []
    assert "b" not in shown.tags
    assert json.loads(shown.data) == json.loads(json.dumps(told))
    assert ["versions", "wrk", hostile] in shown.cells


def bars() -> Outcome:
    row = Row("one-core", "redis", "GET", "requests/s", less_is_better=False, floor=0.99)
    return Outcome(row, outcomes()[0].samples)


def test_a_workload_without_sizes_gets_bars() -> None:
    """Where rows have no size a bar stands for each way, longest where the figure is highest."""
    text = page.render(document([bars()]))
    assert text.count("<rect") == 3
    assert "<polyline" not in text


def test_figures_beside_a_rows_own_have_lines() -> None:
    """CPU seconds per gigabyte stand on the page where the report has them."""
    row = report.document(PLAN, Way(), [bars()], 0.0)["rows"][0]
    spread = {"median": 0.5, "low": 0.4, "high": 0.6}
    told = document([])
    told["rows"] = [{**row, "also": {"default": {"cpu_seconds_per_gigabyte": spread}}}]
    cells = Page(page.render(told)).cells
    assert ["redis", "GET", "CPU seconds per GB", "0.5000.400..0.600"] in cells


def test_a_naive_run_that_broke_is_told() -> None:
    """The naive bypass has a line in the charts, and its cell says what broke and what it is."""
    told = document(outcomes())
    told["settings"]["naive"] = True
    for row in told["rows"]:
        row["naive"] = row["shortcut"]
        row["naive_broken"] = ["round 1: <hung>"]
    text = page.render(told)
    cells = Page(text).cells[1]
    assert cells[5] == "4.504.00..5.001 broke: round 1: <hung>"
    assert text.count('class="line naive"') == 2
    assert "to show what the promise costs" in text
    assert "Naive" not in page.render(document(outcomes()))


def test_a_comparison_that_is_not_proven_says_so_first() -> None:
    """Runs that the counters do not bear out are named before any figure."""
    text = page.render(document(outcomes(carried=0.1)))
    assert text.index("Not proven") < text.index("<table")
    assert "10% *" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (4.153, "4.15"), (24912.0, "24,900"), (0.0123, "0.0123")]
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    """Figures on the page have no more digits than their spread allows for."""
    assert drawing.number(value) == shown


def test_a_page_that_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    """Refused: a directory, in a missing one, a pipe that nobody reads, a loop, too long a name."""
    os.mkfifo(tmp_path / "pipe")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    long = tmp_path / ("x" * 300)
    for wrong in (tmp_path, tmp_path / "no" / "page.html", tmp_path / "pipe", loop, long):
        with pytest.raises(Usage, match="name a file that can be written") as raised:
            page.check(wrong)
        assert str(wrong) in str(raised.value)
        assert raised.value.exit_code == 2


def test_the_command_refuses_it_in_one_line(tmp_path: Path) -> None:
    """`bench --report` into a missing directory is a usage error, before anything is made."""
    target = tmp_path / "no" / "page.html"
    run = "from underpass.cli import main; main()"
    words = [sys.executable, "-c", run, "bench", "--report", str(target)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        f"underpass: cannot write {target}: No such file or directory;"
        " name a file that can be written"
    )


def test_the_check_leaves_no_file_and_harms_none(tmp_path: Path) -> None:
    """Asking whether a page can be written leaves what was there, and nothing where nothing was."""
    old, new = tmp_path / "old.html", tmp_path / "new.html"
    old.write_text("yesterday's")
    page.check(old)
    page.check(new)
    page.check(Path("/dev/null"))
    link = tmp_path / "link.html"
    link.symlink_to(new)
    page.check(link)
    assert link.is_symlink()
    assert old.read_text() == "yesterday's"
    assert not new.exists()
    assert Path("/dev/null").is_char_device()


def test_a_page_is_written_as_rendered(tmp_path: Path) -> None:
    """The file is the page; a file that cannot be written after all is one line."""
    told = document(outcomes())
    page.write(told, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page.render(told)
    with pytest.raises(UnderpassError, match="cannot write"):
        page.write(told, tmp_path)
