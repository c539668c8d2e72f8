"""Work in a process of its own: it may need much memory for a moment, and may be ended any time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from underpass import bringup
from underpass.agent import notify


class Child:
    """One process; its stdout tells by its end that it has ended.

    Args:
        words: what to run.
        stdin: what it reads.
    """

    def __init__(self, words: list[str], stdin: bytes = b"") -> None:
        environment = {k: v for k, v in os.environ.items() if k not in notify.VARIABLES}
        # in memory: a container may have no place for files
        self._stderr = os.fdopen(os.memfd_create("stderr"), "w+b")
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(stdin)
            self._process.stdin.close()
        self._out = self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._said = b""

    @property
    def fd(self) -> int:
        """Readable when it says something, or has ended."""
        return self._out.fileno()

    def ended(self) -> bool:
        """Read what it says; True once it has ended."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.fd, 1 << 16):
                self._said += part
            self._process.wait()
            return True
        return False

    def result(self) -> tuple[int, bytes, str]:
        """Exit code, stdout, and the last line of stderr."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        self._close()
        return self._process.returncode, self._said, lines[-1] if lines else ""

    def end(self, number: signal.Signals, seconds: float) -> None:
        """End it: by a signal, and by SIGKILL if that takes longer than ``seconds``."""
        self._process.send_signal(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        self._out.close()
        self._stderr.close()


def reach(request: bytes) -> Child:
    """`bringup` at work."""
    return Child([sys.executable, "-P", "-m", bringup.__name__], request)


def calibrate(pins: Path) -> Child:
    """`underpass calibrate` at work; it ends when this process has."""
    run = "from underpass.cli import main; main()"
    return Child([sys.executable, "-P", "-c", run, "--pins", str(pins), "calibrate", "--gently"])
