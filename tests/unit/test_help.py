"""Help as a newcomer meets it: laid out, nothing cut off, on 80 columns."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from underpass.cli import cli

USAGE = 2


def _underpass(*words: str) -> subprocess.CompletedProcess[str]:
    run = "from underpass.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", run, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": "80"},
    )


def _commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*words, name))
        else:
            yield (*words, name)


@pytest.mark.parametrize("words", [*_commands(cli)], ids=" ".join)
def test_every_help_is_laid_out(words: tuple[str, ...]) -> None:
    """Claim: each command's help has its usage, its paragraphs and no line that is cut off."""
    done = _underpass(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(" ".join(("Usage: underpass", *words)))
    assert "..." not in done.stdout.replace("ARGS]...", "").replace("COMMAND [ARGS]", "")
    assert all(len(line) <= 80 or "[" in line for line in lines)
    assert not any(one == other == "" for one, other in itertools.pairwise(lines))


@pytest.mark.parametrize(
    "words", [(), ("guard",), ("policy",)], ids=["underpass", "guard", "policy"]
)
def test_a_group_alone_shows_its_help(words: tuple[str, ...]) -> None:
    """Claim: a group without a command is a usage error that shows the help as `--help` does."""
    done = _underpass(*words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr == _underpass(*words, "--help").stdout
