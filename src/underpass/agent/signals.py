"""What the agent is told by signals: SIGTERM and SIGINT to end, SIGHUP to read its file again."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType

#: Seconds after SIGTERM in which the work at hand may end by itself.
_GRACE = 1.0


class Late(Exception):
    """The work at hand took longer than the grace after SIGTERM."""


class Signals:
    """Notes what has been told.

    Args:
        patient: the work at hand may take its time; else :class:`Late` is raised out of it.

    Attributes:
        stop: it was told to end.
        reload: it was told to read its file again.
    """

    def __init__(self, *, patient: bool) -> None:
        self._patient = patient
        self.stop = self.reload = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[socket.socket]:
        """Hear them; the socket is readable when one has come."""
        ours, kernels = socket.socketpair()
        with ours, kernels:
            kernels.setblocking(False)
            old = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
            handlers = {
                signal.SIGTERM: self._told_to_stop,
                signal.SIGINT: self._told_to_stop,
                signal.SIGHUP: self._told_to_reload,
                signal.SIGALRM: _too_late,
            }
            before = {each: signal.signal(each, do) for each, do in handlers.items()}
            try:
                yield ours
            finally:
                self.in_time()
                for each, handler in before.items():
                    signal.signal(each, handler)
                signal.set_wakeup_fd(old)

    def in_time(self) -> None:
        """The work at hand has ended: what follows is not broken off."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _told_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        if not self.stop and not self._patient:
            signal.setitimer(signal.ITIMER_REAL, _GRACE)
        self.stop = True

    def _told_to_reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reload = True


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise Late
