"""How patient to be with this machine."""

from __future__ import annotations

import os

SLOW = float(os.environ.get("UNDERPASS_SLOW", "1"))
"""How many times slower than a real one this machine is: 1, or more under emulation."""


def patient(seconds: float) -> float:
    """A deadline that a real machine keeps in `seconds`, for this machine."""
    return seconds * SLOW


def fewer(count: int) -> int:
    """How many repetitions this machine gets through where a real one gets through `count`."""
    return max(1, round(count / SLOW))
