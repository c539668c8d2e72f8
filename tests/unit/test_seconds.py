"""Options that take seconds: a finite number within bounds, or wrong usage in one line."""

from __future__ import annotations

from contextvars import copy_context

import click
import pytest
from click.testing import CliRunner

from underpass.cli import cli
from underpass.cli.seconds import Seconds

OPTIONS = (
    ("top", "--once", "--interval"),
    ("adopt", "--every"),
    ("torture", "--seconds"),
    ("down", "--timeout"),
)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "1e18", "1e400", "-1", "soon", ""])
@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_no_number_of_seconds(words: tuple[str, ...], value: str) -> None:
    """Claim: what is no finite number of seconds, or too many, is wrong usage; nothing is begun."""
    pins = ["--pins", "/sys/fs/bpf/nobody"]
    # a context of its own: next steps name these pins in it from now on
    done = copy_context().run(CliRunner().invoke, cli, [*pins, *words, value])
    assert done.exit_code == 2
    assert words[-1] in done.output


def test_bounds() -> None:
    """Claim: a year can be asked for, no more; a command may say less."""
    kept = Seconds(0.1)
    assert kept.convert("31536000", None, None) == 31536000.0
    assert kept.convert("0.1", None, None) == 0.1
    for wrong, kind in (("31536001", kept), ("0", kept), ("61", Seconds(0, 60))):
        with pytest.raises(click.BadParameter):
            kind.convert(wrong, None, None)
