"""What docs/MESH.md calls tested has a test of that name, and every test that it names is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs/MESH.md").read_text()
_TOLD = re.compile(r"`(?:tests/\w+/)?(?:(test_\w+\.py|…)(?:::(test_\w+))?|(test_\w+)|…(_\w+))`")
"""A file, a test of it, a test of whatever file, the end of the name of one in the file before."""


def _tests() -> dict[str, set[str]]:
    """By file, the names of the tests in it."""
    defined = re.compile(r"^def (test_\w+)\(", re.MULTILINE)
    found: dict[str, set[str]] = {}
    for path in (_ROOT / "tests").rglob("test_*.py"):  # two directories may have one of a name
        found.setdefault(path.name, set()).update(defined.findall(path.read_text()))
    return found


def _rows(page: str, first: str) -> Iterator[list[str]]:
    """The cells of each row of the tables whose first column has this head."""
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not line.startswith("|--"):
            yield cells


def wrong(page: str, tests: dict[str, set[str]]) -> list[str]:
    """The rows of a page that promise a test without naming one, and what they name in vain."""
    promising = [
        *(cells for cells in _rows(page, "with") if cells[1] == "tested"),
        *_rows(page, "plan"),
        *_rows(page, "handshake"),
    ]
    found = [cells[0] for cells in promising if not _TOLD.search(cells[-1])]
    every, file = set().union(*tests.values()), ""
    for told in _TOLD.finditer(page):
        path, test, anywhere, ending = told.groups()
        file = path if path and path != "…" else file
        known = tests.get(file, set())
        good = (
            test in known if test
            else anywhere in every if anywhere
            else any(name.endswith(ending) for name in known) if ending
            else file in tests
        )  # fmt: skip
        found += [] if good else [told.group()]
    return found


def test_every_promise_of_the_page_has_its_test() -> None:
    """Claim: all rows that say tested, and all address plans, name tests that are there."""
    assert len(list(_rows(_PAGE, "plan"))) > 40
    assert wrong(_PAGE, _tests()) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("`test_bodies_are_right`", "`test_bodies_are_left`", "`test_bodies_are_left`"),
        ("`…_loses_no_order`", "`…_loses_all`", "`…_loses_all`"),
        ("`test_isolation.py`", "`test_insulation.py`", "`test_insulation.py`"),
        ("`test_services.py::test_ipvs_pairs`", "none", "IPVS, masqueraded"),
    ],
)
def test_a_promise_without_a_test_is_told(old: str, new: str, told: str) -> None:
    """Twin: a name that is wrong or missing is found."""
    assert old in _PAGE
    assert told in wrong(_PAGE.replace(old, new), _tests())
