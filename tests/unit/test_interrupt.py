"""What the command line makes of Ctrl-C, SIGTERM and a terminal that goes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from underpass import __main__
from underpass.cli import interrupt
from underpass.errors import UnderpassError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    """A test may leave handlers of its own."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def _work(first: signal.Signals, later: tuple[signal.Signals, ...], cleaned: list[str]) -> None:
    """Is broken off by one signal, and cleans up while others come."""
    try:
        signal.raise_signal(first)
    finally:
        for each in later:
            signal.raise_signal(each)
        cleaned.append("all")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_work_that_goes_on_until_told(number: signal.Signals) -> None:
    """Claim: each of them sets the event, and is handled as before afterwards."""
    before = signal.getsignal(number)
    with interrupt.stop_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.is_set()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_work_that_is_broken_off(number: signal.Signals) -> None:
    """Claim: each of them ends the work as an error that names it; a second one cleans up, too."""
    cleaned: list[str] = []
    with (
        pytest.raises(UnderpassError, match=number.name) as raised,
        interrupt.interruptible("the work"),
    ):
        _work(number, SIGNALS, cleaned)
    assert cleaned
    assert raised.value.exit_code == (130 if number is signal.SIGINT else 1)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_other_command(number: signal.Signals) -> None:
    """Claim: each of them is raised; SIGTERM and SIGHUP do not disturb what is undone."""
    cleaned: list[str] = []
    with pytest.raises(interrupt.Signalled) as raised, interrupt.raised():
        _work(number, (signal.SIGHUP, signal.SIGTERM), cleaned)
    assert raised.value.number is number
    assert cleaned


def test_nohup() -> None:
    """Claim: a SIGHUP that is ignored stays so."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with (
        interrupt.raised(),
        interrupt.interruptible("the work"),
        interrupt.stop_on_signals() as stop,
    ):
        signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_interrupt_while_modules_are_imported(tmp_path: Path) -> None:
    """Claim: it ends the process without a word; the command starts where the test does."""
    interrupted = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "click.py").write_text(interrupted)
    done = subprocess.run(
        [sys.executable, "-m", "underpass"],
        check=False,
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
    (script,) = metadata.entry_points(group="console_scripts", name="underpass")
    assert script.load() is __main__.main
