"""Next steps are printed as they have to be typed."""

from __future__ import annotations

import contextvars
from pathlib import Path

import pytest

from underpass.cli import output

STEP = "run `underpass guard list`; see `underpass up --help`"


def _for(pins: str, text: str) -> str:
    def say() -> str:
        output.act_on(Path(pins))
        return output.runnable(text)

    return contextvars.copy_context().run(say)


def test_the_usual_pins_are_not_named() -> None:
    """Claim: without pins of one's own nothing is added."""
    assert output.runnable(STEP) == STEP


@pytest.mark.parametrize(
    ("pins", "shown"), [("/a/b", "--pins /a/b "), ("/a/b c", "--pins '/a/b c' "), ("/\x1b", "")]
)
def test_other_pins_are_named(pins: str, shown: str) -> None:
    """Claim: they are named in every command in backticks, quoted for a shell, and once."""
    said = _for(pins, STEP)
    assert said == f"run `underpass {shown}guard list`; see `underpass {shown}up --help`"
    assert _for(pins, said) == said


@pytest.mark.parametrize("text", ["underpass is up", "`underpass --help`", "`underpass bench`"])
def test_what_takes_no_pins(text: str) -> None:
    """Claim: text that is no command, and commands that make their own pins stay as they are."""
    assert _for("/a", text) == text


def test_columns_are_as_wide_as_their_widest_word() -> None:
    """Claim: words of a column begin below one another, and no line ends in blanks."""
    rows = [("CLIENT", "WHY"), ("10.0.0.1:80", "shortcut"), ("a", "")]
    assert output.columns(rows) == "CLIENT       WHY\n10.0.0.1:80  shortcut\na"
