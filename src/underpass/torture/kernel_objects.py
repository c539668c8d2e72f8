"""Which BPF objects the kernel itself has, asked without the product's own binding."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from pathlib import Path

_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 280)
_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _LINK_GET_FD_BY_ID = 13, 14, 30
_OBJ_GET = 7
_GETTERS = {"prog": _PROG_GET_FD_BY_ID, "map": _MAP_GET_FD_BY_ID, "link": _LINK_GET_FD_BY_ID}


@dataclass(frozen=True)
class Object:
    """A program, map or link of the kernel."""

    kind: str
    number: int

    def exists(self) -> bool:
        """Whether the kernel still has it."""
        attributes = ctypes.create_string_buffer(self.number.to_bytes(4, "little"), 128)
        try:
            os.close(bpf(_GETTERS[self.kind], attributes))
        except FileNotFoundError:
            return False
        return True


def pinned(directory: Path) -> set[Object]:
    """Every object pinned under `directory`, with the programs that pinned links attach."""
    paths = [path for path in directory.rglob("*") if not path.is_dir()]
    return {found for path in paths for found in pinned_at(path)}


def pinned_at(path: Path) -> set[Object]:
    """The object pinned at `path`; of a link also the program that it attaches."""
    found = set()
    name = ctypes.create_string_buffer(os.fsencode(path))
    attributes = ctypes.create_string_buffer(ctypes.addressof(name).to_bytes(8, "little"), 128)
    descriptor = bpf(_OBJ_GET, attributes)
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("prog_id", "map_id", "link_id"):
            found.add(Object(key.removesuffix("_id"), int(value)))
    os.close(descriptor)
    return found


def bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    """Make the system call; raises OSError when it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    # the kernel wants every byte behind the last field it knows of the command to be zero
    result = int(libc.syscall(_BPF, command, attributes, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf command {command}: {errno.errorcode.get(code)}")
    return result
