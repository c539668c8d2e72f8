"""The command line as its users run it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from underpass.torture.patience import patient

DEADLINE = patient(60.0)
"""Seconds after which a command counts as hung."""


def command(pins: Path, *words: str | Path) -> list[str]:
    """The words that run `underpass` on an instance of the test's own."""
    run = "from underpass.cli import main; main()"
    return [sys.executable, "-c", run, "--pins", str(pins), *map(str, words)]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def ok(self) -> Done:
        """Check that it did what it was asked, without a word on stderr."""
        assert (self.code, self.err) == (0, ""), self
        return self

    def failed(self, code: int, *words: str) -> Done:
        """Check the exit code and that stderr is one line, without a traceback, with the words."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("underpass: "), self
        for word in words:
            assert word in lines[0], self
        return self

    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.ok().out)


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=DEADLINE)
    return Done(process.returncode, out, err)


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def underpass(pins: Path, *words: str | Path) -> Done:
    """Run `underpass` to its end."""
    return finish(start(command(pins, *words)))


def underpass_where(pins: Path, setting: str, *words: str | Path) -> Done:
    """Run `underpass` in a mount namespace of its own, after the shell commands in `setting`."""
    script = f'set -e; {setting}; exec "$@"'
    shell = ["unshare", "--mount", "sh", "-c", script, "sh"]
    return finish(start([*shell, *command(pins, *words)]))


def kill_during(words: list[str], seconds: float) -> bool:
    """Start a command and kill -9 it after `seconds`, if it has not ended by then: was it so?"""
    process = start(words)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False
