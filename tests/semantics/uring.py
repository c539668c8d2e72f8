"""The least of io_uring: one operation at a time, waited for."""

from __future__ import annotations

import ctypes
import mmap
import struct

from tests.semantics.libc import LIBC, checked

_SETUP, _ENTER = 425, 426
_SEND, _RECV = 26, 27
_GETEVENTS = 1
_SQ, _CQ, _SQES = 0, 0x8000000, 0x10000000
_ENTRY, _DONE = 64, 16
"""Bytes of a submission and of a completion."""


class Uring:
    """A ring of one entry; raises OSError where io_uring is not to be had."""

    def __init__(self) -> None:
        params = bytearray(120)
        buffer = (ctypes.c_char * len(params)).from_buffer(params)
        self._fd = checked(LIBC.syscall(_SETUP, 1, buffer))
        # sq_off and cq_off: head, tail, ring_mask, ring_entries, ..., array or cqes
        self._sq_tail, self._array = struct.unpack_from("=4xI16xI", params, 40)
        self._cq_head, _, _, _, _, self._cqes = struct.unpack_from("=6I", params, 80)
        self._sq = mmap.mmap(self._fd, self._array + 4, offset=_SQ)
        self._cq = mmap.mmap(self._fd, self._cqes + 2 * _DONE, offset=_CQ)
        self._entries = mmap.mmap(self._fd, _ENTRY, offset=_SQES)
        self._count = 0

    def send(self, handle: int, data: bytes) -> int:
        """IORING_OP_SEND: the bytes that were sent."""
        return self._run(_SEND, handle, bytearray(data))

    def recv(self, handle: int, room: bytearray) -> int:
        """IORING_OP_RECV: the bytes that came."""
        return self._run(_RECV, handle, room)

    def _run(self, operation: int, handle: int, room: bytearray) -> int:
        memory = (ctypes.c_char * len(room)).from_buffer(room)
        where = ctypes.addressof(memory)
        self._entries[:] = struct.pack("=BBHiQQI36x", operation, 0, 0, handle, 0, where, len(room))
        self._count += 1
        struct.pack_into("=I", self._sq, self._array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, self._count)
        checked(LIBC.syscall(_ENTER, self._fd, 1, 1, _GETEVENTS, None, 0))
        slot = self._cqes + (self._count - 1) % 2 * _DONE  # the kernel makes twice as many
        (result,) = struct.unpack_from("=8xi", self._cq, slot)
        struct.pack_into("=I", self._cq, self._cq_head, self._count)
        if result < 0:
            raise OSError(-result, "io_uring")
        return int(result)
