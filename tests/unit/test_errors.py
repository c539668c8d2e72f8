"""Errors say the act, the object, the cause and the next step, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from underpass.errors import KernelError, NotLoaded, UnderpassError, Unsupported, Usage


@pytest.mark.parametrize(
    ("kind", "code"), [(UnderpassError, 1), (NotLoaded, 1), (Usage, 2), (Unsupported, 4)]
)
def test_one_line_with_all_four_parts(kind: type[UnderpassError], code: int) -> None:
    """Claim: an error's text holds its four parts, and its exit code is the promised one."""
    error = kind("attach sock_ops to", "/sys/fs/cgroup", "it is in use", "detach the other")
    for part in ("attach sock_ops to", "/sys/fs/cgroup", "it is in use", "detach the other"):
        assert part in str(error)
    assert "\n" not in str(error)
    assert error.exit_code == code


def test_kernel_errors_name_the_error() -> None:
    """Claim: an error of the kernel tells its name and keeps its number."""
    error = KernelError("pin", "/sys/fs/bpf/x", 28, "make room", "42 of 42")
    assert error.errno == 28
    assert "No space left on device (42 of 42)" in str(error)


DENIED = """
import os
from underpass import cli
def denied(**_):
    raise PermissionError(13, "Permission denied", "/sys/fs/bpf/underpass")
os.geteuid, cli.cli.main = lambda: 1, denied
cli.main()
"""
DOTTED = """
import sys
from underpass import cli
sys.argv = ["underpass", "--pins", "/sys/fs/bpf/a.b", "up"]
cli.main()
"""


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        (DENIED, 1, "cannot use /sys/fs/bpf/underpass: Permission denied; run as root"),
        (
            DOTTED,
            2,
            "cannot pin in /sys/fs/bpf/a.b: bpffs takes no name with a dot; choose another",
        ),
    ],
    ids=["no rights", "a dot"],
)
def test_what_the_file_system_refuses(script: str, code: int, line: str) -> None:
    """Claim: the line names the cause and what helps, not the number of an error."""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, f"underpass: {line}\n")
