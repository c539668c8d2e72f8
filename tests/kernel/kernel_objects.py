"""What the kernel itself says about BPF objects, asked without the product or bpftool."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from tests.kernel.waiting import wait_until
from underpass.torture.kernel_objects import Object, bpf, pinned_at

_MAP_CREATE, _OBJ_PIN = 0, 6
_PROG_LOAD, _PROG_ATTACH, _PROG_QUERY = 5, 8, 16
_CGROUP_SOCK_OPS = 3
_TYPE_SOCK_OPS = 13
_ALLOW_MULTI = 2
_ARRAY = 2


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
        bpf(_PROG_QUERY, attributes)
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
    program = bpf(_PROG_LOAD, ctypes.create_string_buffer(load, 128))
    target = os.open(cgroup, os.O_RDONLY)
    try:
        attach = struct.pack("=IIII", target, program, _CGROUP_SOCK_OPS, _ALLOW_MULTI * shared)
        bpf(_PROG_ATTACH, ctypes.create_string_buffer(attach, 128))
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
    descriptor = bpf(_MAP_CREATE, ctypes.create_string_buffer(create, 128))
    try:
        name = ctypes.create_string_buffer(os.fsencode(path))
        pin = struct.pack("=QI", ctypes.addressof(name), descriptor)
        bpf(_OBJ_PIN, ctypes.create_string_buffer(pin, 128))
    finally:
        os.close(descriptor)
    return pinned_at(path)
