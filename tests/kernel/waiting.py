"""Waiting on conditions, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from underpass.torture.patience import patient

T = TypeVar("T")
_TICK = threading.Event()


def wait_until(condition: Callable[[], T], what: str, deadline: float = 60.0) -> T:
    """Wait until `condition()` is true and return it; AssertionError after `deadline`."""
    end = time.monotonic() + patient(deadline)
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        _TICK.wait(0.01)
    return result


def holds_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition()` stays true for `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            return False
        _TICK.wait(0.02)
    return True
