"""The naive bypass, a yardstick: loaded for one benchmark, in its own cgroup, never pinned."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from underpass import libbpf
from underpass.bench.processes import Group

OBJECT = Path(__file__).with_name("naive.bpf.o")


class _Counters(ctypes.Structure):
    """``struct counters`` of ``bpf/naive.bpf.c``."""

    _fields_ = [("messages", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class Naive:
    """The bypass, attached; see :func:`attached`."""

    def __init__(self, counters: int) -> None:
        self._counters = counters

    def redirected(self) -> tuple[int, int]:
        """Messages and bytes that it has redirected so far."""
        values = (_Counters * libbpf.possible_cpus())()
        libbpf.lookup(self._counters, ctypes.c_uint32(0), values)
        return sum(each.messages for each in values), sum(each.bytes for each in values)


@contextmanager
def attached(group: Group) -> Iterator[Naive]:
    """The bypass for one cgroup of the benchmark's own.

    It hangs on descriptors of this process alone: however that ends, the kernel takes it away.

    Raises:
        KernelError: the kernel refuses it.
    """
    with libbpf.Object(OBJECT) as naive:
        naive.load()
        verdict = libbpf.attach_map(naive.program("naive_redirect"), naive.map("naive_sockets"))
        cgroup = libbpf.Fd(os.open(group.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            with (
                cgroup,
                libbpf.attach_cgroup(
                    naive.program("naive_pair"), cgroup.number, libbpf.BPF_CGROUP_SOCK_OPS
                ),
            ):
                try:
                    yield Naive(naive.map("naive_counters"))
                finally:
                    # Sockets go first: what waits unread in the map would be lost to the living.
                    group.end()
        finally:
            if verdict:
                verdict.close()
