"""Waiting on conditions, never for a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_TICK = threading.Event()
SLOW = float(os.environ.get("UNDERPASS_SLOW", "1"))
"""How many times slower than a real one this machine is: 1, or more under emulation."""


def patient(seconds: float) -> float:
    """A deadline that a real machine keeps in `seconds`, for this machine."""
    return seconds * SLOW


def fewer(count: int) -> int:
    """How many repetitions this machine gets through where a real one gets through `count`."""
    return max(1, round(count / SLOW))


def wait_until(condition: Callable[[], T], what: str, deadline: float = 20.0) -> T:
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
