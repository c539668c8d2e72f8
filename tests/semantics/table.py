"""Rows of the semantics table: what a call does on plain TCP, on the shortcut, and why that is."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.semantics.stage import Stage

Act = Callable[[Stage], str]
Outcomes = str | tuple[str, ...]
"""What may be seen: one outcome, or one for each kind of kernel."""
TEN = b"0123456789"
"""What most rows send."""


class Verdict(enum.Enum):
    """What underpass makes of a difference."""

    SAME = "same"
    GUARDED = "different, guarded"
    ACCEPTED = "different, accepted"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        subject: heading it stands under.
        call: what the program does.
        plain: what it may see on plain TCP.
        shortcut: what it may see on the shortcut; empty where a guard keeps every byte off it.
        verdict: what we make of it.
        why: the reason, or what guards it.
        carries: bytes that go by the shortcut at least when `shortcut` is seen; 0: not one.
        act: makes it happen and says what was seen; None where nothing is run.
    """

    subject: str
    call: str
    plain: tuple[str, ...]
    shortcut: tuple[str, ...]
    verdict: Verdict
    why: str
    carries: int
    act: Act | None

    @property
    def name(self) -> str:
        """The row in a test's name and on a command line."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.subject} {self.call}".lower()).strip("-")


@dataclass(frozen=True)
class Seen:
    """What one run of a row gave: its outcome, and the bytes that went by the shortcut."""

    outcome: str
    carried: int = 0


def judge(row: Row, native: Seen, shortcut: Seen) -> str:
    """What is wrong with the row, given what was seen; empty if it is as the table says."""
    if native.outcome not in row.plain:
        return f"plain TCP: {native.outcome!r}, the table says {' or '.join(row.plain)!r}"
    if row.verdict is Verdict.GUARDED and shortcut.outcome == native.outcome:
        wanted = None if row.shortcut else 0  # how much went before the guard saw it is its own
    elif row.verdict is Verdict.SAME and shortcut.outcome != native.outcome:
        return f"shortcut: {shortcut.outcome!r}, plain TCP: {native.outcome!r}"
    elif row.verdict is not Verdict.SAME and shortcut.outcome not in row.shortcut:
        return f"shortcut: {shortcut.outcome!r}, the table says {' or '.join(row.shortcut)!r}"
    else:
        wanted = row.carries
    if wanted == 0 and shortcut.carried:
        return f"{shortcut.carried} bytes went by the shortcut, and none should"
    if wanted and shortcut.carried < wanted:
        return f"{shortcut.carried} bytes went by the shortcut, {wanted} should"
    return ""


def _all_of(outcomes: Outcomes) -> tuple[str, ...]:
    return (outcomes,) if isinstance(outcomes, str) else outcomes


class Subject:
    """A heading of the table. Its methods decorate the functions that are its rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []

    def same(
        self, call: str, outcome: Outcomes, why: str = "", carries: int = len(TEN)
    ) -> Callable[[Act], Act]:
        """A row whose outcome is the same on both paths."""
        return self._add(call, outcome, outcome, Verdict.SAME, why, carries)

    def guarded(
        self, call: str, plain: Outcomes, why: str, unguarded: Outcomes = (), carries: int = 0
    ) -> Callable[[Act], Act]:
        """A row that would differ, and whose bytes stay on TCP instead.

        `unguarded` is what is seen where the guard is off, or comes too late: it learns a program
        by what it does.
        """
        return self._add(call, plain, unguarded, Verdict.GUARDED, why, carries)

    def accepted(
        self, call: str, plain: Outcomes, shortcut: Outcomes, why: str, carries: int = len(TEN)
    ) -> Callable[[Act], Act]:
        """A row that differs, for a reason that we can live with."""
        return self._add(call, plain, shortcut, Verdict.ACCEPTED, why, carries)

    def not_run(
        self, call: str, plain: Outcomes, shortcut: Outcomes, verdict: Verdict, why: str
    ) -> None:
        """A row for the document alone; `why` says why no test runs it."""
        self._add(call, plain, shortcut, verdict, why, 0)(None)

    def _add(
        self,
        call: str,
        plain: Outcomes,
        shortcut: Outcomes,
        verdict: Verdict,
        why: str,
        carries: int,
    ) -> Callable[[Act | None], Act]:
        def add(act: Act | None) -> Act:
            seen = (_all_of(plain), _all_of(shortcut))
            self.rows.append(Row(self.name, call, *seen, verdict, why, carries, act))
            return act  # type: ignore[return-value]

        return add
