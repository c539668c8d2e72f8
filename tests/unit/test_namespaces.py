"""Finding the network namespaces of the node."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from underpass import namespaces


def test_a_process_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a process that has gone by the time its threads are listed is passed over."""
    scandir = os.scandir
    with subprocess.Popen(["sleep", "60"]) as process:
        gone = f"/proc/{process.pid}/task"

        def ended(path: Any = ".") -> Any:
            if os.fspath(path) == gone:
                process.kill()
                process.wait()
            return scandir(path)

        monkeypatch.setattr(os, "scandir", ended)
        assert namespaces.net_namespaces()
        assert process.poll() is not None
