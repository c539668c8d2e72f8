"""What all tests share: the switch for longer runs, and numbers worth reading in the summary."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from underpass.torture.patience import patient

pytest_plugins = ["tests.kernel.fixtures"]

_MEASURED: list[str] = []


@pytest.fixture(scope="session")
def long_run() -> bool:
    """Whether UNDERPASS_LONG asks for the torture runs."""
    return bool(os.environ.get("UNDERPASS_LONG"))


@pytest.fixture(scope="session")
def measured() -> Callable[[str], None]:
    """Takes a line that is printed after the tests."""
    return _MEASURED.append


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test the time that it needs on this machine."""
    usual = float(config.getini("timeout"))
    for item in items:
        own = item.get_closest_marker("timeout")
        seconds = patient(own.args[0] if own else usual)
        item.add_marker(pytest.mark.timeout(seconds), append=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured."""
    if _MEASURED:
        terminalreporter.section("measured")
        for line in _MEASURED:
            terminalreporter.write_line(line)
