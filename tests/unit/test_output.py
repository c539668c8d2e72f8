"""Next steps are printed as they have to be typed."""

from __future__ import annotations

import contextvars
import io
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from underpass.agent.events import Journal
from underpass.cli import output
from underpass.cli.agent import agent

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
    ("pins", "shown"),
    [
        ("/a/b", "--pins /a/b "),
        ("/a/b  c", "--pins '/a/b  c' "),
        ("/\x1b'\\é", r"--pins $'/\033\047\134é' "),
        ("/\udcff1\n", r"--pins $'/\3771\012' "),
    ],
)
def test_other_pins_are_named(pins: str, shown: str) -> None:
    """Claim: they are named in every command in backticks, quoted for a shell, and once."""
    said = _for(pins, STEP)
    assert said == f"run `underpass {shown}guard list`; see `underpass {shown}up --help`"
    assert _for(pins, said) == said
    spelled = shown.removeprefix("--pins ")
    told = subprocess.run(["bash", "-c", f"printf %s {spelled}"], capture_output=True, check=True)
    assert told.stdout == os.fsencode(pins)


def test_an_error_keeps_their_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: the one line of an error is joined before the pins are put in."""

    def fail() -> None:
        output.act_on(Path("/a  b"))
        output.fail("it is\nnot up;  run `underpass up`", 1)

    with pytest.raises(SystemExit):
        contextvars.copy_context().run(fail)
    assert capsys.readouterr().err == "underpass: it is not up; run `underpass --pins '/a  b' up`\n"


def test_another_thread_knows_them() -> None:
    """Claim: what the agent tells from its threads names them, too."""

    def told() -> str:
        output.act_on(Path("/a"))
        with ThreadPoolExecutor(1) as pool:
            stream = io.StringIO()
            journal = Journal(stream, text=True, runnable=output.runnable_anywhere())
            pool.submit(journal.error, "check", "it is not up; run `underpass up`").result()
            return stream.getvalue()

    assert "run `underpass --pins /a up`" in contextvars.copy_context().run(told)


@pytest.mark.parametrize("text", ["underpass is up", "`underpass --help`", "`underpass bench`"])
def test_what_takes_no_pins(text: str) -> None:
    """Claim: text that is no command, and commands that make their own pins stay as they are."""
    assert _for("/a", text) == text


def test_columns_are_as_wide_as_their_widest_word() -> None:
    """Claim: words of a column begin below one another, and no line ends in blanks."""
    rows = [("CLIENT", "WHY"), ("10.0.0.1:80", "shortcut"), ("a", "")]
    assert output.columns(rows) == "CLIENT       WHY\n10.0.0.1:80  shortcut\na"


def test_the_agents_errors_name_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a next step in the agent's journal is for its own pins."""

    def stopped(_wanted: object, journal: Journal, *_: object) -> NoReturn:
        journal.error("check", "it is not up; run `underpass up`")
        raise KeyboardInterrupt

    def run() -> None:
        output.act_on(Path("/a"))
        agent.invoke(agent.make_context("agent", [], obj=Path("/a")))

    monkeypatch.setattr("underpass.cli.agent.Agent", stopped)
    with pytest.raises(KeyboardInterrupt):
        contextvars.copy_context().run(run)
    assert "run `underpass --pins /a up`" in capsys.readouterr().err
