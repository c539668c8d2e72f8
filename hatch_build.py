# SPDX-License-Identifier: Apache-2.0
"""Compiles what is C when a wheel is built, so that running underpass needs no compiler."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BPF_OBJECTS = {
    Path("bpf/underpass.bpf.c"): Path("src/underpass/underpass.bpf.o"),
    Path("bpf/naive.bpf.c"): Path("src/underpass/bench/naive.bpf.o"),
}
PROBE_SOURCE = Path("src/underpass/bench/probe.c")
PROBE_PROGRAM = Path("src/underpass/bench/underpass-probe")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
INSTALL = "apt-get install clang llvm libbpf-dev linux-libc-dev"


class CompileC(BuildHookInterface[Any]):
    """Hatchling's custom hook: the eBPF objects, and the probe of the benchmark."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling's)
        """Compile; a failure ends the build with one line on stderr (SystemExit)."""
        for source, target in BPF_OBJECTS.items():
            compile_bpf(Path(self.root), source, target)
        compile_probe(Path(self.root))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"


def compile_bpf(root: Path, source: Path, target: Path, headers: Path | None = None) -> None:
    """Compile an eBPF object; DWARF goes, BTF stays.

    Args:
        root: of the repository.
        source: below it.
        target: below it, or anywhere.
        headers: directory that has ``asm/``; None: that of this machine.
    """
    # Debian keeps asm/ per architecture, where -target bpf does not look
    headers = headers or Path(f"/usr/include/{platform.machine()}-linux-gnu")
    flags = [
        *("-O2", "-g", "-target", "bpf", "-mcpu=v3", *WARNINGS),
        # with relative paths: line info names files by their place in the repository
        "-fdebug-compilation-dir=.",
        *("-I", str(source.parent)),
        *("-isystem", str(headers)),
    ]
    with _fresh(root / target) as fresh:
        _run(root, "clang", *flags, "-c", str(source), "-o", fresh)
        _run(root, "llvm-strip", "-g", fresh)


def compile_probe(root: Path) -> None:
    """Compile the program that measures AF_UNIX and TCP without more around it."""
    with _fresh(root / PROBE_PROGRAM) as fresh:
        _run(root, "clang", "-O2", "-s", *WARNINGS, str(PROBE_SOURCE), "-o", fresh)


@contextmanager
def _fresh(target: Path) -> Iterator[str]:
    """A path beside `target` to build at; moves there at the end, so nobody meets half a file."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        yield str(fresh)
        fresh.replace(target)


def _run(root: Path, tool: str, *arguments: str) -> None:
    found = shutil.which(tool)
    if not found:
        raise SystemExit(f"underpass: cannot build the wheel: no {tool} in PATH; run: {INSTALL}")
    if subprocess.run([found, *arguments], cwd=root, check=False).returncode:
        raise SystemExit(
            f"underpass: cannot build the wheel: {tool} failed as it says above; "
            f"if a header is missing, run: {INSTALL}"
        )
