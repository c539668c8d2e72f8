"""Ctrl-C and SIGTERM for commands that make things which have to go again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from underpass.errors import UnderpassError


class _Stopped(Exception):
    """SIGINT or SIGTERM came."""


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops the work, later ones do not disturb the cleaning up.

    Raises:
        UnderpassError: one came; ``what`` (as "the benchmark") was not finished.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    old = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped as stopped:
        raise UnderpassError(
            "finish", what, f"{stopped} came; all it made is removed", "run it again"
        ) from None
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
