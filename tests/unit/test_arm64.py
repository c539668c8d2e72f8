"""The eBPF objects for arm64 are those for x86-64: what is tested here counts there."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import pytest

import underpass

ROOT = Path(__file__).parents[2]
_CROSS = Path("/usr/aarch64-linux-gnu/include")
_SIZED = """#include <asm/sigcontext.h>
int size = sizeof(struct sigcontext);
"""

_spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
assert _spec
assert _spec.loader
hatch_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hatch_build)


@pytest.fixture
def arm64() -> Path:
    """The kernel's headers for arm64."""
    if platform.machine() != "x86_64" or not _CROSS.is_dir():
        pytest.skip("wants x86_64 and linux-libc-dev-arm64-cross, which `./dev test` installs")
    return _CROSS


@pytest.mark.parametrize("name", ["underpass.bpf.o", "bench/naive.bpf.o"])
def test_the_same_bytes(arm64: Path, tmp_path: Path, name: str) -> None:
    """Compiled with arm64's headers, it is the object that was installed here."""
    source = next(s for s, target in hatch_build.BPF_OBJECTS.items() if str(target).endswith(name))
    built = tmp_path / "arm64.o"
    hatch_build.compile_bpf(ROOT, source, built, arm64)
    assert built.read_bytes() == (Path(underpass.__file__).parent / name).read_bytes()


def test_headers_can_make_a_difference(arm64: Path, tmp_path: Path) -> None:
    """What depends on the architecture is not the same: so the comparison above compares."""
    source = tmp_path / "sized.bpf.c"
    source.write_text(_SIZED)
    hatch_build.compile_bpf(ROOT, source, tmp_path / "x86.o")
    hatch_build.compile_bpf(ROOT, source, tmp_path / "arm64.o", arm64)
    assert (tmp_path / "x86.o").read_bytes() != (tmp_path / "arm64.o").read_bytes()
