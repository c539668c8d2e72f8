"""What all tests share: the switch for longer runs, and numbers worth reading in the summary."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from underpass.torture.patience import patient

pytest_plugins = ["tests.kernel.fixtures", "tests.pods.testbed", "tests.pods.relay"]

_MEASURED: list[str] = []


@pytest.fixture(scope="session")
def long_run() -> bool:
    """Whether UNDERPASS_LONG asks for the torture runs."""
    return bool(os.environ.get("UNDERPASS_LONG"))


@pytest.fixture(scope="session", autouse=True)
def from_a_terminal() -> Iterator[None]:
    """Signals mean what they do to a command from a terminal, however the tests were started."""
    before = (
        (signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)),
        (signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL)),
    )
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def measured() -> Callable[[str], None]:
    """Takes a line that is printed after the tests."""
    return _MEASURED.append


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test the time that it needs on this machine, and begin with the longest files.

    Where processes take a file at a time, none shall begin a long one when the others have ended.
    """
    usual = float(config.getini("timeout"))
    longest: dict[Path, float] = {}
    for item in items:
        own = item.get_closest_marker("timeout")
        seconds = patient(own.args[0] if own else usual)
        item.add_marker(pytest.mark.timeout(seconds), append=False)
        longest[item.path] = max(longest.get(item.path, 0), seconds)
    if hasattr(config, "workerinput"):  # of xdist
        sizes = Counter(item.path for item in items)
        items.sort(key=lambda item: (longest[item.path], sizes[item.path]), reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured."""
    if _MEASURED:
        terminalreporter.section("measured")
        for line in _MEASURED:
            terminalreporter.write_line(line)
