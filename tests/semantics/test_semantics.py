"""Each row of docs/SEMANTICS.md, and the document itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest

from tests.kernel import bed as beds
from tests.kernel.bed import Bed
from tests.kernel.fixtures import MakePlane
from tests.semantics import document
from tests.semantics.rows import BY_NAME, ROWS, RUN
from tests.semantics.runner import judged, observe
from tests.semantics.table import Row, Seen, Verdict, judge
from underpass import dataplane
from underpass.model import Fault


@pytest.fixture(scope="module")
def wrong(clean_machine: None) -> Iterator[dict[str, str]]:  # noqa: ARG001 - swept before
    """What is wrong with each row, by its name; all are run at once."""
    with contextlib.ExitStack() as undo:
        bed = beds.make_bed(undo)
        dataplane.up(bed.pins, bed.cgroup, beds.UNGUARDED)
        found = judged(bed, RUN)
        bed.kill_workers()
        assert dataplane.down(bed.pins) == []
        yield found


@pytest.mark.parametrize("row", RUN, ids=lambda row: row.name)
def test_row(row: Row, wrong: dict[str, str]) -> None:
    """Claim: the call does what docs/SEMANTICS.md says, on plain TCP and on the shortcut."""
    assert not wrong[row.name], wrong[row.name]


def test_the_document_is_what_the_rows_say() -> None:
    """Claim: docs/SEMANTICS.md says what the rows say."""
    hint = "run `.venv/bin/python -m tests.semantics`"
    assert document.PATH.read_text() == document.text(), hint


def test_every_difference_has_a_reason() -> None:
    """Claim: no row that differs goes without a reason, and no two rows have one name."""
    assert [row.name for row in ROWS if row.verdict is not Verdict.SAME and not row.why] == []
    assert len(BY_NAME) == len(ROWS)


def test_a_blind_switch_is_seen(bed: Bed, plane: MakePlane) -> None:
    """Claim: a data plane that passes over readers asleep in TCP fails its row."""
    plane(beds.UNGUARDED, faults=Fault.BLIND_READER)
    (row,) = (row for row in RUN if "MSG_WAITALL)` asleep" in row.call)
    native, shortcut = observe(bed, [row])[row.name]
    assert judge(row, native, shortcut).startswith("shortcut: ")


def test_a_missing_gate_is_seen(bed: Bed, plane: MakePlane) -> None:
    """Claim: a data plane that redirects while TCP bytes are unread fails the row about order."""
    plane(beds.UNGUARDED, faults=Fault.NO_GATE)
    (row,) = (row for row in RUN if "read at the end" in row.call)
    native, shortcut = observe(bed, [row])[row.name]
    assert judge(row, native, shortcut).startswith("shortcut: ")


_ROW = next(row for row in RUN if row.verdict is Verdict.SAME and row.carries)
_SEEN = Seen(_ROW.plain[0], _ROW.carries)


@pytest.mark.parametrize(
    ("row", "shortcut"),
    [
        (_ROW, Seen("hangs", _ROW.carries)),
        (_ROW, Seen(_ROW.plain[0], _ROW.carries - 1)),
        (dataclasses.replace(_ROW, carries=0), _SEEN),
        (dataclasses.replace(_ROW, verdict=Verdict.GUARDED, shortcut=()), _SEEN),
        (dataclasses.replace(_ROW, verdict=Verdict.ACCEPTED, shortcut=("else",)), _SEEN),
    ],
    ids=["other outcome", "too few bytes", "bytes where none should go", "unguarded", "no longer"],
)
def test_the_judge_catches(row: Row, shortcut: Seen) -> None:
    """Claim: a row fails for a wrong outcome, and for bytes that took the wrong path."""
    assert judge(_ROW, _SEEN, _SEEN) == ""
    assert judge(row, _SEEN, shortcut)
