"""The exception tree. Every message is one line: the act, the object, the cause, the next step."""

from __future__ import annotations

import os

_LONGEST = 1000


def _shown(part: object) -> str:
    """``part`` fit for a line on a terminal: it may quote a file, a path or the kernel."""
    text = " ".join(str(part).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UnderpassError(Exception):
    """Something that was asked for did not happen.

    Args:
        act: what was tried, a verb phrase ("attach sock_ops").
        obj: what it was tried on (a path, a name).
        cause: why it failed.
        next_step: what the reader can do now.
    """

    exit_code = 1

    def __init__(self, act: str, obj: object, cause: str, next_step: str) -> None:
        super().__init__(f"cannot {act} {_shown(obj)}: {_shown(cause)}; {_shown(next_step)}")
        self.act, self.obj, self.cause, self.next_step = act, str(obj), cause, next_step


class Usage(UnderpassError):
    """The request itself is wrong."""

    exit_code = 2


class Unsupported(UnderpassError):
    """This kernel or node lacks something that underpass needs."""

    exit_code = 4


class Interrupted(UnderpassError):
    """Ctrl-C ended it."""

    exit_code = 130


class NotLoaded(UnderpassError):
    """There is no generation at this pin directory."""


class KernelError(UnderpassError):
    """A call into the kernel failed. ``errno`` tells how (positive, as in :mod:`errno`)."""

    def __init__(self, act: str, obj: object, errno: int, next_step: str, detail: str = "") -> None:
        cause = os.strerror(errno) + (f" ({detail})" if detail else "")
        super().__init__(act, obj, cause, next_step)
        self.errno = errno
