"""The least of io_uring: one operation at a time, waited for."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from tests.semantics.libc import LIBC, checked

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_SEND, _RECV, _SPLICE, _SEND_ZC = 26, 27, 30, 47
_GETEVENTS, _WAKE = 1, 2
_SQPOLL = 2
_REGISTER_FILES = 2
_FIXED_FILE = 1
_SPLICE_FROM_FIXED = 1 << 31
_NOWHERE = (1 << 64) - 1
_MORE = 2
_SQ, _CQ, _SQES = 0, 0x8000000, 0x10000000
_ENTRY, _DONE = 64, 16
"""Bytes of a submission and of a completion."""


class Uring:
    """A ring of one entry; raises OSError where io_uring is not to be had.

    Args:
        polled: a thread of the kernel takes the operations (IORING_SETUP_SQPOLL).
    """

    def __init__(self, *, polled: bool = False) -> None:
        params = bytearray(120)
        struct.pack_into("=I", params, 8, _SQPOLL if polled else 0)
        buffer = (ctypes.c_char * len(params)).from_buffer(params)
        self._fd = checked(LIBC.syscall(_SETUP, 1, buffer))
        # sq_off and cq_off: head, tail, ring_mask, ring_entries, ..., array or cqes
        self._sq_tail, self._array = struct.unpack_from("=4xI16xI", params, 40)
        self._cq_head, _, _, _, _, self._cqes = struct.unpack_from("=6I", params, 80)
        self._sq = mmap.mmap(self._fd, self._array + 4, offset=_SQ)
        self._cq = mmap.mmap(self._fd, self._cqes + 2 * _DONE, offset=_CQ)
        self._entries = mmap.mmap(self._fd, _ENTRY, offset=_SQES)
        self._enter = _GETEVENTS | (_WAKE if polled else 0)
        self._asked = self._answered = 0
        self._registered: int | None = None

    def register(self, handle: int) -> None:
        """From now on operations name this file by its number in the ring's own table."""
        files = (ctypes.c_int * 1)(handle)
        checked(LIBC.syscall(_REGISTER, self._fd, _REGISTER_FILES, files, 1))
        self._registered = handle

    def send(self, handle: int, data: bytes, flags: int = 0) -> int:
        """IORING_OP_SEND: the bytes that were sent."""
        return self._transfer(_SEND, handle, bytearray(data), flags)

    def send_zc(self, handle: int, data: bytes) -> int:
        """IORING_OP_SEND_ZC: the bytes that were sent, once the kernel has let go of them."""
        return self._transfer(_SEND_ZC, handle, bytearray(data), 0)

    def recv(self, handle: int, room: bytearray, flags: int = 0) -> int:
        """IORING_OP_RECV: the bytes that came."""
        return self._transfer(_RECV, handle, room, flags)

    def splice(self, handle: int, pipe: int, size: int) -> int:
        """IORING_OP_SPLICE from `handle` into a pipe: the bytes that were moved."""
        fixed = handle == self._registered
        flags, source = (_SPLICE_FROM_FIXED, 0) if fixed else (0, handle)
        # (opcode, flags, -, to, its offset, from's offset, size, operation's flags, ..., from)
        head = (_SPLICE, 0, 0, pipe, _NOWHERE, _NOWHERE, size, flags)
        return self._run(struct.pack("=BBHiQQII12xi16x", *head, source))

    def _transfer(self, operation: int, handle: int, room: bytearray, flags: int) -> int:
        memory = (ctypes.c_char * len(room)).from_buffer(room)
        where = ctypes.addressof(memory)
        fixed = handle == self._registered
        at = (_FIXED_FILE, 0, 0) if fixed else (0, 0, handle)
        return self._run(struct.pack("=BBHiQQII32x", operation, *at, 0, where, len(room), flags))

    def _run(self, entry: bytes) -> int:
        self._entries[:] = entry
        self._asked += 1
        struct.pack_into("=I", self._sq, self._array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, self._asked)
        result, more = self._answer(1)
        while more:
            _, more = self._answer(0)
        if result < 0:
            raise OSError(-result, f"io_uring: {os.strerror(-result)}")
        return result

    def _answer(self, submit: int) -> tuple[int, bool]:
        """Wait for one completion: its result, and whether another follows."""
        checked(LIBC.syscall(_ENTER, self._fd, submit, 1, self._enter, None, 0))
        slot = self._cqes + self._answered % 2 * _DONE  # the kernel makes twice as many
        result, flags = struct.unpack_from("=8xiI", self._cq, slot)
        self._answered += 1
        struct.pack_into("=I", self._cq, self._cq_head, self._answered)
        return int(result), bool(flags & _MORE)
