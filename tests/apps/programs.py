"""Real programs, started inside a worker's namespace and cgroup."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.kernel.bed import Bed
from tests.kernel.waiting import wait_until
from underpass.torture.worker import Worker


def find(program: str, package: str) -> str:
    """Path of an installed program; skips the test when it is not installed."""
    path = shutil.which(
        program, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
    if path is None:
        pytest.skip(f"{program} is not installed (package {package})")
    return path


def serve(bed: Bed, where: str, port: int, words: list[str], log: Path) -> Worker:
    """Start a server that stays in the foreground; returns when its port answers.

    The bed ends it with all else in its cgroup.
    """
    worker = bed.worker(where)
    worker.call(_launch, words, log)
    wait_until(lambda: worker.call(_answers, port), f"{words[0]} answers, see {log}")
    return worker


def _launch(words: list[str], log: Path) -> None:
    with log.open("wb") as out:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
