"""One agent for one pin directory: a lock beside it, which goes with its holder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from underpass import pinning
from underpass.errors import UnderpassError


@contextlib.contextmanager
def alone(pins: Path) -> Iterator[None]:
    """One agent for these pins.

    Raises:
        UnderpassError: another one is at work.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(pinning.locked(place(pins), 0.0))
        except UnderpassError as error:
            if type(error) is not UnderpassError:
                raise
            step = "end that one first, or name other pins"
            raise UnderpassError("be the agent of", pins, "another one is", step) from None
        yield


def place(pins: Path) -> Path:
    """What the agent's lock is named after."""
    return pins.with_name(f"{pins.name}-agent")


def at_work(pins: Path) -> bool:
    """Is an agent at work here?"""
    if not pinning.lock(place(pins)).exists():
        return False
    try:
        with alone(pins):
            return False  # a killed one had left it
    except UnderpassError:
        return True
