"""What the kernel itself says about BPF objects, asked without the product or bpftool."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.waiting import wait_until

_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 280)
_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _LINK_GET_FD_BY_ID = 13, 14, 30
_MAP_CREATE, _OBJ_PIN = 0, 6
_PROG_LOAD, _OBJ_GET, _PROG_ATTACH, _PROG_QUERY = 5, 7, 8, 16
_CGROUP_SOCK_OPS = 3
_TYPE_SOCK_OPS = 13
_ALLOW_MULTI = 2
_ARRAY = 2
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
            os.close(_bpf(_GETTERS[self.kind], attributes))
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
    descriptor = _bpf(_OBJ_GET, attributes)
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("prog_id", "map_id", "link_id"):
            found.add(Object(key.removesuffix("_id"), int(value)))
    os.close(descriptor)
    return found


def wait_gone(objects: set[Object]) -> None:
    """Wait until the kernel has none of them any more."""
    wait_until(lambda: not any(one.exists() for one in objects), f"{objects} are gone")


def sock_ops_on(cgroup: Path) -> list[int]:
    """Ids of the sock_ops programs attached to this very cgroup."""
    room = 64  # BPF_CGROUP_MAX_PROGS
    ids = (ctypes.c_uint32 * room)()
    descriptor = os.open(cgroup, os.O_RDONLY)
    try:
        where = ctypes.addressof(ids)
        query = struct.pack("=IIIIQI", descriptor, _CGROUP_SOCK_OPS, 0, 0, where, room)
        attributes = ctypes.create_string_buffer(query, 128)
        _bpf(_PROG_QUERY, attributes)
        return list(ids[: int.from_bytes(attributes.raw[24:28], "little")])
    finally:
        os.close(descriptor)


def attach_foreign_sock_ops(cgroup: Path, *, shared: bool) -> int:
    """Attach a sock_ops program that does nothing, as another product would; returns its id.

    It goes when the cgroup goes. `shared`: with BPF_F_ALLOW_MULTI.
    """
    # the two instructions of `return 1`
    code = ctypes.create_string_buffer(bytes.fromhex("b700000001000000 9500000000000000"))
    licence = ctypes.create_string_buffer(b"GPL")
    load = struct.pack(
        "=IIQQIIQII16s",
        _TYPE_SOCK_OPS, 2, ctypes.addressof(code), ctypes.addressof(licence),
        0, 0, 0, 0, 0, b"foreign_ops",
    )  # fmt: skip
    program = _bpf(_PROG_LOAD, ctypes.create_string_buffer(load, 128))
    target = os.open(cgroup, os.O_RDONLY)
    try:
        attach = struct.pack("=IIII", target, program, _CGROUP_SOCK_OPS, _ALLOW_MULTI * shared)
        _bpf(_PROG_ATTACH, ctypes.create_string_buffer(attach, 128))
        for line in Path(f"/proc/self/fdinfo/{program}").read_text().splitlines():
            if line.startswith("prog_id:"):
                return int(line.split()[1])
    finally:
        os.close(target)
        os.close(program)
    raise AssertionError("a program without an id")


def pin_foreign_map(path: Path, value_size: int) -> set[Object]:
    """Pin an array map of one element of `value_size` bytes, as another product would."""
    create = struct.pack("=IIII", _ARRAY, 4, value_size, 1)
    descriptor = _bpf(_MAP_CREATE, ctypes.create_string_buffer(create, 128))
    try:
        name = ctypes.create_string_buffer(os.fsencode(path))
        pin = struct.pack("=QI", ctypes.addressof(name), descriptor)
        _bpf(_OBJ_PIN, ctypes.create_string_buffer(pin, 128))
    finally:
        os.close(descriptor)
    return pinned_at(path)


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    # the kernel wants every byte behind the last field it knows of the command to be zero
    result = int(libc.syscall(_BPF, command, attributes, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf command {command}: {errno.errorcode.get(code)}")
    return result
