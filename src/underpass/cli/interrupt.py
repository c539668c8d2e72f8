"""Ctrl-C, SIGTERM and a terminal that goes (SIGHUP): what was begun is undone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from underpass.errors import Interrupted, UnderpassError

_Handler = Callable[[int, FrameType | None], None]


class Signalled(BaseException):
    """A signal came that ends the command, beside what :func:`interruptible` guards."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


class _Stopped(Exception):
    """A signal came that ends the work."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _hears() -> list[signal.Signals]:
    """The signals that end what is under way; a SIGHUP that is ignored, as by nohup, does not."""
    kept = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if kept else [])]


@contextmanager
def raised() -> Iterator[None]:
    """These signals raise :class:`Signalled` unless ignored; afterwards they end the process."""
    ours = [each for each in _hears() if signal.getsignal(each) is not signal.SIG_IGN]

    def stop(number: int, _: FrameType | None) -> None:
        for each in {*ours} - {signal.SIGINT}:  # a terminal that goes says so twice
            signal.signal(each, signal.SIG_IGN)
        raise Signalled(number)

    try:
        for each in ours:
            signal.signal(each, stop)
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[None]:
    old = {each: signal.signal(each, handler) for each in _hears()}
    try:
        yield
    finally:
        for each, before in old.items():
            signal.signal(each, before)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that these signals set, for work that goes on until it is told to stop."""
    event = threading.Event()
    with _handled_by(lambda *_: event.set()):
        yield event


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """The first of these signals stops the work, later ones do not disturb the cleaning up.

    Raises:
        Interrupted: SIGINT came; ``what`` (as "the benchmark") was not finished.
        UnderpassError: another one did.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for each in _hears():
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    try:
        with _handled_by(stop):
            yield
    except _Stopped as stopped:
        kind = Interrupted if stopped.number is signal.SIGINT else UnderpassError
        cause = f"{stopped.number.name} came; all it made is removed"
        raise kind("finish", what, cause, "run it again") from None
