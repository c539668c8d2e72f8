"""What the agent tells: one event a line on stderr, JSON for machines, text for a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

#: Seconds after which an error that has not changed is told again.
AGAIN = 600.0


class Journal:
    """Writes events; an error that repeats itself is told once in a while, and always counted.

    Args:
        stream: where to; stderr without one.
        text: for people; without a word, if it is a terminal.
        runnable: makes the commands in an error's next step as they have to be typed here.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        text: bool | None = None,
        runnable: Callable[[str], str] = str,
    ) -> None:
        self._stream = stream or sys.stderr
        self._text = self._stream.isatty() if text is None else text
        self._runnable = runnable
        self._told: dict[str, tuple[str, float]] = {}
        self.errors: dict[str, int] = {}

    def say(self, event: str, level: str = "info", **fields: object) -> None:
        """Tell one event."""
        now = time.time()
        line = text_line(now, event, level, fields) if self._text else ""
        with contextlib.suppress(OSError):  # whoever listened has gone; the work goes on
            print(line or json_line(now, event, level, fields), file=self._stream, flush=True)

    def error(self, job: str, error: object) -> None:
        """Count what failed in a job, and tell it unless it was just told."""
        self.errors[job] = self.errors.get(job, 0) + 1
        line, now = self._runnable(" ".join(str(error).split())), time.monotonic()
        before, at = self._told.get(job, ("", 0.0))
        if line != before or now - at >= AGAIN:
            self._told[job] = line, now
            self.say("error", "error", job=job, error=line)

    def well(self, job: str) -> None:
        """A job went well: its next error is news."""
        if self._told.pop(job, None):
            self.say("recovered", job=job)


def json_line(now: float, event: str, level: str, fields: Mapping[str, object]) -> str:
    """One event for machines. Pure."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": stamp, "level": level, "event": event, **fields}, default=str)


def text_line(now: float, event: str, level: str, fields: Mapping[str, object]) -> str:
    """One event for people. Pure."""
    stamp = time.strftime("%H:%M:%S", time.localtime(now))
    words = " ".join(" ".join(f"{name}={value}".split()) for name, value in fields.items())
    return f"{stamp} {'' if level == 'info' else level + ' '}{event} {words}".rstrip()
