"""Calls that Python does not make, or makes in its own way: it tries again after a signal."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import termios
from collections.abc import Sequence

LIBC = ctypes.CDLL(None, use_errno=True)

MSG_ERRQUEUE = 0x2000
MSG_MORE = 0x8000
MSG_ZEROCOPY = 0x4000000
SO_TIMESTAMP = 29
SO_TIMESTAMPING = 37
SO_PEEK_OFF = 42
SO_MAX_PACING_RATE = 47
SO_ZEROCOPY = 60
TCP_ZEROCOPY_RECEIVE = 35
TCP_INQ = 36
SIOCATMARK = 0x8905
SIOCOUTQ = termios.TIOCOUTQ


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _CountedMessage(ctypes.Structure):
    _fields_ = (("message", _Message), ("length", ctypes.c_uint32))


def checked(result: int) -> int:
    """The result of a libc call; raises OSError if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def recv(sock: socket.socket, size: int, flags: int = 0) -> bytes:
    """One recv call as it is: a signal is not hidden."""
    buffer = ctypes.create_string_buffer(size)
    return buffer.raw[: checked(LIBC.recv(sock.fileno(), buffer, size, flags))]


def recv_nowhere(sock: socket.socket, size: int, flags: int) -> int:
    """One recv call with no buffer, which MSG_TRUNC allows on TCP."""
    return checked(LIBC.recv(sock.fileno(), None, size, flags))


def send_torn(sock: socket.socket, size: int) -> int:
    """One send call of `size` bytes, of which only half of a page can be read."""
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    handle = ctypes.c_char.from_buffer(whole)
    at = ctypes.addressof(handle)
    checked(LIBC.mprotect(ctypes.c_void_p(at + page), page, 0))
    try:
        start = ctypes.c_void_p(at + page // 2)
        return checked(LIBC.send(sock.fileno(), start, size, socket.MSG_NOSIGNAL))
    finally:
        LIBC.mprotect(ctypes.c_void_p(at + page), page, mmap.PROT_READ | mmap.PROT_WRITE)
        del handle
        whole.close()


def _messages(buffers: Sequence[ctypes.Array[ctypes.c_char]]) -> ctypes.Array[_CountedMessage]:
    messages = (_CountedMessage * len(buffers))()
    for counted, buffer in zip(messages, buffers, strict=True):
        counted.message.iov = ctypes.pointer(_Iovec(ctypes.addressof(buffer), len(buffer)))
        counted.message.iov_length = 1
    return messages


def sendmmsg(sock: socket.socket, parts: Sequence[bytes]) -> int:
    """Call sendmmsg: the number of messages that were sent."""
    buffers = [ctypes.create_string_buffer(part, len(part)) for part in parts]
    return checked(LIBC.sendmmsg(sock.fileno(), _messages(buffers), len(parts), 0))


def recvmmsg(sock: socket.socket, sizes: Sequence[int]) -> list[bytes]:
    """Call recvmmsg: what each buffer got; waits for the first only (MSG_WAITFORONE)."""
    buffers = [ctypes.create_string_buffer(size) for size in sizes]
    messages = _messages(buffers)
    wait_for_one = 0x10000
    got = checked(LIBC.recvmmsg(sock.fileno(), messages, len(sizes), wait_for_one, None))
    return [buffers[i].raw[: messages[i].length] for i in range(got)]


def disconnect(sock: socket.socket) -> None:
    """Connect to AF_UNSPEC."""
    nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
    checked(LIBC.connect(sock.fileno(), nowhere, len(nowhere)))


def zerocopy_receivable(sock: socket.socket) -> int:
    """The bytes that TCP_ZEROCOPY_RECEIVE tells of when there is less than a page."""
    request = ctypes.create_string_buffer(64)
    length = ctypes.c_uint32(len(request))
    option = (socket.IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE)
    checked(LIBC.getsockopt(sock.fileno(), *option, request, ctypes.byref(length)))
    return int(struct.unpack_from("=8x4xI", request)[0])


def asked(sock: socket.socket, request: int) -> int:
    """The number that an ioctl gives."""
    return int(struct.unpack("i", fcntl.ioctl(sock, request, bytes(4)))[0])


def tcp_info(sock: socket.socket, offset: int) -> int:
    """A 64-bit field of TCP_INFO; see <linux/tcp.h>."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("=Q", info, offset)[0])


BYTES_RECEIVED, BYTES_SENT = 128, 200
"""Offsets in `struct tcp_info`."""
